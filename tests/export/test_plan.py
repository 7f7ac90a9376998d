"""The planner against brute force, and the laws of its plans."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dydit.errors import ConfigError
from dydit.export.exporter import segment_spec
from dydit.export.plan import Plan, budget_plan, merged_plan, optimal_plans, per_step_plan, plan_bytes, segment_costs

LAW = settings(max_examples=25, deadline=None)


@st.composite
def instances(draw, most_steps: int = 7):
    """Masks [S, L, 2, H] that drift, whole-numbered costs and bytes."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    steps, shape = draw(st.integers(1, most_steps)), (2, 2, draw(st.integers(1, 4)))
    flips = rng.random((steps, *shape)) < draw(st.sampled_from([0.1, 0.4]))
    masks = np.logical_xor.accumulate(flips, axis=0) ^ (rng.random(shape) < 0.5)
    return masks, rng.integers(1, 50, shape).astype(float), rng.integers(1, 50, shape).astype(float)


def cost_of(bounds: tuple[int, ...], masks: np.ndarray, costs: np.ndarray) -> float:
    return sum((j - i) * float((masks[i:j].any(0) * costs).sum()) for i, j in itertools.pairwise(bounds))


def every_plan(steps: int, segments: int | None = None):
    for k in range(1, steps + 1) if segments is None else [segments]:
        for cuts in itertools.combinations(range(1, steps), k - 1):
            yield (0, *cuts, steps)


@LAW
@given(instances())
def test_segment_costs(instance):
    masks, costs, _ = instance
    steps = len(masks)
    table = segment_costs(masks, costs)
    assert table.shape == (steps, steps + 1)
    for i in range(steps):
        for j in range(steps + 1):
            assert table[i, j] == (cost_of((i, j), masks, costs) if j > i else np.inf)


@LAW
@given(instances())
def test_every_number_of_segments_is_optimal(instance):
    masks, costs, _ = instance
    steps = len(masks)
    plans = optimal_plans(masks, costs)
    assert [len(plan.segments) for plan in plans] == list(range(1, steps + 1))
    for k, plan in enumerate(plans, 1):
        assert plan.bounds[0] == 0 and plan.bounds[-1] == steps and list(plan.bounds) == sorted(set(plan.bounds))
        assert plan.cost == cost_of(plan.bounds, masks, costs), "the cost that is reported is the plan's"
        assert plan.cost == min(cost_of(bounds, masks, costs) for bounds in every_plan(steps, k))
    assert all(a.cost >= b.cost for a, b in itertools.pairwise(plans)), "more segments never cost more"
    exact = per_step_plan(masks, costs)
    assert plans[-1].cost == exact.cost == (masks * costs).sum(), "and per step is the lower bound"


@LAW
@given(instances(), st.integers(1, 8))
def test_merged_plan(instance, most):
    masks, costs, _ = instance
    plan = merged_plan(masks, costs, most)
    best = min(cost_of(b, masks, costs) for b in every_plan(len(masks)) if len(b) - 1 <= most)
    assert plan.cost == cost_of(plan.bounds, masks, costs) == best
    fewest = min(len(b) for b in every_plan(len(masks)) if cost_of(b, masks, costs) == best)
    assert len(plan.bounds) == fewest, "no segment that gains nothing"


@LAW
@given(instances())
def test_per_step_plan_cuts_where_masks_change(instance):
    masks, costs, _ = instance
    plan = per_step_plan(masks, costs)
    for first, end in plan.segments:
        assert (masks[first:end] == masks[first]).all()
        assert end == len(masks) or (masks[end] != masks[end - 1]).any()


@LAW
@given(instances(), st.integers(0, 400), st.floats(0, 1))
def test_budget_plan(instance, fixed, tightness):
    """The budget holds, and no plan of the optimal ones (the cheapest of k segments, each k) is cheaper within it."""
    masks, costs, sizes = instance
    candidates = [*optimal_plans(masks, costs), per_step_plan(masks, costs)]
    needs = sorted(plan_bytes(plan, masks, sizes, fixed) for plan in candidates)
    budget = int(needs[0] + tightness * (needs[-1] - needs[0]))
    plan = budget_plan(masks, costs, sizes, fixed, budget)
    assert plan_bytes(plan, masks, sizes, fixed) <= budget
    assert plan.cost == min(p.cost for p in candidates if plan_bytes(p, masks, sizes, fixed) <= budget)
    if tightness == 1:
        assert plan.cost == per_step_plan(masks, costs).cost
    with pytest.raises(
        ConfigError, match=f"memory budget {needs[0] - 1} bytes: the smallest plan needs {needs[0]} bytes"
    ):
        budget_plan(masks, costs, sizes, fixed, needs[0] - 1)


@LAW
@given(instances())
def test_plan_bytes_counts_what_is_resident(instance):
    """One subnetwork for each that the exporter would write; the same one again is free."""
    masks, _, sizes = instance
    for plan in (Plan(bounds, 0.0) for bounds in every_plan(len(masks))):
        specs = {segment_spec(masks[i:j], None, None) for i, j in plan.segments}
        expected = 7 * len(specs)
        for spec in specs:
            expected += sum(sizes[b, 0, u] for b, units in enumerate(spec.heads) for u in units)
            expected += sum(sizes[b, 1, u] for b, units in enumerate(spec.groups) for u in units)
        assert plan_bytes(plan, masks, sizes, 7) == expected


@LAW
@given(instances(most_steps=12), st.integers(1, 5))
def test_union_with_gates_is_every_step(instance, most):
    """A segment's subnetwork holds all that its steps use; where it holds more than a step uses, that part is gated."""
    masks, costs, _ = instance
    for first, end in merged_plan(masks, costs, most).segments:
        spec = segment_spec(masks[first:end], None, None)
        for part, slots in enumerate((spec.heads, spec.groups)):
            for block, held in enumerate(slots):
                assert list(held) == sorted(set(held))
                used = [set(np.flatnonzero(mask[block, part])) for mask in masks[first:end]]
                assert set(held) == set().union(*used), "no unit that no step uses"
                assert ((block, part) in spec.gated) == any(units != set(held) for units in used)


def test_segments_that_gain_nothing_are_merged():
    """Wide, narrow, wide: two segments cost what one does, because either holds a wide step."""
    masks = np.array([[1, 1], [1, 0], [1, 1]], bool).reshape(3, 1, 1, 2)
    assert merged_plan(masks, np.ones((1, 1, 2)), 2).bounds == (0, 3)
    assert merged_plan(masks, np.ones((1, 1, 2)), 3).bounds == (0, 1, 2, 3)


def test_masks_that_never_change_need_one_segment():
    masks = np.ones((9, 1, 2, 3), bool)
    for plan in (merged_plan(masks, np.ones((1, 2, 3)), 4), per_step_plan(masks, np.ones((1, 2, 3)))):
        assert plan.bounds == (0, 9) and plan.cost == 54
    assert not segment_spec(masks, None, None).gated


def test_at_least_one_subnetwork():
    with pytest.raises(ConfigError, match="at most 0 subnetworks: a plan needs at least 1"):
        merged_plan(np.ones((2, 1, 2, 1), bool), np.ones((1, 2, 1)), 0)
