"""The timestep embedding of a U-ViT in NumPy, from stored weights (`dydit.models.uvit.layout`). No PyTorch."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dydit.models.transformer.embedding import mlp, sinusoid
from dydit.models.uvit.config import UViTConfig


def timestep_embedding(config: UViTConfig, weights: Mapping[str, np.ndarray], times: np.ndarray) -> np.ndarray:
    """Times [T] -> what width routers read, [T, D], in float64: the sinusoid, or an MLP of it."""
    waves = sinusoid(np.asarray(times) + config.first_time, weights["time.frequencies"])
    return mlp(waves, weights, "time") if config.mlp_time_embed else waves
