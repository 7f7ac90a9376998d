"""Counts of values: what they keep, that parts add up, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dydit.calibrate.histogram import BINS, EDGES, Histogram
from dydit.errors import CalibrationError

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
VALUES = arrays(np.float32, st.integers(0, 40), elements=FLOATS)


def histogram_of(values: np.ndarray) -> Histogram:
    histogram = Histogram()
    histogram.add(values)
    return histogram


def same(a: Histogram, b: Histogram) -> bool:
    return bool((a.counts == b.counts).all()) and (a.least, a.largest) == (b.least, b.largest)


@given(st.lists(VALUES, max_size=5), st.randoms())
def test_parts_add_up_to_the_whole_in_any_order(parts, random):
    whole = histogram_of(np.concatenate([*parts, np.empty(0, np.float32)]))
    shuffled = list(parts)
    random.shuffle(shuffled)
    one_by_one, merged = Histogram(), Histogram()
    for part in shuffled:
        one_by_one.add(part)
        merged.merge(histogram_of(part))
    assert same(whole, one_by_one) and same(whole, merged)


@given(VALUES.filter(len))
def test_every_value_is_counted_near_itself(values):
    histogram = histogram_of(values)
    assert histogram.total == len(values)
    assert (histogram.least, histogram.largest) == (values.min(), values.max())
    points, counts = histogram.points()
    assert counts.sum() == len(values) and (np.diff(points) >= 0).all()
    assert histogram.most == np.abs(values).max() and points[-1] <= histogram.most
    kept = np.repeat(points, counts)
    # 32 bins an octave; below the least normal number bins are as wide as the last ones above it.
    assert (np.abs(np.sort(np.abs(values.astype(np.float64))) - kept) <= kept / 32 + 2.0**-130).all()


def test_bins_ascend_and_cover_every_float():
    finite = EDGES[np.isfinite(EDGES)]
    assert (np.diff(finite) > 0).all() and finite[0] == 0 and finite[-1] > 3.3e38
    assert len(EDGES) == BINS + 1


def test_memory_does_not_grow():
    histogram = Histogram()
    before = histogram.counts.nbytes
    for seed in range(3):
        histogram.add(np.random.default_rng(seed).normal(size=10_000))
    assert histogram.counts.nbytes == before and histogram.total == 30_000


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_and_change_nothing(bad):
    histogram = histogram_of(np.ones(3))
    with pytest.raises(CalibrationError, match="a value to calibrate on is NaN or infinite"):
        histogram.add(np.array([1.0, bad]))
    assert same(histogram, histogram_of(np.ones(3)))


def test_nothing_counted():
    with pytest.raises(CalibrationError, match="there are no values to calibrate on; sample more images"):
        Histogram().points()
