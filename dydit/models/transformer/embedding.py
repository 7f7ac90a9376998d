"""The parts of timestep embeddings in NumPy, in float64, from stored weights. No PyTorch."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def sinusoid(times: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """Times [T] -> [T, size], the cosines first."""
    angles = np.asarray(times, np.float64)[:, None] * frequencies
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1)


def linear(x: np.ndarray, weights: Mapping[str, np.ndarray], layer: str) -> np.ndarray:
    """A stored linear layer, [out, in], on x [T, in]."""
    out: np.ndarray = x @ np.asarray(weights[f"{layer}.weight"], np.float64).T + weights[f"{layer}.bias"]
    return out


def mlp(x: np.ndarray, weights: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """The stored layers `name`.0 and `name`.2 with SiLU between them, on x [T, in]."""
    hidden = linear(x, weights, f"{name}.0")
    return linear(hidden / (1 + np.exp(-hidden)), weights, f"{name}.2")
