"""Thresholds: each method's law, on any data."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dydit.calibrate.histogram import Histogram
from dydit.calibrate.range_methods import LEVELS, Method, choose
from dydit.errors import CalibrationError

FLOATS = st.floats(-1e6, 1e6, width=32).filter(lambda x: x == 0 or abs(x) > 1e-6)
VALUES = arrays(np.float32, st.integers(1, 60), elements=FLOATS).filter(lambda x: np.abs(x).max() > 0)


def histogram_of(values: np.ndarray) -> Histogram:
    histogram = Histogram()
    histogram.add(values)
    return histogram


def rounded(values: np.ndarray, threshold: float) -> np.ndarray:
    step = threshold / LEVELS
    return np.clip(np.rint(values / step), -LEVELS, LEVELS) * step


@given(VALUES, st.sampled_from(Method))
def test_a_threshold_is_within_the_values(values, method):
    chosen = choose(histogram_of(values), method, 0.9 if len(values) >= 10 else 1.0)
    assert 0 < chosen.value <= np.abs(values).max() * (1 + 1e-12)
    assert 0 <= chosen.clipped <= 1
    assert (np.abs(rounded(values.astype(np.float64), chosen.value)) <= chosen.value * (1 + 1e-12)).all()


@given(VALUES)
def test_minmax_clips_nothing(values):
    chosen = choose(histogram_of(values), Method.MINMAX)
    assert chosen.value == np.abs(values).max() and chosen.clipped == 0


@given(VALUES)
def test_mse_is_no_worse_than_minmax_on_the_same_data(values):
    histogram = histogram_of(values)
    assert choose(histogram, Method.MSE).error <= choose(histogram, Method.MINMAX).error * (1 + 1e-12)


@pytest.mark.parametrize("outliers", [0, 3])
def test_mse_is_no_worse_than_minmax_when_really_rounded(outliers):
    """The estimate of the error is good enough to choose by."""
    values = np.random.default_rng(0).normal(size=200_000).astype(np.float32)
    values[:outliers] = 60
    histogram = histogram_of(values)
    errors = {
        method: float(((rounded(values, choose(histogram, method).value) - values) ** 2).mean()) for method in Method
    }
    assert errors[Method.MSE] <= min(errors.values()) * 1.02
    assert choose(histogram, Method.MSE).error == pytest.approx(errors[Method.MSE], rel=0.05)
    if outliers:
        assert errors[Method.MSE] < 0.8 * errors[Method.MINMAX]


@given(VALUES.filter(lambda x: len(x) >= 20), st.sampled_from([0.5, 0.9, 0.95]))
def test_percentile_leaves_no_more_outside_than_asked(values, share):
    chosen = choose(histogram_of(values), Method.PERCENTILE, share)
    # A bin is 3.1 % wide, and its middle stands for all of its values.
    assert (np.abs(values) > chosen.value * (1 + 1 / 32)).mean() <= 1 - share + 1e-9


@given(VALUES, st.sampled_from(Method))
def test_scale_of_the_data_is_scale_of_the_threshold(values, method):
    """A power of two moves every bin by the same number of bins."""
    values = values[np.abs(values) > 1e-5] if (np.abs(values) > 1e-5).any() else np.ones(1, np.float32)
    share = 0.9 if len(values) >= 10 else 1.0
    once, twice = (choose(histogram_of(each), method, share) for each in (values, 4 * values))
    assert twice.value == pytest.approx(4 * once.value, rel=1e-9)


def test_entropy_lies_between_the_bulk_and_the_outliers():
    values = np.random.default_rng(1).normal(size=100_000).astype(np.float32)
    values[:5] = 100
    assert 2 < choose(histogram_of(values), Method.ENTROPY).value < 60


def test_refusals():
    with pytest.raises(CalibrationError, match="all values to calibrate on are 0"):
        choose(histogram_of(np.zeros(5)), Method.MSE)
    with pytest.raises(CalibrationError, match="there are no values"):
        choose(Histogram(), Method.MINMAX)
    with pytest.raises(CalibrationError, match=r"percentile 1\.5 is outside"):
        choose(histogram_of(np.ones(5)), Method.PERCENTILE, 1.5)
    with pytest.raises(
        CalibrationError, match=r"5 values are too few for a percentile of 0\.999: at least 1000 are needed"
    ):
        choose(histogram_of(np.ones(5)), Method.PERCENTILE, 0.999)
