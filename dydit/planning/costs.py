"""What a subnetwork's step costs, for the planner: multiply-adds by formula, milliseconds by a measured fit."""

from __future__ import annotations

import numpy as np

from dydit.bundle.measurements import Measured, MeasuredPlan, StepTimes
from dydit.models.config import ModelConfig
from dydit.models.macs import unit_costs
from dydit.planning.plan import Plan, PlanCosts, per_step_plan, plan_cost
from dydit.planning.sizes import PlanSizes


def macs_costs(config: ModelConfig) -> PlanCosts:
    """Multiply-adds of an image's blocks, every token counted."""
    return PlanCosts(config.units, unit_costs(config))


def time_costs(times: StepTimes, config: ModelConfig) -> PlanCosts:
    """Milliseconds of a batch, as `StepTimes` describes."""
    axis = config.units
    groups = [times.groups[part.group.name] for part in axis.parts]
    return PlanCosts(
        axis,
        axis.spread(np.array([each.unit for each in groups])),
        np.array([each.any for each in groups]),
        times.fixed + config.depth * times.block,
    )


def measured_plan(
    plan: Plan, masks: np.ndarray, config: ModelConfig, sizes: PlanSizes, measured: Measured
) -> MeasuredPlan | None:
    """What a plan comes to by what was measured for it; None where nothing was."""
    times, residency = measured.times, measured.residency
    values: dict[str, float | int] = {}
    if times is not None:
        costs = time_costs(times, config)
        values["ms"] = plan_cost(plan, masks, costs)
        values["per_step_ms"] = per_step_plan(masks, costs).cost
        values["static_ms"] = len(masks) * costs.static
    if residency is not None:
        values["resident_bytes"] = sizes.resident(plan, residency)
    return MeasuredPlan.model_validate({"times": times, "residency": residency, **values}) if values else None
