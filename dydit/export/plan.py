"""Grouping the sampling steps into few subnetworks at the least cost (DESIGN, decision 3). NumPy, no graphs.

A segment of consecutive steps runs on the subnetwork of the *union* of its masks. Its cost is

    cost(i, j) = (j - i) * sum_u c_u * [unit u is on in some step of i..j-1]

and the best plan with k segments follows from the best plans with k-1:

    best[k, j] = min over i < j of best[k-1, i] + cost(i, j)

so one table holds the optimum for every k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dydit.errors import ConfigError


@dataclass(frozen=True)
class Plan:
    """Segment boundaries (0 = b_0 < b_1 < ... < b_k = S) and the run's cost in multiply-adds an image."""

    bounds: tuple[int, ...]
    cost: float

    @property
    def segments(self) -> list[tuple[int, int]]:
        """Half-open ranges of steps."""
        return list(zip(self.bounds[:-1], self.bounds[1:], strict=True))


def segment_costs(masks: np.ndarray, unit_costs: np.ndarray) -> np.ndarray:
    """cost[i, j] for 0 <= i < j <= S, float64 [S, S+1], infinite elsewhere.

    `masks` bool [S, ...units], `unit_costs` [...units] multiply-adds a step that a unit adds.
    """
    steps = len(masks)
    flat, costs = masks.reshape(steps, -1), unit_costs.reshape(-1)
    table = np.full((steps, steps + 1), np.inf)
    for first in range(steps):
        union = np.logical_or.accumulate(flat[first:], axis=0)
        table[first, first + 1 :] = (union @ costs) * np.arange(1, steps - first + 1)
    return table


def optimal_plans(masks: np.ndarray, unit_costs: np.ndarray, most: int | None = None) -> list[Plan]:
    """The cheapest plan of exactly k segments, for k = 1 .. `most` (default S), by dynamic programming."""
    steps = len(masks)
    most = steps if most is None else min(most, steps)
    costs = segment_costs(masks, unit_costs)
    best, origin = costs[0][None, :], [np.zeros(steps + 1, np.int64)]
    for _ in range(1, most):
        candidates = best[-1][:steps, None] + costs  # [i, j]: the last segment is i..j
        cut = candidates.argmin(axis=0)
        best = np.vstack([best, candidates[cut, np.arange(steps + 1)]])
        origin.append(cut)
    return [Plan(_trace(origin, k, steps), float(best[k, steps])) for k in range(most)]


def _trace(origin: Sequence[np.ndarray], last: int, steps: int) -> tuple[int, ...]:
    bounds = [steps]
    for k in range(last, 0, -1):
        bounds.append(int(origin[k][bounds[-1]]))
    return (0, *reversed(bounds))


def per_step_plan(masks: np.ndarray, unit_costs: np.ndarray) -> Plan:
    """A new segment wherever the mask changes: every step runs exactly its own units."""
    flat = masks.reshape(len(masks), -1)
    changes = np.flatnonzero((flat[1:] != flat[:-1]).any(axis=1)) + 1
    return Plan((0, *map(int, changes), len(masks)), float((flat @ unit_costs.reshape(-1)).sum()))


def merged_plan(masks: np.ndarray, unit_costs: np.ndarray, most: int) -> Plan:
    """The cheapest plan with at most `most` segments; fewer where more would gain nothing.

    Raises `ConfigError` for `most` < 1.
    """
    if most < 1:
        raise ConfigError(f"at most {most} subnetworks: a plan needs at least 1")
    exact = per_step_plan(masks, unit_costs)
    if len(exact.segments) <= most:
        return exact
    return min(optimal_plans(masks, unit_costs, most), key=lambda plan: plan.cost)  # the first, so the fewest segments


def budget_plan(masks: np.ndarray, unit_costs: np.ndarray, unit_bytes: np.ndarray, fixed: int, budget: int) -> Plan:
    """The cheapest of the optimal plans whose distinct subnetworks fit in `budget` bytes when all are resident.

    `unit_bytes` [...units] bytes of a unit's weights, `fixed` bytes that every subnetwork needs besides. Raises
    `ConfigError` naming the smallest budget that any of the plans would need.
    """
    exact = per_step_plan(masks, unit_costs)
    plans = [*optimal_plans(masks, unit_costs, len(exact.segments)), exact]
    needed = [plan_bytes(plan, masks, unit_bytes, fixed) for plan in plans]
    fitting = [plan for plan, size in zip(plans, needed, strict=True) if size <= budget]
    if not fitting:
        raise ConfigError(
            f"memory budget {budget} bytes: the smallest plan needs {min(needed)} bytes; raise the budget"
        )
    return min(fitting, key=lambda plan: (plan.cost, len(plan.bounds)))


def plan_bytes(plan: Plan, masks: np.ndarray, unit_bytes: np.ndarray, fixed: int) -> int:
    """Bytes of the weights of a plan's distinct subnetworks, each counted once.

    The same units with and without gates are two subnetworks, as the exporter writes them.
    """
    unions = {}
    for first, end in plan.segments:
        union = masks[first:end].any(axis=0)
        gated = (masks[first:end] != union).any(axis=(0, -1))
        unions[union.tobytes(), gated.tobytes()] = union
    return sum(int((union * unit_bytes).sum()) + fixed for union in unions.values())
