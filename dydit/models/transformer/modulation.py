"""The vectors of adaLN, which the conditioning graph computes: their order, and the factors of smoothing on them.

Block l has 6l..6l+5: shift1, 1+scale1, gate1, shift2, 1+scale2, gate2. The last two are the final layer's shift and
1+scale. The conditioning graph adds the 1 once, so that steps need not.

Smoothed inputs of layers that read a modulated stream are LN(x)*(1+scale)/s + shift/s. The modulation is multiplied
after its 1 was added. Multiplying adaLN's weights instead would be equally exact. See
`dydit.models.transformer.smoothed` for the other layers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dydit.models.transformer.config import ModulatedConfig
from dydit.quantization.smoothing import Smoothing

_SCALED = {"qkv": (0, 1), "fc1": (3, 4)}  # the indices of a layer's shift and scale among its block's vectors


def scale_ones(config: ModulatedConfig) -> np.ndarray:
    """What is added to vectors: 1 for scales, 0 for the others, f32 [6L+2, 1]."""
    ones = np.zeros((config.vectors, 1), np.float32)
    add_ones(ones)
    return ones


def add_ones(vectors: Any) -> None:
    """Add the 1 of each `1+scale` to vectors [..., 6L+2, D] in place, by slices, which need no table on the device."""
    vectors[..., 1:-2:3, :] += 1
    vectors[..., -1, :] += 1


def modulation_factors(model: ModulatedConfig, smoothing: Smoothing | None) -> np.ndarray | None:
    """1/s for every modulation vector, f32 [6L+2, D]; None if all of them are 1."""
    factors = np.ones((model.vectors, model.hidden_size), np.float32)
    if smoothing is not None:
        for block in range(model.depth):
            for layer, vectors in _SCALED.items():
                divisor = smoothing.divisor(block, layer)
                if divisor is not None:
                    factors[[6 * block + vector for vector in vectors]] = 1 / divisor
    return factors if (factors != 1).any() else None
