"""Fits costs to the measurements of a profile, by least squares with non-negative coefficients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

import numpy as np

from dydit.bundle.measurements import GroupTimes, Residency, StepTimes
from dydit.bundle.stored_weights import Precision
from dydit.errors import ConfigError
from dydit.models.config import ModelConfig
from dydit.planning.plan import Plan
from dydit.planning.profile_points import Point, of_depth
from dydit.planning.sizes import PlanSizes, fixed_bytes, unit_bytes

WORKSPACES, MARGIN = 3, 0.1
"""A factor on the workspace of a step, and a margin on the fit, because the heap keeps some of the freed memory."""
RESIDENCY_TERMS = ("subnet", "block", "mapped", "joined", "shared")


def non_negative(columns: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The least-squares solution of `columns @ terms = values` among those without a negative term.

    `columns` [points, terms], `values` [points]; returns [terms]. Columns may differ by many orders of magnitude.
    """
    from scipy.optimize import nnls

    scale = np.maximum(np.abs(columns).max(axis=0), 1e-300)
    terms, _ = nnls(columns / scale, values)
    return np.asarray(terms / scale)


def fit_times(
    points: Sequence[Point],
    groups: Sequence[str],
    ms: Sequence[Sequence[float]],
    *,
    backend: str,
    rows: int,
    threads: int,
    token_share: float,
) -> StepTimes:
    """Fit times to the medians of each point's rounds, in milliseconds. Relative deviations are minimized.

    `ms`: milliseconds of each point, by round. `groups`: names of the unit groups. `backend`, `rows`, `threads` and
    `token_share`: the conditions of the measurement. Raises `ConfigError` if times do not grow with width.
    """
    columns = np.array([_time_terms(point) for point in points], np.float64)
    medians = np.array([np.median(rounds) for rounds in ms])
    terms = non_negative(columns / medians[:, None], np.ones(len(medians)))
    fixed, block, *each = terms.tolist()
    times = {name: {"any": each[2 * index], "unit": each[2 * index + 1]} for index, name in enumerate(groups)}
    for name, cost in times.items():
        if cost["unit"] <= 0:
            raise ConfigError(
                f"the times measured here do not grow with the number of {name} (a busy machine, or a very small "
                "model), so no plan can be based on them; try again, or use --cost macs"
            )
    deviation = float(np.abs(columns @ terms / medians - 1).max())
    return StepTimes(
        backend=backend,
        rows=rows,
        threads=threads,
        token_share=token_share,
        fixed=fixed,
        block=block,
        groups={name: GroupTimes(**cost) for name, cost in times.items()},
        deviation=deviation,
    )


def _time_terms(point: Point) -> list[int]:
    """The terms of a time: 1, the blocks, and for each unit group whether any unit is on and how many are."""
    each = [term for count in point.counts for term in (count > 0, count)]
    return [1, point.depth, *(point.depth * term for term in each)]


def fit_residency(
    points: Sequence[Point],
    model: ModelConfig,
    precision: Precision,
    settled: Sequence[int],
    workspace: int,
    *,
    backend: str,
    rows: int,
) -> Residency:
    """Fit memory to the growth of the process, in bytes, while the points were loaded in turn. The first is left out.

    `settled`: bytes of the process after each point. `workspace`: the most bytes that a step takes while it runs.
    """
    columns = np.diff(_loaded_terms(points, model, precision), axis=0)
    grown = np.diff(np.asarray(settled, np.float64))
    terms = non_negative(columns, grown)
    deviation = np.abs(np.cumsum(columns @ terms - grown)).max() / max(float(np.abs(grown).sum()), 1.0)
    subnet, block, mapped, joined, shared = terms.tolist()
    return Residency(
        backend=backend,
        rows=rows,
        workspace=WORKSPACES * workspace,
        subnet=math.ceil(subnet),
        block=math.ceil(block),
        mapped=mapped,
        joined=joined,
        shared=shared,
        deviation=float(deviation),
        margin=MARGIN,
    )


def _loaded_terms(points: Sequence[Point], model: ModelConfig, precision: Precision) -> np.ndarray:
    """What is loaded after each point, [points, terms]: subnetworks, blocks, bytes mapped, joined and shared."""
    rows, before = [], np.zeros(len(RESIDENCY_TERMS))
    for depth, group in groupby(points, key=lambda point: point.depth):
        cut = of_depth(model, depth)
        unit_sizes, fixed = unit_bytes(cut, precision), fixed_bytes(cut, precision)
        units, row = np.zeros(unit_sizes.shape, bool), before
        for point in group:
            masks = point.masks(model)
            (subnet,) = PlanSizes(cut.units, masks, unit_sizes, fixed).subnets(Plan((0, len(masks)), 0.0))
            units |= subnet.mapped_units
            row = row + np.array([1, depth, subnet.mapped, subnet.joined, 0.0])
            row[-1] = before[-1] + (units * unit_sizes).sum() + fixed
            rows.append(row)
        before = row
    return np.array(rows)
