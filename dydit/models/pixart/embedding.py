"""The timestep embedding of a PixArt-alpha in NumPy, from stored weights (`dydit.models.pixart.layout`). No PyTorch."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dydit.models.pixart.config import PixArtConfig
from dydit.models.transformer.embedding import mlp, sinusoid


def timestep_embedding(config: PixArtConfig, weights: Mapping[str, np.ndarray], times: np.ndarray) -> np.ndarray:
    """Times [T] -> what adaLN and width routers read, [T, D], in float64: with micro-conditions, if there are any."""
    frequencies = weights["time.frequencies"]
    embedded = mlp(sinusoid(times, frequencies), weights, "time")
    if not config.micro_conditions:
        return embedded
    size = mlp(sinusoid(np.array([config.pixels]), frequencies), weights, "size")
    ratio = mlp(sinusoid(np.ones(1), frequencies), weights, "ratio")
    return embedded + np.concatenate([size, size, ratio], axis=1)
