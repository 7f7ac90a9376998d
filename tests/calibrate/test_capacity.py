"""Capacities: the laws of how they are chosen, the rates that are predicted, and what is too little to choose from."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dydit.calibrate.capacity import (
    CapacityConfig,
    Groups,
    choose_capacities,
    draw_groups,
    drawn_for,
    groups_for,
    mlp_ratio,
    overflow_of,
    wilson_upper,
)
from dydit.calibrate.tokens import TokenCounts, merge
from dydit.errors import CalibrationError, ConfigError
from dydit.models.config import parse_config

BOUNDS = (0, 2, 5, 6)
QUANTILES = st.floats(0.5, 0.999)
MARGINS = st.floats(0, 0.5)


def config(**settings) -> CapacityConfig:
    return CapacityConfig(**{"batch_sizes": (4,), "quantile": 1.0, "margin": 0.0, **settings})


def groups_of(counts, chosen: CapacityConfig, groups: int = 60, seed: int = 0) -> list[Groups]:
    return [draw_groups(counts, batch, groups, seed) for batch in chosen.batch_sizes]


def choose(counts, chosen: CapacityConfig, bounds=BOUNDS) -> np.ndarray:
    return choose_capacities(groups_of(counts, chosen), bounds, chosen, counts.tokens)


@given(st.integers(0, 99), st.integers(1, 8), st.integers(1, 2), MARGINS, st.integers(1, 7))
@settings(deadline=None)
def test_every_group_fits_at_quantile_one(make_counts, seed, batch, rows, margin, tile):
    counts = make_counts(seed=seed, rows=rows)
    chosen = config(batch_sizes=(batch, 2 * batch), margin=margin, tile=tile)
    capacities = choose(counts, chosen)
    drawn = groups_of(counts, chosen)
    assert overflow_of(drawn, capacities, BOUNDS).rate == 0
    if margin == 0 and tile == 1 and capacities.min() > 1:
        one_less = overflow_of(drawn, capacities - 1, BOUNDS)
        assert one_less.rate > 0 and one_less.repeated_steps > 0, "no capacity is larger than it has to be"


@given(st.tuples(QUANTILES, QUANTILES), st.tuples(MARGINS, MARGINS), st.integers(0, 20))
@settings(deadline=None)
def test_capacities_grow_with_quantile_and_margin(make_counts, quantiles, margins, seed):
    counts = make_counts(seed=seed)
    low, high = (
        choose(counts, config(quantile=pick(quantiles), margin=pick(margins), batch_sizes=(2, 4)))
        for pick in (min, max)
    )
    assert (low <= high).all() and low.min() >= 1 and high.max() <= counts.tokens
    assert (high <= choose(counts, config(margin=max(margins), batch_sizes=(2, 4)))).all()


@given(st.integers(1, 9), st.integers(0, 20))
@settings(deadline=None)
def test_capacities_are_multiples_of_the_tile_or_all_tokens(make_counts, tile, seed):
    counts = make_counts(seed=seed)
    plain, tiled = choose(counts, config()), choose(counts, config(tile=tile))
    assert ((tiled % tile == 0) | (tiled == counts.tokens)).all()
    assert ((tiled - plain >= 0) & (tiled - plain < tile)).all()


@given(st.permutations(range(24)), st.integers(1, 23))
@settings(deadline=None)
def test_the_order_of_images_and_the_parts_they_come_in_play_no_part(make_counts, order, cut):
    counts, order = make_counts(), np.array(order)
    parts = []
    for places in (np.sort(order[:cut]), np.sort(order[cut:])):
        parts.append(TokenCounts(counts.cfg_scale, counts.tokens, counts.images[places], counts.counts[places]))
    np.testing.assert_array_equal(choose(merge(parts), config()), choose(counts, config()))


def test_groups_are_sums_of_images_and_repeat_by_seed(make_counts):
    counts = make_counts()
    drawn = draw_groups(counts, 3, 50, 7)
    sums = counts.per_image
    assert drawn.totals.shape == (50, 6, 2) and (drawn.batch, drawn.rows, drawn.images) == (3, 2, 24)
    assert drawn.totals.min() >= 3 * sums.min() and drawn.totals.max() <= 3 * sums.max()
    single = draw_groups(counts, 1, 200, 7).totals
    assert {each.tobytes() for each in single} == {each.tobytes() for each in sums}, "each image, and nothing else"
    np.testing.assert_array_equal(drawn.totals, draw_groups(counts, 3, 50, 7).totals)
    assert not np.array_equal(drawn.totals, draw_groups(counts, 3, 50, 8).totals)


def test_groups_vary_as_batches_of_the_images_would(make_counts):
    """The variance of a mean of B draws is that of the images over B: no less, as it were without replacement."""
    counts = make_counts(images=40)
    drawn = draw_groups(counts, 10, 20_000, 0)
    expected = (counts.per_image / 2).var(axis=0) / 10
    for block in range(2):
        assert drawn.per_row(0, 6, block).var(axis=0) == pytest.approx(expected[:, block], rel=0.06)


def test_a_segment_has_what_its_steps_need_together(make_counts):
    counts = make_counts()
    whole, split = choose(counts, config(), (0, 6)), choose(counts, config(), range(7))
    np.testing.assert_array_equal(whole[0], split.max(axis=0))
    assert (split[0] < whole[0]).all(), "counts drift with the step"


def test_the_largest_batch_size_or_guidance_counts(make_counts):
    small, large = choose(make_counts(), config(batch_sizes=(1,))), choose(make_counts(), config(batch_sizes=(8,)))
    assert (small >= large).all() and (small > large).any(), "means of many vary less"
    np.testing.assert_array_equal(choose(make_counts(), config(batch_sizes=(8, 1))), np.maximum(small, large))


def test_quantile_of_known_numbers():
    totals = np.arange(1, 101).reshape(100, 1, 1)
    drawn = [Groups(totals, 1, 1, 100)]
    for quantile, expected in ((0.5, 50), (0.99, 99), (0.991, 100), (1.0, 100)):
        found = choose_capacities(drawn, (0, 1), config(quantile=quantile), 200)
        assert found.tolist() == [[expected]]
        assert overflow_of(drawn, found, (0, 1)).rate == pytest.approx((100 - expected) / 100)
    assert choose_capacities(drawn, (0, 1), config(margin=0.1), 200).tolist() == [[111]], "rounded up"
    assert choose_capacities(drawn, (0, 1), config(tile=64), 120).tolist() == [[120]], "no more than there are"


def test_rates_of_known_groups():
    totals = np.array([[[4, 4], [4, 9]], [[4, 5], [9, 9]]])  # [group, step, block]; 2 rows, so capacity 2 holds 4
    rates = overflow_of([Groups(totals, 1, 2, 2)], np.array([[2, 2], [2, 4]]), (0, 1, 2))
    assert (rates.rate, rates.repeated_steps, rates.trials) == (4 / 8, 3 / 4, 8)
    # The groups' own rates are 1/4 and 3/4, so s^2 = 1/16, and two disjoint groups are 2 * (1/4) / (1/16) = 8 trials.
    assert rates.upper == wilson_upper(0.5, 8)


def test_what_is_alike_counts_once():
    bounds, capacity = (0, 5), np.array([[2, 2]])
    alike = np.repeat([3, 1, 1, 1], 10).reshape(4, 5, 2)  # one group overflows, always
    mixed = np.roll(alike.reshape(-1), 0).reshape(10, 4).T.reshape(4, 5, 2)  # each overflows in a quarter
    one, other = (overflow_of([Groups(each, 1, 1, 4)], capacity, bounds) for each in (alike, mixed))
    assert one.rate == other.rate == 1 / 4
    assert one.upper == wilson_upper(0.25, 4) > other.upper >= wilson_upper(0.25, 4 * 2), (
        "at most segments times blocks"
    )
    never = overflow_of([Groups(0 * alike, 1, 1, 4)], capacity, bounds)
    assert never.rate == 0 and never.upper == wilson_upper(0, 4 * 2)


def test_the_bound_from_held_out_images_holds_for_the_population(make_counts):
    chosen = config(quantile=0.95)
    capacities = choose(make_counts(images=100, seed=99), chosen)
    population = overflow_of(groups_of(make_counts(images=10_000, seed=98), chosen, 5000), capacities, BOUNDS)
    assert 0.005 < population.rate < 0.1
    measured = [overflow_of(groups_of(make_counts(80, seed=k), chosen, 500), capacities, BOUNDS) for k in range(40)]
    assert np.mean([each.rate for each in measured]) == pytest.approx(population.rate, rel=0.5)
    covered = [each.upper > population.rate for each in measured]
    assert sum(covered) >= 35, "of 40 bounds of 95 %; fewer than 35 happen once in a hundred times"
    assert np.median([each.upper for each in measured]) < 5 * population.rate, "and they say something"


def test_wilson_bound():
    # (p + z^2/2n + z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n) by hand: z^2 = 2.70554
    assert wilson_upper(0, 100) == pytest.approx(2.70554 / 102.70554, rel=1e-4)
    assert wilson_upper(0.1, 50) == pytest.approx(0.19154, rel=1e-4)
    assert wilson_upper(1, 10) == pytest.approx(1) and wilson_upper(0, 1) < 1


@given(st.floats(0, 1), st.integers(1, 10_000))
def test_wilson_bound_lies_above_the_rate_and_closes_in(rate, trials):
    assert rate <= wilson_upper(rate, trials) + 1e-12
    assert wilson_upper(rate, 2 * trials) <= wilson_upper(rate, trials) + 1e-12


def test_mlp_multiply_adds(make_counts):
    counts = np.full((2, 3, 2, 2), 4, np.int32)
    one = TokenCounts(1.5, 8, np.arange(2), counts)
    widths, capacities = np.array([[1, 1], [1, 1], [2, 4]]), np.array([[4, 4], [6, 5]])
    # dynamic: 4 * (1+1+1+1+2+4); by capacity: 4*4 of the first two steps, 2*6 + 4*5 of the last
    assert mlp_ratio([one], widths, capacities, (0, 2, 3), 0) == pytest.approx((16 + 32) / 40)
    assert mlp_ratio([one], widths, capacities, (0, 2, 3), 0.5) == pytest.approx((16 + 32 + 0.5 * 8 * 10) / 40)
    none = TokenCounts(1.5, 8, np.arange(2), 0 * counts)
    with pytest.raises(CalibrationError, match="no token entered an MLP"):
        mlp_ratio([none], widths, capacities, (0, 2, 3), 0)


class TestTooFew:
    @pytest.mark.parametrize(
        ("settings", "needed"),
        [
            ({"quantile": 1.0, "batch_sizes": (7,)}, 7),
            ({"quantile": 0.99, "batch_sizes": (1,)}, 100),
            ({"quantile": 0.999, "batch_sizes": (1,)}, 1000),
            ({"quantile": 0.99, "batch_sizes": (2, 4)}, 10),
            ({"quantile": 0.999, "batch_sizes": (20,)}, 20),
        ],
    )
    def test_as_many_as_are_needed(self, make_counts, settings, needed):
        chosen = config(**settings)
        assert chosen.images_needed() == needed
        few = make_counts(images=max(2, needed - 1), steps=1)
        with pytest.raises(CalibrationError, match=f"batches of .*: {needed} are needed for each guidance scale"):
            drawn_for([few], chosen, 0)
        if needed <= 100:
            assert drawn_for([make_counts(images=needed, steps=1)], chosen, 0)

    def test_nothing(self):
        with pytest.raises(CalibrationError, match="there are no token counts"):
            drawn_for([], config(), 0)

    @given(st.floats(0.5, 0.9999))
    def test_some_group_lies_beyond_the_quantile(self, quantile):
        groups = groups_for(quantile)
        assert math.ceil(quantile * groups - 1e-9) <= groups and groups * (1 - quantile) >= 1 - 1e-6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantile": 1.1}, "at most 1, not"),
        ({"quantile": 0.2}, "at least 0.5, not"),
        ({"quantile": 0.99999}, "too close to 1; use at most 0.9999, or 1"),
        ({"quantile": float("nan")}, "quantile"),
        ({"margin": -0.1}, "at least 0, not"),
        ({"margin": float("inf")}, "margin"),
        ({"tile": 0}, "at least 1, not"),
        ({"batch_sizes": ()}, "at least 1 entry"),
        ({"batch_sizes": (4, 0)}, "batch_sizes.1 must be at least 1"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(CapacityConfig, settings)
    assert config(batch_sizes=(4, 2, 4)).batch_sizes == (2, 4)
