"""Random DyDiTs that behave like trained ones: mixed gates, masks that drift with the timestep, tokens that differ.

For benchmarks at sizes whose weights are not at hand, and for tests. A freshly initialised DiT serves neither: its
output layers are zero and its gates all open, so that everything would pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dydit.errors import ConfigError
from dydit.models.config import ModelConfig
from dydit.models.dynamic import DynamicModel
from dydit.models.registry import architecture_of
from dydit.models.routers import Masked, Recording


def synthetic_model(config: ModelConfig, seed: int = 0, flops_ratio: float = 0.5) -> DynamicModel:
    """A model with random weights whose routers are set so that its FLOPs ratio comes near `flops_ratio`.

    The ratio is that over uniformly spread timesteps, on standard normal latents; measure it where the figure matters.
    Raises `ConfigError` for a ratio outside (0, 1].
    """
    if not 0 < flops_ratio <= 1:
        raise ConfigError(f"FLOPs ratio {flops_ratio} is outside 0..1")
    return architecture_of(config).synthetic(config, seed, flops_ratio)


@torch.no_grad()
def recorded_pass(model: DynamicModel, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Recording]:
    """One inference pass with its decisions kept."""
    recording = Recording(Masked(), model.config)
    return model(x, t, y, recording), recording
