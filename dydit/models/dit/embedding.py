"""The timestep embedding of a DiT in NumPy, from stored weights (`dydit.models.dit.layout`). No PyTorch."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dydit.models.transformer.embedding import mlp, sinusoid


def timestep_embedding(weights: Mapping[str, np.ndarray], times: np.ndarray) -> np.ndarray:
    """Times [T] -> t_emb [T, D], in float64: the sinusoid, Linear, SiLU, Linear."""
    return mlp(sinusoid(times, weights["time.frequencies"]), weights, "time")
