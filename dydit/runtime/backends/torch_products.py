"""How the PyTorch backend multiplies on a CPU: in which type, and with weights in the order of oneDNN's kernels.

PyTorch has fast products in bf16 and fp16 only where the CPU has instructions for them. Elsewhere such weights are
widened once to fp32, and values stay fp32 as well: what was rounded is the weights alone.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from dydit.models.architecture import UnitLayer
from dydit.models.sliced import SlicedBlock
from dydit.runtime.backends.instruction_sets import MULTIPLY, multiplies


def multiplied_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stored tensors in types that this CPU multiplies: themselves, or copies in fp32."""
    wide = {getattr(torch, name) for name in MULTIPLY if not multiplies(name)}
    return {name: tensor.float() if tensor.dtype in wide else tensor for name, tensor in weights.items()}


def packs() -> bool:
    """Whether this PyTorch packs weights for its products: its builds for x86 do."""
    return torch.backends.mkldnn.is_available() and platform.machine().lower() in ("x86_64", "amd64")


class PackedLinear:
    """Computes the layers that units own (`dydit.models.sliced.Linear`) on packed copies of their weights."""

    def __init__(self) -> None:
        self._packed: dict[tuple[int, str], Tensor] = {}

    def pack(self, block: SlicedBlock, layer: UnitLayer) -> None:
        """Copy a layer's weight, if it has any, into the order of the kernels."""
        weight, _ = block.layers[layer.name]
        if weight.numel():
            by_output = weight if layer.out_major else weight.T
            self._packed[block.index, layer.name] = torch.ops.mkldnn._reorder_linear_weight(by_output)

    def __call__(self, block: SlicedBlock, layer: UnitLayer, x: Tensor) -> Tensor:
        weight, bias = block.layers[layer.name]
        x = x.to(weight.dtype)
        if not x.numel():  # no token is routed
            return F.linear(x, weight if layer.out_major else weight.T, bias)
        packed = self._packed[block.index, layer.name]
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), packed, bias, "none", [], "")
        return out
