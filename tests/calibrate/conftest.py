"""Token counts as models give them, and any others."""

from __future__ import annotations

import numpy as np
import pytest

from dydit.calibrate.tokens import TokenCounts


def made_counts(images: int = 24, steps: int = 6, depth: int = 2, rows: int = 2, tokens: int = 16, seed: int = 0):
    """Counts whose mean drifts with the step, with some images that route more than others."""
    random = np.random.default_rng(seed)
    own = random.normal(0, 1, (images, 1, 1, 1))
    mean = np.linspace(6, 10, steps)[None, :, None, None] + np.arange(depth)[None, None, :, None]
    counts = np.clip(np.rint(mean + own + random.normal(0, 1, (images, steps, depth, rows))), 0, tokens)
    return TokenCounts(1.0 if rows == 1 else 1.5, tokens, np.arange(images), counts.astype(np.int32))


@pytest.fixture(scope="session")
def make_counts():
    """`make_counts(images=24, steps=6, depth=2, rows=2, tokens=16, seed=0)`."""
    return made_counts
