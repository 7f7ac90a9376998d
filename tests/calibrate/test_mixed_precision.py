"""The order in which layers go into 8 bits, its prefixes, and the bisection over them: laws, on any losses."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dydit.calibrate.mixed_precision import (
    Quality,
    Target,
    bound_on_speed,
    fp16_layers_after,
    int8_order,
    layer_macs,
    most_questions,
    most_that_holds,
    predicted_losses,
    share_in_8_bits,
    spread_counts,
)
from dydit.errors import CalibrationError, ConfigError
from dydit.models.config import parse_config

SHAPE = (3, 2, 4)
LOSSES = arrays(np.float64, SHAPE, elements=st.floats(0, 10))
# Some layers are not there, and some cost the same.
MACS = arrays(np.float64, SHAPE, elements=st.sampled_from([0.0, 1.0, 1.0, 3.0, 1e9])).filter(lambda macs: macs.any())


@given(LOSSES, MACS)
@settings(deadline=None)
def test_the_order_is_by_loss_per_multiply_add_and_of_equals_by_place(losses, macs):
    order = int8_order(losses, macs)
    assert sorted(order) == np.flatnonzero(macs.reshape(-1) > 0).tolist(), "every layer that there is, once"
    ratio = losses.reshape(-1)[order] / macs.reshape(-1)[order]
    for (a, first), (b, second) in zip(
        zip(ratio, order, strict=True), zip(ratio[1:], order[1:], strict=True), strict=False
    ):
        assert a < b or (a == b and first < second)


@given(LOSSES, MACS)
@settings(deadline=None)
def test_prefixes_are_nested_and_their_shares_grow(losses, macs):
    order = int8_order(losses, macs)
    assert not fp16_layers_after(order, len(order), SHAPE).any()
    assert (fp16_layers_after(order, 0, SHAPE) == (macs > 0)).all()
    shares = []
    for count in range(len(order) + 1):
        kept = fp16_layers_after(order, count, SHAPE)
        assert kept.sum() == len(order) - count
        if count:
            assert not (kept & ~fp16_layers_after(order, count - 1, SHAPE)).any()
        shares.append(share_in_8_bits(order, count, macs))
    assert shares[0] == 0 and shares[-1] == pytest.approx(1) and (np.diff(shares) > 0).all()
    assert bound_on_speed(shares[0]) == 1 and bound_on_speed(shares[-1]) == pytest.approx(2)


@given(LOSSES, MACS, st.integers(2, 9))
@settings(deadline=None)
def test_points_of_the_curve_are_spread_over_the_order(losses, macs, points):
    order = int8_order(losses, macs)
    counts = spread_counts(order, macs, points)
    assert counts == sorted(set(counts)) and counts[0] == 0 and counts[-1] == len(order)
    assert len(counts) <= points
    shares = [share_in_8_bits(order, count, macs) for count in counts]
    # The next layer more is never needed for a point, so that no gap is wider than a spread one and the largest layer.
    widest = 1 / (points - 1) + macs.max() / macs.sum()
    assert (np.diff(shares) <= widest + 1e-9).all()


@given(st.integers(0, 5000), st.data())
@settings(deadline=None)
def test_the_bisection_finds_the_last_that_holds(total, data):
    last = data.draw(st.integers(-1, total))
    asked = []

    def holds(count: int) -> bool:
        asked.append(count)
        return count <= last

    assert most_that_holds(holds, total) == last
    assert len(asked) == len(set(asked)) <= most_questions(total)


@given(st.lists(st.booleans(), min_size=1, max_size=60))
@settings(deadline=None)
def test_whatever_is_chosen_was_asked_and_holds(answers):
    """Quality need not fall steadily; a choice that was not measured is never made."""
    asked = {}

    def holds(count: int) -> bool:
        asked[count] = answers[count]
        return answers[count]

    found = most_that_holds(holds, len(answers) - 1)
    assert asked[found] if found >= 0 else not asked[0]


@given(
    arrays(np.float64, SHAPE, elements=st.floats(0.0, 1e3).map(lambda value: value if value > 1e-9 else 0.0)),
    st.lists(st.floats(1e-6, 1e3) | st.just(float("nan")), min_size=3, max_size=3).filter(
        lambda values: not np.isnan(values).all()
    ),
)
@settings(deadline=None)
def test_a_segments_losses_add_up_to_its_error_in_the_image(errors, image_errors):
    grown = np.array(image_errors)
    losses = predicted_losses(errors, grown)
    sums, totals = errors.sum((1, 2)), losses.sum((1, 2))
    usable = ~np.isnan(grown) & (sums > 0)
    np.testing.assert_allclose(totals[usable], grown[usable], rtol=1e-9)
    assert (losses >= 0).all() and ((losses > 0) <= (errors > 0)).all()
    if usable.any():
        gains = grown[usable] / sums[usable]
        between = totals[sums > 0] / sums[sums > 0]
        assert (between >= gains.min() * (1 - 1e-9)).all() and (between <= gains.max() * (1 + 1e-9)).all()


@pytest.mark.parametrize(
    ("errors", "grown", "words"),
    [
        (np.full(SHAPE, np.nan), np.ones(3), "are not finite"),
        (np.ones(SHAPE), np.array([1, np.inf, 1]), "are not finite"),
        (np.ones(SHAPE), np.full(3, np.nan), "none was measured"),
        (np.ones(SHAPE), np.array([1, -1, 1]), "is negative"),
        (-np.ones(SHAPE), np.ones(3), "is negative"),
    ],
)
def test_errors_that_are_none(errors, grown, words):
    with pytest.raises(CalibrationError, match=words):
        predicted_losses(errors, grown)


def test_multiply_adds_are_those_of_the_compiled_widths_and_the_routed_tokens(small_config):
    """Of a hand-counted plan: 64 channels, 4 heads, 16 tokens; the union of a segment's steps is compiled."""
    masks, parts = np.zeros((3, 24), bool), small_config.units.parts
    masks[0, :1] = masks[1, 1:3] = True  # together three heads of block 0, in steps 0 and 1
    masks[2, parts[3].units] = True  # all groups of block 1, in step 2
    tokens = np.full((3, 3), 0.25)
    macs = layer_macs(small_config, masks, [(0, 2), (2, 3)], tokens)
    qkv, proj = 3 * 48 * 64 * 16 * 2, 3 * 16 * 64 * 16 * 2
    assert macs[0, 0].tolist() == [qkv, proj, 0, 0]
    assert macs[1, 1].tolist() == [0, 0, 256 * 64 * 4, 256 * 64 * 4]
    assert macs.sum() == qkv + proj + 2 * 256 * 64 * 4


def test_a_target_holds_at_its_bar():
    near = Quality(psnr_least=30.0, psnr_median=40.0, fd_ratio=1.05)
    assert Target(psnr=30).holds(near) and not Target(psnr=30.01).holds(near)
    assert Target(fd_ratio=1.05).holds(near) and not Target(fd_ratio=1.04).holds(near)
    for values in ({}, {"psnr": 30, "fd_ratio": 1.1}, {"psnr": -1}, {"psnr": 200}, {"fd_ratio": 0.9}):
        with pytest.raises(ConfigError):
            parse_config(Target, values)
