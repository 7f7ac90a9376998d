"""Groups the sampling steps into few subnetworks at the least cost. NumPy only.

A segment of consecutive steps runs on the subnetwork of the *union* of its masks. Its cost is

    cost(i, j) = (j - i) * step(union of the masks of i..j-1)

where `PlanCosts` says what a step costs, in multiply-adds or milliseconds. The best plan with k segments follows from
the best plans with k-1 segments:

    best[k, j] = min over i < j of best[k-1, i] + cost(i, j)

so one table contains the optimum for every k.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dydit.errors import ConfigError
from dydit.models.architecture import UnitAxis


@dataclass(frozen=True, eq=False)
class PlanCosts:
    """What a step costs, in multiply-adds or milliseconds. No cost is negative.

    `units` [U]: the cost of each unit of the subnetwork. `parts` [P]: the cost of each unit group of a block that has
    any unit in the subnetwork. `fixed`: the cost of every step.
    """

    axis: UnitAxis
    units: np.ndarray
    parts: np.ndarray | None = None
    fixed: float = 0.0

    @property
    def static(self) -> float:
        """The cost of a step with everything on."""
        return float(self.of(np.ones((1, self.units.size), bool))[0])

    def of(self, unions: np.ndarray) -> np.ndarray:
        """The cost [n] of a step on each of n subnetworks, whose units are `unions`, bool [n, U]."""
        costs: np.ndarray = self.fixed + unions @ self.units
        if self.parts is not None:
            costs += self.axis.any(unions) @ self.parts
        return costs


@dataclass(frozen=True)
class Plan:
    """Segment bounds (0 = b_0 < b_1 < ... < b_k = S), and the cost of the run, in the unit of the `PlanCosts`."""

    bounds: tuple[int, ...]
    cost: float

    @property
    def segments(self) -> list[tuple[int, int]]:
        """The segments as half-open ranges of steps."""
        return list(zip(self.bounds[:-1], self.bounds[1:], strict=True))


def segment_costs(masks: np.ndarray, costs: PlanCosts) -> np.ndarray:
    """cost[i, j] of the segment i..j-1, float64 [S, S+1], infinite unless i < j. `masks`: bool [S, U]."""
    steps = len(masks)
    table = np.full((steps, steps + 1), np.inf)
    for first in range(steps):
        union = np.logical_or.accumulate(masks[first:], axis=0)
        table[first, first + 1 :] = costs.of(union) * np.arange(1, steps - first + 1)
    return table


def plan_cost(plan: Plan, masks: np.ndarray, costs: PlanCosts) -> float:
    """The cost of a run on a plan's segments, by other costs than those that the plan was chosen by."""
    unions = [np.logical_or.reduce(masks[i:j], axis=0, keepdims=True) for i, j in plan.segments]
    return float(sum(costs.of(union)[0] * (j - i) for union, (i, j) in zip(unions, plan.segments, strict=True)))


def optimal_plans(masks: np.ndarray, costs: PlanCosts, most: int | None = None) -> list[Plan]:
    """The cheapest plan of exactly k segments, for k = 1 .. `most` (default S), by dynamic programming."""
    steps = len(masks)
    most = steps if most is None else min(most, steps)
    table = segment_costs(masks, costs)
    best, origin = table[0][None, :], [np.zeros(steps + 1, np.int64)]
    for _ in range(1, most):
        candidates = best[-1][:steps, None] + table  # [i, j]: the last segment is i..j
        cut = candidates.argmin(axis=0)
        best = np.vstack([best, candidates[cut, np.arange(steps + 1)]])
        origin.append(cut)
    return [Plan(_trace(origin, k, steps), float(best[k, steps])) for k in range(most)]


def _trace(origin: Sequence[np.ndarray], last: int, steps: int) -> tuple[int, ...]:
    bounds = [steps]
    for k in range(last, 0, -1):
        bounds.append(int(origin[k][bounds[-1]]))
    return (0, *reversed(bounds))


def per_step_plan(masks: np.ndarray, costs: PlanCosts) -> Plan:
    """The plan with a new segment at every change of the mask: every step runs exactly its own units."""
    changes = np.flatnonzero((masks[1:] != masks[:-1]).any(axis=1)) + 1
    return Plan((0, *map(int, changes), len(masks)), float(costs.of(masks).sum()))


def merged_plan(masks: np.ndarray, costs: PlanCosts, most: int) -> Plan:
    """The cheapest plan with at most `most` segments, and among equally cheap plans the one with the fewest.

    Raises `ConfigError` for `most` < 1.
    """
    if most < 1:
        raise ConfigError(f"the largest number of subnetworks is {most}; expected at least 1")
    exact = per_step_plan(masks, costs)
    if len(exact.segments) <= most:
        return exact
    # Of equally cheap plans, `min` returns the first, which has the fewest segments.
    return min(optimal_plans(masks, costs, most), key=lambda plan: plan.cost)


def budget_plan(masks: np.ndarray, costs: PlanCosts, needed: Callable[[Plan], int], budget: int) -> Plan:
    """The cheapest of the optimal plans that need no more than `budget` bytes.

    `needed`: bytes of memory with all of a plan's subnetworks loaded; see `dydit.planning.sizes`. Raises `ConfigError`,
    which names the smallest budget that any of the plans would fit.
    """
    exact = per_step_plan(masks, costs)
    plans = [*optimal_plans(masks, costs, len(exact.segments)), exact]
    sizes = [needed(plan) for plan in plans]
    fitting = [plan for plan, size in zip(plans, sizes, strict=True) if size <= budget]
    if not fitting:
        raise ConfigError(f"memory budget {budget} bytes: the smallest plan needs {min(sizes)} bytes; raise the budget")
    return min(fitting, key=lambda plan: (plan.cost, len(plan.bounds)))
