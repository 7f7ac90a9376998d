"""What a step on a subnetwork costs, for the planner: multiply-adds by formula, or milliseconds by a measured fit."""

from __future__ import annotations

import numpy as np

from dydit.bundle.measurements import Measured, MeasuredPlan, StepTimes
from dydit.models.config import ModelConfig
from dydit.models.macs import unit_costs
from dydit.planning.plan import Plan, PlanCosts, per_step_plan, plan_cost
from dydit.planning.sizes import PlanSizes


def macs_costs(config: ModelConfig) -> PlanCosts:
    """Multiply-adds of the blocks for one image, with all tokens."""
    return PlanCosts(config.units, unit_costs(config))


def time_costs(times: StepTimes, config: ModelConfig) -> PlanCosts:
    """Milliseconds of a step of a whole batch, by the formula of `StepTimes`."""
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
    """The costs of a plan by the fits that were measured for it; None if nothing was measured."""
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
