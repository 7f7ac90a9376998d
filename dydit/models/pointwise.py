"""What the sliced form computes between its matrix products, as functions of tensors alone.

A compiler makes one pass over the tokens of each (`fused`). Without it, each operation is a pass of its own (`PLAIN`).
Fused, the tokens that enter a product are written in the type of its weights. The values are the same up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor


def modulated(
    x: Tensor, shift: Tensor, scale: Tensor, rows: Tensor | None, epsilon: float, dtype: torch.dtype | None
) -> Tensor:
    """LN(x) * scale + shift. `shift`, `scale` [R, 1, D]; `rows`: of single tokens x [T, D], else x is [R, N, D]."""
    if rows is not None:
        shift, scale = shift[rows, 0], scale[rows, 0]
    normed = F.layer_norm(x, x.shape[-1:], eps=epsilon) * scale + shift
    return normed if dtype is None else normed.to(dtype)


def normed(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float, dtype: torch.dtype | None) -> Tensor:
    """LN(x) * weight + bias, with weight and bias [D]."""
    out = F.layer_norm(x, x.shape[-1:], weight, bias, epsilon)
    return out if dtype is None else out.to(dtype)


def activated(hidden: Tensor, gates: Tensor | None, channels: int, approximate: str) -> Tensor:
    """GELU(hidden) of an MLP's hidden channels, times the gates of their groups, [g], of `channels` each."""
    out = F.gelu(hidden, approximate=approximate)
    return out if gates is None else out * gates.repeat_interleave(channels).to(out.dtype)


def gated(stream: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """stream + gate * branch, in the type of the stream [R, N, D]. `gate` [R, 1, D]."""
    return stream + gate * branch.to(stream.dtype)


def scaled(branch: Tensor, gate: Tensor, rows: Tensor | None, dtype: torch.dtype) -> Tensor:
    """gate * branch. `gate` [R, 1, D]; `rows`: of single tokens [T, D]."""
    return (gate if rows is None else gate[rows, 0]) * branch.to(dtype)


def left(stream: Tensor, entering: Tensor, branch: Tensor, slot: Tensor, fits: Tensor) -> Tensor:
    """The stream [T, D], in which tokens that have a slot are `entering + branch` of their slot."""
    leaving = (entering + branch).index_select(0, torch.where(fits, slot, 0))
    return torch.where(fits[:, None], leaving, stream)


def kept(stream: Tensor, branch: Tensor, routed: Tensor) -> Tensor:
    """The stream [T, D], with the branch at the tokens that are `routed`, bool [T]."""
    return torch.where(routed[:, None], stream + branch, stream)


@dataclass(frozen=True)
class Pointwise:
    """The functions of this module. `narrow`: whether tokens that enter a product have the type of its weights."""

    modulated: Callable[..., Tensor] = modulated
    normed: Callable[..., Tensor] = normed
    activated: Callable[..., Tensor] = activated
    gated: Callable[..., Tensor] = gated
    scaled: Callable[..., Tensor] = scaled
    left: Callable[..., Tensor] = left
    kept: Callable[..., Tensor] = kept
    narrow: bool = False


PLAIN = Pointwise()


@cache
def fused(backend: str = "inductor", whole: bool = False) -> Pointwise:
    """The functions compiled by `torch.compile`, each when it is called with types, or a kind of shape, that are new.

    After too many of these PyTorch goes on without compiling; with `whole` it then raises an error, and also where a
    function is not one graph.
    """
    plain = {each.name: getattr(PLAIN, each.name) for each in fields(Pointwise) if each.name != "narrow"}
    return Pointwise(
        **{name: torch.compile(function, fullgraph=whole, backend=backend) for name, function in plain.items()},
        narrow=True,
    )
