"""Noise that belongs to an image: a pure function of (seed, image index, draw), for any batch, backend and order.

Philox4x64-10 (Salmon et al. 2011) with key (seed, image) and counter (block, 0, draw, 0); draw 0 is the starting latent
x_T, and draw i+1 is the noise of execution step i. NumPy increments the counter before each block, so counter word 0 of
the first block is 1. Each block gives four 64-bit words; consecutive pairs (u, w) become two normals by
Box-Muller:

    r = sqrt(-2 ln(1 - U)),  U = (u >> 11) * 2^-53;   normals r*cos(2 pi W), r*sin(2 pi W),  W = (w >> 11) * 2^-53

They are computed in float64 and rounded to float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dydit.errors import ConfigError

_LIMIT = 1 << 64
INITIAL_DRAW = 0


def normals(seed: int, image: int, draw: int, count: int) -> np.ndarray:
    """`count` standard normals of one image and draw, float32 [count]."""
    for name, value in (("seed", seed), ("image index", image), ("draw", draw)):
        if not 0 <= value < _LIMIT:
            raise ConfigError(f"{name} {value} is outside 0..2^64-1")
    key = np.array([seed, image], np.uint64)
    raw = np.random.Philox(key=key, counter=np.array([0, 0, draw, 0], np.uint64)).random_raw(count + count % 2)
    uniform = (raw >> np.uint64(11)) * 2.0**-53
    radius, angle = np.sqrt(-2 * np.log1p(-uniform[0::2])), (2 * np.pi) * uniform[1::2]
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return pairs.reshape(-1)[:count].astype(np.float32)


def image_noise(seed: int, images: Sequence[int], draw: int, shape: tuple[int, ...]) -> np.ndarray:
    """Noise of several images for one draw, float32 [len(images), *shape]."""
    count = int(np.prod(shape))
    return np.stack([normals(seed, image, draw, count).reshape(shape) for image in images])


def step_draw(step: int) -> int:
    """The draw that execution step `step` consumes."""
    return step + 1
