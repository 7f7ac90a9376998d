"""Counting tokens: they belong to image and step, parts add up to the whole, and what does not fit is refused."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dydit.calibrate.tokens import TokenCounter, TokenCounts, merge, spread_labels, spread_scales
from dydit.errors import CalibrationError

STEPS, DEPTH, TOKENS = 4, 2, 9


def decisions(images: int, rows: int, seed: int = 0) -> np.ndarray:
    """bool [S, L, R*n, N]."""
    return np.random.default_rng(seed).random((STEPS, DEPTH, rows * images, TOKENS)) < 0.6


def same(a: TokenCounts, b: TokenCounts) -> bool:
    alike = (a.cfg_scale, a.tokens) == (b.cfg_scale, b.tokens) and np.array_equal(a.images, b.images)
    return alike and np.array_equal(a.counts, b.counts)


def counted(images, tokens, order=range(STEPS), scale=1.5) -> TokenCounts:
    counter = TokenCounter(images, STEPS, DEPTH, TOKENS, scale)
    for step in order:
        counter.add(step, tokens[step])
    return counter.finish()


@pytest.mark.parametrize(("scale", "rows"), [(1.0, 1), (1.5, 2), (0.0, 1)])
def test_a_count_is_of_its_image_step_block_and_row(scale, rows):
    tokens = decisions(3, rows)
    made = counted([5, 7, 9], tokens, scale=scale)
    assert made.counts.shape == (3, STEPS, DEPTH, rows) and made.rows == rows
    for place in range(3):
        for row in range(rows):
            np.testing.assert_array_equal(made.counts[place, :, :, row], tokens[:, :, row * 3 + place].sum(-1))
    np.testing.assert_array_equal(made.per_image, made.counts.sum(3))
    assert made.mean == pytest.approx(tokens.sum(-1).mean(2))


@given(st.permutations(range(STEPS)), st.permutations([4, 1, 8, 3]))
def test_steps_and_images_may_come_in_any_order(order, images):
    tokens = decisions(4, 2)
    at = [[4, 1, 8, 3].index(image) for image in images]
    shuffled = tokens[:, :, at + [4 + place for place in at]]
    assert same(counted([4, 1, 8, 3], tokens), counted(images, shuffled, order))


@given(st.integers(1, 7), st.randoms())
def test_merged_parts_are_one_pass(cut, random):
    tokens = decisions(8, 2)
    whole = counted(range(8), tokens)
    parts = []
    for first, end in ((0, cut), (cut, 8)):
        rows = [*range(first, end), *range(8 + first, 8 + end)]
        parts.append(counted(range(first, end), tokens[:, :, rows]))
    random.shuffle(parts)
    assert same(merge(parts), whole)


def test_a_step_counts_once_and_none_is_left_out():
    counter = TokenCounter([0, 1], STEPS, DEPTH, TOKENS, 1.5)
    tokens = decisions(2, 2)
    counter.add(2, tokens[2])
    with pytest.raises(CalibrationError, match="step 2 was counted before"):
        counter.add(2, tokens[2])
    counter.add(0, tokens[0])
    with pytest.raises(CalibrationError, match="step 1 was not counted"):
        counter.finish()
    with pytest.raises(CalibrationError, match=r"shape \[2, 2, 9\]; expected \[2, 4, 9\]"):
        counter.add(1, tokens[1][:, :2])


def test_what_does_not_belong_together():
    tokens = decisions(2, 2)
    one = counted([0, 1], tokens)
    with pytest.raises(CalibrationError, match="there are no token counts"):
        merge([])
    with pytest.raises(CalibrationError, match="there are no token counts"):
        TokenCounts(1.5, 9, np.arange(0), np.zeros((0, STEPS, DEPTH, 2), np.int32))
    with pytest.raises(CalibrationError, match="an image was counted twice"):
        merge([one, one])
    with pytest.raises(CalibrationError, match="guidance scales cannot be merged"):
        merge([one, counted([2, 3], tokens, scale=4.0)])
    with pytest.raises(CalibrationError, match=r"outside 0\.\.9"):
        TokenCounts(1.5, 9, np.arange(2), one.counts + 9)


@given(st.integers(1, 300), st.integers(1, 40))
def test_labels_are_spread_evenly(images, classes):
    labels = spread_labels(images, classes)
    counts = np.bincount(labels, minlength=classes)
    assert len(labels) == images and len(counts) == classes and counts.max() - counts.min() <= 1
    if images < classes:
        assert max(abs(Fraction(label, classes) - Fraction(j, images)) for j, label in enumerate(labels)) < 1


@given(st.integers(1, 300), st.integers(1, 5))
def test_scales_are_spread_evenly(images, scales):
    shared = spread_scales(images, [1.5 + k for k in range(scales)])
    counts = [count for _, count in shared]
    assert sum(counts) == images and max(counts) - min(counts) <= 1
