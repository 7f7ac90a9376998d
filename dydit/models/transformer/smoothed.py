"""How a bundle applies smoothing (`dydit.quantization.smoothing`): s W in the weights, x / s where x is computed.

    qkv, fc1   in what comes before: the affine LayerNorm, or the modulation that the conditioning graph computes, so
               steps do not change
    proj       in the rows of qkv that compute values: attention mixes tokens, but no channels of values
    fc2        as a product with 1/s after GELU, `blocks.{l}.fc2.factor` f32 [H, gs]; gates are multiplied with it first

Token routers read x before all of this.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dydit.models.architecture import Slots, stored_name
from dydit.models.transformer.config import TransformerConfig
from dydit.quantization.smoothing import Smoothing

FACTOR = "fc2.factor"
_LAYER = re.compile(r"(.+)\.(?:attn|mlp)\.(qkv|proj|fc1|fc2)\.(weight|bias)")
_NORM = re.compile(r"(.+)\.norm([12])\.(?:weight|bias)")
_AFTER_NORM = {"1": "qkv", "2": "fc1"}  # the layer that reads the output of a LayerNorm
StoredTensors = Callable[[Mapping[str, Tensor], Any, Slots | None], Iterator[tuple[str, Tensor]]]


class SmoothedState(Mapping[str, Tensor]):
    """A state dict of published names with smoothed block weights, each of which is computed on access."""

    def __init__(self, state: Mapping[str, Tensor], config: TransformerConfig, smoothing: Smoothing):
        self._state, self._smoothing = state, smoothing
        self._blocks = {config.block_name(block): block for block in range(config.depth)}

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._state[name]
        if (match := _NORM.fullmatch(name)) and match[1] in self._blocks:
            divisor = self._smoothing.divisor(self._blocks[match[1]], _AFTER_NORM[match[2]])
            return tensor if divisor is None else tensor.to(torch.float32) / torch.from_numpy(divisor)
        if (match := _LAYER.fullmatch(name)) and match[1] in self._blocks:
            return self._layer(tensor, self._blocks[match[1]], match[2], match[3])
        return tensor

    def _layer(self, tensor: Tensor, block: int, layer: str, part: str) -> Tensor:
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
    stored_tensors: StoredTensors,
    state: Mapping[str, Tensor],
    config: TransformerConfig,
    smoothing: Smoothing | None,
    order: Slots | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """`stored_tensors` of a smoothed model, then the factors of fc2's inputs. Without smoothing, `stored_tensors`."""
    if smoothing is None:
        yield from stored_tensors(state, config, order)
        return
    yield from stored_tensors(SmoothedState(state, config, smoothing), config, order)
    for block, (_, groups) in enumerate(order or config.units.every_unit):
        divisor = smoothing.divisor(block, "fc2")
        if divisor is not None:
            by_group = (1 / divisor).reshape(config.num_heads, config.group_dim)
            yield stored_name(block, FACTOR), torch.from_numpy(by_group[list(groups)])
