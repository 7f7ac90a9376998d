"""Weights of matrix products in 8 bits: int8, and a scale for each output channel (see `dydit.export.products`)."""

from __future__ import annotations

import torch
from torch import Tensor

LAYERS = ("qkv", "proj", "fc1", "fc2")
"""The linear layers of a block whose weights are int8; adaLN, routers, embedding and final layer stay in fp32."""
_OUT_MAJOR = ("qkv", "fc1")  # [units, out of a unit, in]; the others are [units, in of a unit, out]


def is_quantized(name: str) -> bool:
    """Whether a stored tensor (`dydit.models.layout`) is int8 in a bundle of that precision."""
    return name.startswith("blocks.") and tuple(name.split(".")[2:]) in {(layer, "weight") for layer in LAYERS}


def scale_name(name: str) -> str:
    """The name of a weight's scales: `blocks.0.qkv.weight` to `blocks.0.qkv.scale`."""
    return f"{name.removesuffix('weight')}scale"


def quantize(name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """A stored weight as int8 of its shape and f32 scales: [units, out of a unit], or [out] where units are inputs.

    A channel of zeros has the scale 1. Values must be finite.
    """
    inputs = (2,) if name.split(".")[-2] in _OUT_MAJOR else (0, 1)
    scale = weight.detach().abs().amax(inputs) / 127
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    spread = scale[..., None] if inputs == (2,) else scale
    return torch.round(weight.detach() / spread).clamp(-127, 127).to(torch.int8), scale
