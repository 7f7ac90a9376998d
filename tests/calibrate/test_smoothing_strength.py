"""What is kept of a layer's inputs adds up in any order, and a smoothing is chosen where it helps and nowhere else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dydit.calibrate import smoothing_strength
from dydit.calibrate.smoothing_strength import (
    LEAST_GAIN,
    STRENGTHS,
    Choice,
    InputStatistics,
    LayerInputs,
    as_smoothing,
    choose_smoothing,
    exponents_for,
    product_error,
)
from dydit.errors import CalibrationError
from dydit.quantization.smoothing import MOST

SEGMENTS, CHANNELS, LIMIT = 3, 4, 6
VALUES = st.floats(-100, 100, width=32)
PARTS = st.lists(
    st.tuples(
        st.integers(0, SEGMENTS - 1), arrays(np.float32, st.tuples(st.integers(0, 5), st.just(4)), elements=VALUES)
    ),
    max_size=6,
)
POSITIVE = st.floats(2.0**-60, 2.0**60, width=32)


def inputs_of(parts) -> LayerInputs:
    kept = LayerInputs(SEGMENTS, CHANNELS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smoothing_strength, "ROWS", LIMIT)
        for segment, rows in parts:
            kept.add(segment, rows)
    return kept


def same(a: LayerInputs, b: LayerInputs) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("maxima", "keys", "segments", "rows"))


def rounded(weight: np.ndarray) -> np.ndarray:
    """int8, a scale for each output channel."""
    scale = np.abs(weight).max(0) / 127
    scale[scale == 0] = 1
    return (np.rint(weight / scale) * scale).astype(np.float32)


@given(PARTS, st.randoms())
def test_parts_give_the_same_in_any_order(parts, random):
    whole, shuffled = inputs_of(parts), list(parts)
    random.shuffle(shuffled)
    assert same(whole, inputs_of(shuffled))


@given(PARTS)
def test_what_is_kept_is_what_came(parts):
    kept = inputs_of(parts)
    came = [(segment, *row) for segment, rows in parts for row in rows.tolist()]
    assert len(kept.rows) == min(LIMIT, len(came))
    for segment, row in zip(kept.segments, kept.rows.tolist(), strict=True):
        came.remove((segment, *row))  # fails where it is not there, or not as often
    for segment in range(SEGMENTS):
        rows = [np.abs(rows).max(0) for each, rows in parts if each == segment and len(rows)]
        assert np.array_equal(kept.maxima[segment], np.max([np.zeros(CHANNELS), *rows], axis=0))


def test_memory_does_not_grow_and_channels_have_their_places(monkeypatch):
    monkeypatch.setattr(smoothing_strength, "ROWS", LIMIT)
    kept, rng = LayerInputs(1, CHANNELS), np.random.default_rng(0)
    for _ in range(20):
        kept.add(0, rng.normal(size=(2, 10, 2)), np.array([3, 1]))
    assert kept.rows.shape == (LIMIT, CHANNELS) and not kept.rows[:, [0, 2]].any() and kept.rows[:, [1, 3]].all()
    assert (kept.maxima[0] > 0).tolist() == [False, True, False, True]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_and_change_nothing(bad, small_config):
    kept = inputs_of([(0, np.ones((2, 4), np.float32))])
    with pytest.raises(CalibrationError, match="a value to calibrate on is NaN or infinite"):
        kept.add(0, np.array([[1, 9, bad, 1.0]]))
    assert same(kept, inputs_of([(0, np.ones((2, 4), np.float32))]))
    with pytest.raises(CalibrationError, match="segment 1, block 2, proj: a value to calibrate on is NaN or infinite"):
        InputStatistics(2, small_config).add(1, 2, "proj", np.full((1, 64), bad))


@given(arrays(np.float32, 8, elements=POSITIVE), arrays(np.float32, 8, elements=POSITIVE), st.sampled_from(STRENGTHS))
def test_exponents_follow_the_formula(inputs, weights, strength):
    found = exponents_for(inputs, weights, strength)
    assert found.min() >= 0 and found.max() <= MOST
    exact = strength * np.log2(inputs, dtype=np.float64) - (1 - strength) * np.log2(weights, dtype=np.float64)
    if np.ptp(np.rint(exact)) <= MOST:
        assert found.min() == 0 and np.abs(exact - exact.min() - found).max() <= 1 + 1e-9
    else:
        assert found.max() == MOST == found[exact.argmax()]


def test_channels_that_nothing_enters_or_leaves_are_left_alone():
    found = exponents_for(np.array([8.0, 0, 8, 1]), np.array([1.0, 1, 0, 1]), 0.5)
    assert found.tolist() == [2, 0, 0, 0]
    assert not exponents_for(np.zeros(3), np.ones(3), 0.5).any()


@given(st.integers(0, 1000), st.floats(0, 6))
def test_what_is_chosen_is_never_worse_on_the_same_rows(seed, spread):
    rng = np.random.default_rng(seed)
    sizes = np.exp(spread * rng.uniform(-1, 1, CHANNELS))
    kept = inputs_of((segment, (rng.normal(size=(3, CHANNELS)) * sizes)) for segment in range(SEGMENTS))
    weight = rng.normal(size=(CHANNELS, 5)).astype(np.float32)
    choice = choose_smoothing(kept, weight, rounded)
    none = product_error(kept, weight, np.zeros(CHANNELS, np.int64), rounded)
    assert choice.unsmoothed == none
    if choice.exponents is None:
        assert choice.error == none
    else:
        assert choice.error == product_error(kept, weight, choice.exponents, rounded) <= (1 - LEAST_GAIN) * none


def test_few_large_channels_are_smoothed_and_even_ones_are_not():
    rng = np.random.default_rng(0)
    rows, weight = rng.normal(size=(200, 64)), rng.normal(size=(64, 32)).astype(np.float32)
    sizes = np.where(np.arange(64) < 3, 30, 1)
    even, uneven = LayerInputs(1, 64), LayerInputs(1, 64)
    even.add(0, rows)
    uneven.add(0, rows * sizes)
    assert choose_smoothing(even, weight, rounded).exponents is None
    choice = choose_smoothing(uneven, (weight / sizes[:, None]).astype(np.float32), rounded)
    assert choice.exponents[:3].min() > choice.exponents[3:].max()
    assert choice.error < choice.unsmoothed / 10


def test_the_range_of_a_segment_is_its_own():
    """A row is rounded by what is largest in its segment, not by what is elsewhere."""
    kept, weight = LayerInputs(2, 2), np.eye(2, dtype=np.float32)
    kept.add(0, np.array([[1.0, 0.4]]))
    kept.add(1, np.array([[1000.0, 0.4]]))
    error = product_error(kept, weight, np.zeros(2, np.int64), rounded)
    first = 0.4 - np.rint(0.4 * 127) / 127
    assert error == pytest.approx(first**2 + 0.4**2, rel=1e-3)


def test_choices_as_a_smoothing():
    none, some = Choice(None, 1.0, 1.0), Choice(np.array([0, 10]), 0.5, 1.0)
    nowhere = {"qkv": none, "proj": none}
    assert as_smoothing([nowhere] * 2) is None
    found = as_smoothing([nowhere, {**nowhere, "proj": some}])
    assert found.layers == 1 and found.blocks == ({}, {"proj": "0a"})
