"""The planner against brute force, and the laws of its plans."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dydit.errors import ConfigError
from dydit.export.exporter import segment_spec
from dydit.models.dit.config import preset
from dydit.planning.plan import (
    PlanCosts,
    budget_plan,
    merged_plan,
    optimal_plans,
    per_step_plan,
    plan_cost,
    segment_costs,
)
from dydit.planning.sizes import PlanSizes

LAW = settings(max_examples=25, deadline=None)


COUNTS = st.lists(st.lists(st.integers(1, 5), min_size=2, max_size=2), min_size=1, max_size=2)
"""Units of the groups of each block."""


@pytest.fixture(scope="session")
def make_instance(make_axis):
    """What a draw of `instances` stands for: masks bool [S, U], costs, and bytes of units."""

    def make(draw):
        counts, steps, seed, flipping, by_part = draw
        axis, rng = make_axis(counts), np.random.default_rng(seed)
        flips = rng.random((steps, axis.size)) < flipping
        masks = np.logical_xor.accumulate(flips, axis=0) ^ (rng.random(axis.size) < 0.5)
        costs = PlanCosts(axis, rng.integers(1, 50, axis.size).astype(float))
        if by_part:
            parts = rng.integers(0, 50, len(axis.parts)).astype(float)
            costs = PlanCosts(axis, costs.units, parts, float(rng.integers(0, 50)))
        return masks, costs, rng.integers(1, 50, axis.size).astype(float)

    return make


def instances(most_steps: int = 7):
    """Masks that drift, on groups of any sizes, and whole-numbered costs and bytes: sums of them are exact."""
    seeds, flipping = st.integers(0, 2**32 - 1), st.sampled_from([0.1, 0.4])
    return st.tuples(COUNTS, st.integers(1, most_steps), seeds, flipping, st.booleans())


def one_part(make_axis, masks: list[list[int]], *of_units: float) -> tuple[np.ndarray, PlanCosts]:
    """Masks of a block with a single group, and what its units cost; 1 each by default."""
    axis = make_axis([[len(masks[0])]])
    return np.array(masks, bool), PlanCosts(axis, np.array(of_units or [1.0] * axis.size))


def cost_of(bounds: tuple[int, ...], masks: np.ndarray, costs: PlanCosts) -> float:
    return sum((j - i) * step_cost(masks[i:j].any(0), costs) for i, j in itertools.pairwise(bounds))


def step_cost(union: np.ndarray, costs: PlanCosts) -> float:
    """Unit by unit, part by part."""
    cost = costs.fixed
    for place, part in enumerate(costs.axis.parts):
        on = [unit for unit in range(part.start, part.stop) if union[unit]]
        cost += sum(float(costs.units[unit]) for unit in on)
        if costs.parts is not None and on:
            cost += float(costs.parts[place])
    return cost


def every_plan(steps: int, segments: int | None = None):
    for k in range(1, steps + 1) if segments is None else [segments]:
        for cuts in itertools.combinations(range(1, steps), k - 1):
            yield (0, *cuts, steps)


@LAW
@given(instances())
def test_segment_costs(make_instance, instance):
    masks, costs, _ = make_instance(instance)
    steps = len(masks)
    table = segment_costs(masks, costs)
    assert table.shape == (steps, steps + 1)
    for i in range(steps):
        for j in range(steps + 1):
            assert table[i, j] == (cost_of((i, j), masks, costs) if j > i else np.inf)


@LAW
@given(instances())
def test_every_number_of_segments_is_optimal(make_instance, instance):
    masks, costs, _ = make_instance(instance)
    steps = len(masks)
    plans = optimal_plans(masks, costs)
    assert [len(plan.segments) for plan in plans] == list(range(1, steps + 1))
    for k, plan in enumerate(plans, 1):
        assert plan.bounds[0] == 0 and plan.bounds[-1] == steps and list(plan.bounds) == sorted(set(plan.bounds))
        assert plan.cost == cost_of(plan.bounds, masks, costs), "the cost that is reported is the plan's"
        assert plan.cost == min(cost_of(bounds, masks, costs) for bounds in every_plan(steps, k))
    assert all(a.cost >= b.cost for a, b in itertools.pairwise(plans)), "more segments never cost more"
    exact = per_step_plan(masks, costs)
    lowest = sum(step_cost(mask, costs) for mask in masks)
    assert plans[-1].cost == exact.cost == lowest, "and per step is the lower bound"


@LAW
@given(instances(), st.integers(1, 8))
def test_merged_plan(make_instance, instance, most):
    masks, costs, _ = make_instance(instance)
    plan = merged_plan(masks, costs, most)
    best = min(cost_of(b, masks, costs) for b in every_plan(len(masks)) if len(b) - 1 <= most)
    assert plan.cost == cost_of(plan.bounds, masks, costs) == best
    fewest = min(len(b) for b in every_plan(len(masks)) if cost_of(b, masks, costs) == best)
    assert len(plan.bounds) == fewest, "no segment that gains nothing"


@LAW
@given(instances())
def test_per_step_plan_cuts_where_masks_change(make_instance, instance):
    masks, costs, _ = make_instance(instance)
    plan = per_step_plan(masks, costs)
    for first, end in plan.segments:
        assert (masks[first:end] == masks[first]).all()
        assert end == len(masks) or (masks[end] != masks[end - 1]).any()


@LAW
@given(instances(), st.integers(0, 400), st.floats(0, 1))
def test_budget_plan(make_instance, instance, fixed, tightness):
    """The budget holds, and no plan of the optimal ones (the cheapest of k segments, each k) is cheaper within it."""
    masks, costs, sizes = make_instance(instance)
    candidates = [*optimal_plans(masks, costs), per_step_plan(masks, costs)]
    needed = PlanSizes(costs.axis, masks, sizes, fixed).weights
    needs = sorted(needed(plan) for plan in candidates)
    budget = int(needs[0] + tightness * (needs[-1] - needs[0]))
    plan = budget_plan(masks, costs, needed, budget)
    assert needed(plan) <= budget
    assert plan.cost == min(p.cost for p in candidates if needed(p) <= budget)
    if tightness == 1:
        assert plan.cost == per_step_plan(masks, costs).cost
    with pytest.raises(
        ConfigError, match=f"memory budget {needs[0] - 1} bytes: the smallest plan needs {needs[0]} bytes"
    ):
        budget_plan(masks, costs, needed, needs[0] - 1)


@LAW
@given(instances(most_steps=12), st.integers(1, 5))
def test_union_with_gates_is_every_step(make_instance, instance, most):
    """A segment's subnetwork holds all that its steps use; where it holds more than a step uses, that part is gated."""
    masks, costs, _ = make_instance(instance)
    for first, end in merged_plan(masks, costs, most).segments:
        spec = segment_spec(costs.axis, masks[first:end], None, None)
        for part, held in costs.axis.zip(spec.units):
            assert list(held) == sorted(set(held))
            used = [set(np.flatnonzero(mask[part.units])) for mask in masks[first:end]]
            assert set(held) == set().union(*used), "no unit that no step uses"
            assert ((part.block, part.index) in spec.gated) == any(units != set(held) for units in used)


@LAW
@given(instances(), st.integers(0, 2**32 - 1))
def test_a_plan_has_a_cost_by_other_costs_too(make_instance, instance, seed):
    masks, costs, _ = make_instance(instance)
    rng, axis = np.random.default_rng(seed), costs.axis
    other = PlanCosts(axis, rng.integers(1, 50, axis.size) * 1.0, rng.integers(0, 50, len(axis.parts)) * 1.0, 3.0)
    for plan in optimal_plans(masks, costs):
        assert plan_cost(plan, masks, costs) == plan.cost
        assert plan_cost(plan, masks, other) == cost_of(plan.bounds, masks, other)
    assert costs.static == step_cost(np.ones(costs.axis.size, bool), costs)


def test_other_costs_make_other_plans(make_axis):
    """Two units that change once each: the cut goes where it saves more."""
    masks, axis = np.array([[1, 1], [0, 1], [0, 0]], bool), make_axis([[1, 1]])
    for first, second in ((9.0, 1.0), (1.0, 9.0)):
        plan = merged_plan(masks, PlanCosts(axis, np.array([first, second])), 2)
        assert plan.bounds == ((0, 1, 3) if first > second else (0, 2, 3))


def test_all_plans_of_a_large_model_are_found_in_one_pass():
    """As many steps and units as DiT-XL/2's, at costs of no regular kind."""
    rng, axis = np.random.default_rng(0), preset("XL/2").units
    masks = np.logical_xor.accumulate(rng.random((250, axis.size)) < 0.01, axis=0)
    costs = PlanCosts(axis, rng.random(axis.size), rng.random(len(axis.parts)), 1.0)
    plans = optimal_plans(masks, costs)
    assert [len(plan.segments) for plan in plans] == list(range(1, 251))
    assert all(a.cost >= b.cost for a, b in itertools.pairwise(plans))
    assert plans[31].cost == pytest.approx(plan_cost(plans[31], masks, costs))


def test_segments_that_gain_nothing_are_merged(make_axis):
    """Wide, narrow, wide: two segments cost what one does, because either holds a wide step."""
    masks, costs = one_part(make_axis, [[1, 1], [1, 0], [1, 1]])
    assert merged_plan(masks, costs, 2).bounds == (0, 3)
    assert merged_plan(masks, costs, 3).bounds == (0, 1, 2, 3)


def test_masks_that_never_change_need_one_segment(make_axis):
    masks, costs = one_part(make_axis, [[1] * 6] * 9)
    for plan in (merged_plan(masks, costs, 4), per_step_plan(masks, costs)):
        assert plan.bounds == (0, 9) and plan.cost == 54
    assert not segment_spec(costs.axis, masks, None, None).gated


def test_at_least_one_subnetwork(make_axis):
    masks, costs = one_part(make_axis, [[1, 1]] * 2)
    with pytest.raises(ConfigError, match="the largest number of subnetworks is 0; expected at least 1"):
        merged_plan(masks, costs, 0)
