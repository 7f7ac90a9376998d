"""How much memory plans take: what is shared is counted once, what is a subnetwork's own each time."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dydit.bundle.costs import Residency
from dydit.export.exporter import segment_spec
from dydit.export.plan import Plan
from dydit.export.sizes import PlanSizes
from dydit.export.weights import runs

NOTHING = {"backend": "x", "rows": 2, "deviation": 0.0, "margin": 0.0, "workspace": 0, "subnet": 0, "block": 0}
NOTHING |= {"mapped": 0.0, "joined": 0.0, "shared": 0.0}
FIXED = 7


@pytest.fixture
def drifting() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    masks = np.logical_xor.accumulate(rng.random((6, 2, 2, 5)) < 0.3, axis=0)
    return masks, rng.integers(1, 50, masks.shape[1:]).astype(float)


def every_plan(steps: int) -> list[Plan]:
    cuts = (c for k in range(steps) for c in itertools.combinations(range(1, steps), k))
    return [Plan((0, *cut, steps), 0.0) for cut in cuts]


def specs_of(plan: Plan, masks: np.ndarray) -> set:
    return {segment_spec(masks[i:j], None, None) for i, j in plan.segments}


def units_of(spec):
    """(block, part, slots, whether they stand side by side)"""
    for part, blocks in enumerate((spec.heads, spec.groups)):
        for block, slots in enumerate(blocks):
            yield block, part, list(slots), len(list(runs(slots))) <= 1


def test_weights_count_each_subnetwork_that_the_exporter_would_write(drifting):
    masks, sizes = drifting
    for plan in every_plan(len(masks)):
        specs = specs_of(plan, masks)
        expected = sum(sizes[b, p, slots].sum() for spec in specs for b, p, slots, _ in units_of(spec))
        assert PlanSizes(masks, sizes, FIXED).weights(plan) == expected + FIXED * len(specs)


@pytest.mark.parametrize(
    ("settings", "each"),
    [
        ({"workspace": 100}, lambda specs, sizes: 100),
        ({"workspace": 100, "margin": 0.5}, lambda specs, sizes: 150),
        ({"subnet": 10, "block": 1}, lambda specs, sizes: 12 * len(specs)),
        (
            {"mapped": 2.0},
            lambda specs, sizes: 2 * sum(sizes[b, p, u].sum() for s in specs for b, p, u, side in units_of(s) if side),
        ),
        (
            {"joined": 2.0},
            lambda specs, sizes: (
                2 * sum(sizes[b, p, u].sum() for s in specs for b, p, u, side in units_of(s) if not side)
            ),
        ),
        (
            {"shared": 1.0},
            lambda specs, sizes: (
                FIXED
                + sum(
                    sizes[unit]
                    for unit in {(b, p, u) for s in specs for b, p, units, side in units_of(s) if side for u in units}
                )
            ),
        ),
    ],
)
def test_resident_memory_is_as_described(drifting, settings, each):
    masks, sizes = drifting
    plan_sizes, residency = PlanSizes(masks, sizes, FIXED), Residency.model_validate({**NOTHING, **settings})
    for plan in every_plan(len(masks)):
        assert plan_sizes.resident(plan, residency) == each(specs_of(plan, masks), sizes)
