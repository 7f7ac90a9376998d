"""How much memory plans take: what is shared is counted once, what is a subnetwork's own each time."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest

from dydit.bundle.measurements import Residency
from dydit.export.exporter import segment_spec
from dydit.graph.sources import runs
from dydit.graph.writer import SubnetSpec
from dydit.models.architecture import UnitAxis
from dydit.planning.plan import Plan
from dydit.planning.sizes import PlanSizes

NOTHING = {"backend": "x", "rows": 2, "deviation": 0.0, "margin": 0.0, "workspace": 0, "subnet": 0, "block": 0}
NOTHING |= {"mapped": 0.0, "joined": 0.0, "shared": 0.0}
FIXED = 7


Drifting = tuple[UnitAxis, np.ndarray, np.ndarray]


@pytest.fixture(params=[[[5, 5], [5, 5]], [[2, 7], [4, 3]], [[1], [9]]], ids=["even", "uneven", "one-group"])
def drifting(make_axis, request) -> Drifting:
    """An axis, masks bool [S, U] and bytes of its units."""
    axis, rng = make_axis(request.param), np.random.default_rng(5)
    masks = np.logical_xor.accumulate(rng.random((6, axis.size)) < 0.3, axis=0)
    return axis, masks, rng.integers(1, 50, axis.size).astype(float)


def every_plan(steps: int) -> list[Plan]:
    cuts = (c for k in range(steps) for c in itertools.combinations(range(1, steps), k))
    return [Plan((0, *cut, steps), 0.0) for cut in cuts]


def specs_of(plan: Plan, axis: UnitAxis, masks: np.ndarray) -> set:
    return {segment_spec(axis, masks[i:j], None, None) for i, j in plan.segments}


def units_of(axis: UnitAxis, spec: SubnetSpec):
    """(places on the axis of a part's slots, whether they stand side by side)"""
    for part, slots in axis.zip(spec.units):
        yield [part.start + slot for slot in slots], len(list(runs(slots))) <= 1


@dataclass(frozen=True)
class Bytes:
    """Of a plan's subnetworks: how many these are, bytes that they map and join, and that any of them maps."""

    subnets: int
    mapped: float
    joined: float
    shared: float


def bytes_of(plan: Plan, axis: UnitAxis, masks: np.ndarray, sizes: np.ndarray) -> Bytes:
    specs = specs_of(plan, axis, masks)
    units = [each for spec in specs for each in units_of(axis, spec)]
    mapped, joined = (
        sum(sizes[places].sum() for places, solid in units if solid == wanted) for wanted in (True, False)
    )
    shared = sizes[sorted({place for places, solid in units if solid for place in places})].sum()
    return Bytes(len(specs), mapped, joined, FIXED + shared)


def test_weights_count_each_subnetwork_that_the_exporter_would_write(drifting):
    axis, masks, sizes = drifting
    for plan in every_plan(len(masks)):
        expected = bytes_of(plan, axis, masks, sizes)
        assert PlanSizes(axis, masks, sizes, FIXED).weights(plan) == (
            expected.mapped + expected.joined + FIXED * expected.subnets
        )


@pytest.mark.parametrize(
    ("settings", "each"),
    [
        ({"workspace": 100}, lambda found: 100),
        ({"workspace": 100, "margin": 0.5}, lambda found: 150),
        ({"subnet": 10, "block": 1}, lambda found: 12 * found.subnets),
        ({"mapped": 2.0}, lambda found: 2 * found.mapped),
        ({"joined": 2.0}, lambda found: 2 * found.joined),
        ({"shared": 1.0}, lambda found: found.shared),
    ],
)
def test_resident_memory_is_as_described(drifting, settings, each):
    axis, masks, sizes = drifting
    plan_sizes, residency = PlanSizes(axis, masks, sizes, FIXED), Residency.model_validate({**NOTHING, **settings})
    for plan in every_plan(len(masks)):
        assert plan_sizes.resident(plan, residency) == each(bytes_of(plan, axis, masks, sizes))


def test_parts_that_touch_on_the_axis_are_two(make_axis):
    """The last unit of a part and the first of the next are neighbours there, and not in the file."""
    axis = make_axis([[2, 2]])
    for mask, joined in (([0, 1, 1, 0], 0), ([1, 1, 1, 1], 0), ([0, 1, 0, 1], 0)):
        (subnet,) = PlanSizes(axis, np.array([mask], bool), np.ones(4), 0).subnets(Plan((0, 1), 0.0))
        assert (subnet.mapped, subnet.joined) == (sum(mask), joined)
    (subnet,) = PlanSizes(make_axis([[3, 1]]), np.array([[1, 0, 1, 1]], bool), np.ones(4), 0).subnets(Plan((0, 1), 0.0))
    assert (subnet.mapped, subnet.joined) == (1, 2)
