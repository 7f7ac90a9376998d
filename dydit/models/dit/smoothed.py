"""The factors of smoothing on a DiT's modulation, for layers that read a modulated stream: LN(x)*(1+scale)/s + shift/s.

The modulation is multiplied after its 1 was added. Multiplying adaLN's weights instead would be equally exact. See
`dydit.models.transformer.smoothed` for the other layers.
"""

from __future__ import annotations

import numpy as np

from dydit.models.dit.config import DiTConfig
from dydit.quantization.smoothing import Smoothing

_SCALED = {"qkv": (0, 1), "fc1": (3, 4)}  # the indices of a layer's shift and scale among its block's vectors


def modulation_factors(model: DiTConfig, smoothing: Smoothing | None) -> np.ndarray | None:
    """1/s for every modulation vector, f32 [6L+2, D]; None if all of them are 1."""
    factors = np.ones((model.vectors, model.hidden_size), np.float32)
    if smoothing is not None:
        for block in range(model.depth):
            for layer, vectors in _SCALED.items():
                divisor = smoothing.divisor(block, layer)
                if divisor is not None:
                    factors[[6 * block + vector for vector in vectors]] = 1 / divisor
    return factors if (factors != 1).any() else None
