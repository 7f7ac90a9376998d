"""How a DiT's bundle applies smoothing (`dydit.quantization.smoothing`): s W in the weights, x / s where x is computed.

    qkv, fc1   in the modulation that the conditioning graph computes: LN(x)*(1+scale)/s + shift/s, so steps do not
               change
    proj       in the rows of qkv that compute values: attention mixes tokens, but no channels of values
    fc2        as a product with 1/s after GELU, `blocks.{l}.fc2.factor` f32 [H, gs]; gates are multiplied with it first

The modulation is multiplied after its 1 was added. Multiplying adaLN's weights instead would be equally exact. Token
routers read x before all of this.
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
_SCALED = {"qkv": (0, 1), "fc1": (3, 4)}  # the indices of a layer's shift and scale among its block's vectors


class SmoothedState(Mapping[str, Tensor]):
    """A state dict of published names with smoothed block weights, each of which is computed on access."""

    def __init__(self, state: Mapping[str, Tensor], smoothing: Smoothing):
        self._state, self._smoothing = state, smoothing

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)

    def __getitem__(self, name: str) -> Tensor:
        tensor, match = self._state[name], _LAYER.fullmatch(name)
        if match is None:
            return tensor
        block, layer, part = int(match[1]), match[2], match[3]
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
    """`stored_tensors` of a smoothed model, then the factors of fc2's inputs. Without smoothing, `stored_tensors`."""
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
    """1/s for every modulation vector, f32 [6L+2, D]; None if all of them are 1."""
    factors = np.ones((model.vectors, model.hidden_size), np.float32)
    if smoothing is not None:
        for block in range(model.depth):
            for layer, vectors in _SCALED.items():
                divisor = smoothing.divisor(block, layer)
                if divisor is not None:
                    factors[[6 * block + vector for vector in vectors]] = 1 / divisor
    return factors if (factors != 1).any() else None
