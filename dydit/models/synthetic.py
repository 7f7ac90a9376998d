"""Random models that behave like trained ones: mixed gates, masks that drift with the timestep, tokens that differ.

They serve benchmarks at sizes without available weights, and tests. A freshly initialized DiT is unsuitable: its output
layers are zero and all of its gates are open, so every comparison would pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dydit.errors import ConfigError
from dydit.models.config import ModelConfig
from dydit.models.dynamic import DynamicModel
from dydit.models.registry import architecture_of
from dydit.models.routers import Masked, Recording


def synthetic_model(config: ModelConfig, seed: int = 0, flops_ratio: float = 0.5) -> DynamicModel:
    """A model with random weights whose routers are set so that its FLOPs ratio comes near `flops_ratio`.

    The ratio is a mean over evenly spread timesteps, on standard normal latents. It is not exact. The model is made on
    PyTorch's default device; each kind of device draws other weights.
    Raises `ConfigError` for a ratio outside (0, 1].
    """
    if not 0 < flops_ratio <= 1:
        raise ConfigError(f"FLOPs ratio {flops_ratio}: expected a number above 0 and at most 1")
    return architecture_of(config).synthetic(config, seed, flops_ratio)


@torch.no_grad()
def recorded_pass(model: DynamicModel, x: Tensor, t: Tensor, y: Any) -> tuple[Tensor, Recording]:
    """One inference pass: the output, and the recorded decisions of its routers."""
    recording = Recording(Masked(), model.config)
    return model(x, t, y, recording), recording
