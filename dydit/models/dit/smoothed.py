"""Where a smoothing (`dydit.quantization.smoothing`) goes in a bundle: s W into the weights, x / s to where x is made.

    qkv, fc1   into the modulation that the conditioning graph gives: LN(x)*(1+scale)/s + shift/s, nothing in a step
    proj       into the rows of values of qkv: attention mixes tokens, and each channel with itself alone
    fc2        a product with 1/s after GELU, `blocks.{l}.fc2.factor` f32 [H, gs]; of gates, where there are any, one
               with these

Modulation is multiplied after its 1 has been added, rather than adaLN's weights and their 1 before: exact either way,
and done once for a run, not in its steps. Token routers see x before all of this.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from dydit.models.architecture import Slots, stored_name
from dydit.models.dit.config import DiTConfig
from dydit.models.dit.layout import stored_tensors
from dydit.quantization.smoothing import Smoothing

FACTOR = "fc2.factor"
_LAYER = re.compile(r"blocks\.(\d+)\.(?:attn|mlp)\.(qkv|proj|fc1|fc2)\.(weight|bias)")
_SCALED = {"qkv": (0, 1), "fc1": (3, 4)}  # a layer's shift and scale among its block's vectors


class SmoothedState(Mapping[str, Tensor]):
    """A state dict of published names whose block weights are smoothed, each when it is asked for."""

    def __init__(self, state: Mapping[str, Tensor], smoothing: Smoothing):
        self._state, self._smoothing = state, smoothing

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)

    def __getitem__(self, name: str) -> Tensor:
        tensor, place = self._state[name], _LAYER.fullmatch(name)
        if place is None:
            return tensor
        block, layer, part = int(place[1]), place[2], place[3]
        divisor = self._smoothing.divisor(block, layer)
        if part == "weight" and divisor is not None:
            tensor = tensor.to(torch.float32) * torch.from_numpy(divisor)
        mixed = self._smoothing.divisor(block, "proj")
        if layer == "qkv" and mixed is not None:
            queries, values = tensor.to(torch.float32).tensor_split([len(tensor) * 2 // 3])
            by_row = torch.from_numpy(mixed).reshape(-1, *([1] * (values.ndim - 1)))
            tensor = torch.cat([queries, values / by_row])
        return tensor


def smoothed_tensors(
    state: Mapping[str, Tensor], model: DiTConfig, smoothing: Smoothing | None, order: Slots | None = None
) -> Iterator[tuple[str, Tensor]]:
    """`stored_tensors` of a smoothed model, and then the factors of fc2's inputs; plainly those without a smoothing."""
    if smoothing is None:
        yield from stored_tensors(state, model, order)
        return
    yield from stored_tensors(SmoothedState(state, smoothing), model, order)
    for block, (_, groups) in enumerate(order or model.units.every_unit):
        divisor = smoothing.divisor(block, "fc2")
        if divisor is not None:
            by_group = (1 / divisor).reshape(model.num_heads, model.group_dim)
            yield stored_name(block, FACTOR), torch.from_numpy(by_group[list(groups)])


def modulation_factors(model: DiTConfig, smoothing: Smoothing | None) -> np.ndarray | None:
    """1/s of every vector of modulation, f32 [6L+2, D]; None where none of them changes."""
    factors = np.ones((model.vectors, model.hidden_size), np.float32)
    if smoothing is not None:
        for block in range(model.depth):
            for layer, vectors in _SCALED.items():
                divisor = smoothing.divisor(block, layer)
                if divisor is not None:
                    factors[[6 * block + vector for vector in vectors]] = 1 / divisor
    return factors if (factors != 1).any() else None
