"""Weights of matrix products in int8 or float8 E4M3, with a scale for each output channel.

stored = round(weight / scale), scale = max |weight of the channel| / largest     largest: 127, or 448 for E4M3
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def scale_name(name: str) -> str:
    """The name of the scales of a weight: `blocks.0.layer.scale` for `blocks.0.layer.weight`."""
    return f"{name.removesuffix('weight')}scale"


def quantize(weight: Tensor, out_major: bool, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """Quantize a weight to 8 bits. Returns it in its own shape, and the f32 scales of its output channels.

    `weight`: [units, outputs per unit, inputs] if it is stored `out_major`, else [units, inputs per unit, outputs]; its
    values are finite. Scales: [units, outputs per unit], or [outputs]. The scale of a channel of zeros is 1.
    """
    inputs = (2,) if out_major else (0, 1)
    largest = LARGEST[dtype]
    scale = weight.detach().abs().amax(inputs) / largest
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    spread = scale[..., None] if out_major else scale
    ratio = (weight.detach() / spread).clamp(-largest, largest)
    return (torch.round(ratio) if dtype is torch.int8 else ratio).to(dtype), scale
