"""The timestep embedding of a DiT in NumPy, from stored weights (`dydit.models.dit.layout`). No PyTorch."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def timestep_embedding(weights: Mapping[str, np.ndarray], times: np.ndarray) -> np.ndarray:
    """Times [T] -> t_emb [T, D], in float64: the sinusoid (cosines first), Linear, SiLU, Linear."""
    angles = np.asarray(times, np.float64)[:, None] * weights["time.frequencies"]
    hidden = np.concatenate([np.cos(angles), np.sin(angles)], axis=1) @ _transposed(weights, 0)
    hidden = hidden + weights["time.0.bias"]
    hidden = hidden / (1 + np.exp(-hidden))
    embedding: np.ndarray = hidden @ _transposed(weights, 2) + weights["time.2.bias"]
    return embedding


def _transposed(weights: Mapping[str, np.ndarray], layer: int) -> np.ndarray:
    return np.asarray(weights[f"time.{layer}.weight"], np.float64).T
