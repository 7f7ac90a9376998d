"""The Fréchet distance, against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dydit.evaluation.frechet import frechet_distance


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.floats(0.1, 3), st.floats(-2, 2))
def test_the_frechet_distance_of_a_scaled_and_shifted_set_is_known(seed: int, scale: float, shift: float) -> None:
    """For b = scale*a + shift both covariances commute: |mu_a - mu_b|^2 + (1 - scale)^2 tr(S_a)."""
    a = np.random.default_rng(seed).normal(size=(40, 5)) @ np.random.default_rng(seed + 1).normal(size=(5, 5))
    a[:, 4] = 1.0  # a feature that never varies
    b = scale * a + shift
    expected = np.square(a.mean(0) - b.mean(0)).sum() + (1 - scale) ** 2 * np.trace(np.cov(a, rowvar=False))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_the_frechet_distance_agrees_with_a_matrix_square_root() -> None:
    from scipy.linalg import sqrtm

    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(50, 6)) @ rng.normal(size=(6, 6)), rng.normal(size=(60, 6)) @ rng.normal(size=(6, 6)) + 1
    one, two = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    cross = np.trace(np.real(sqrtm(one @ two)))
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(one) + np.trace(two) - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
