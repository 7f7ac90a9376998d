"""Token slots of each segment of a plan: those of a calibration, once it is known to be of this very export."""

from __future__ import annotations

import numpy as np

from dydit.calibrate.file import Calibration, plan_sha256
from dydit.diffusion.schedule import Sampler
from dydit.errors import CalibrationError, ConfigError
from dydit.export.plan import Plan
from dydit.models.checkpoint import Checkpoint
from dydit.models.config import ModelConfig

Capacities = tuple[int, ...]
"""MLP token slots of a row, by block."""


def uniform_capacities(model: ModelConfig, plan: Plan, same: Capacities | None) -> tuple[Capacities, ...]:
    """The same capacities for every segment, by default a slot for every token. Raises `ConfigError` for wrong ones."""
    chosen = same or (model.tokens,) * model.depth
    if len(chosen) != model.depth or not all(1 <= c <= model.tokens for c in chosen):
        raise ConfigError(f"capacities {chosen}: expected {model.depth} numbers in 1..{model.tokens}")
    return (chosen,) * len(plan.segments)


def calibrated_capacities(
    checkpoint: Checkpoint, sampler: Sampler, masks: np.ndarray, plan: Plan, calibration: Calibration, one_graph: bool
) -> tuple[Capacities, ...]:
    """The calibration's capacities by segment, `masks` bool [S, L, 2, H] by slot being those of the plan.

    With `one_graph` for all segments, which has one capacity for each block, every segment gets the largest. Raises
    `CalibrationError`, naming what differs, where the calibration is of another checkpoint, run or plan.
    """
    model, segments = checkpoint.config, len(plan.segments)
    if not model.dynamic:
        raise CalibrationError(f"{checkpoint.path} is a static model: it has no tokens to route by a calibration")
    calibration.require(checkpoint.sha256, len(masks), sampler, plan_sha256(plan.bounds, masks))
    tokens = calibration.tokens
    found, expected = (
        (len(tokens.capacities), len(tokens.largest), tokens.tokens),
        (segments, model.depth, model.tokens),
    )
    if found != expected:
        raise CalibrationError(
            f"the calibration has capacities of (segments, blocks, tokens) {found}, expected {expected}: it was "
            "changed after it was written; calibrate again"
        )
    return (tokens.largest,) * segments if one_graph else tokens.capacities
