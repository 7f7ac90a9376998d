"""Token slots of each segment of a plan: those of a calibration, once it is known to be of this very export."""

from __future__ import annotations

import numpy as np

from dydit.bundle.manifest import Manifest, PlanKind, Routing
from dydit.calibrate.calibration_file import plan_sha256
from dydit.checkpoints.checkpoint import Checkpoint
from dydit.errors import CalibrationError, ConfigError
from dydit.export.settings import ExportConfig
from dydit.planning.plan import Plan

Capacities = tuple[int, ...]
"""MLP token slots of a row, by block."""


def keeps_every_token(manifest: Manifest) -> bool:
    """Whether capacity routing has a slot for every token wherever there is an MLP, so that it computes all of them."""
    if manifest.routing is not Routing.CAPACITY:
        return False
    axis = manifest.model.units
    slots = [
        capacity
        for entry in manifest.subnets
        for routed, capacity in zip(axis.routed_macs(axis.mask(entry.units)), entry.capacities or (), strict=False)
        if routed
    ]
    return all(capacity == manifest.model.tokens for capacity in slots)


def segment_capacities(
    checkpoint: Checkpoint, config: ExportConfig, masks: np.ndarray, plan: Plan
) -> tuple[Capacities, ...] | None:
    """Capacities of each segment of a plan over the masks bool [S, U], by slot; None without capacity routing.

    Those of the calibration, where there is one, else the same for all. With dynamic width, whose one graph has one
    capacity for each block, every segment gets the calibration's largest. Raises `ConfigError` for wrong capacities,
    and `CalibrationError`, naming what differs, for a calibration of another checkpoint, run or plan.
    """
    model, count = checkpoint.config, len(plan.segments)
    if config.calibration is not None and not model.dynamic:
        raise CalibrationError(f"{checkpoint.path} is a static model: it has no tokens to route by a calibration")
    if config.routing is not Routing.CAPACITY or not model.dynamic:
        return None
    if config.calibration is None:
        same = config.capacities or (model.tokens,) * model.depth
        if len(same) != model.depth or not all(1 <= c <= model.tokens for c in same):
            raise ConfigError(f"capacities {same}: expected {model.depth} numbers in 1..{model.tokens}")
        return (same,) * count
    config.calibration.require(checkpoint.sha256, config.steps, config.sampler, plan_sha256(plan.bounds, masks))
    tokens = config.calibration.tokens
    found, expected = (
        (len(tokens.capacities), len(tokens.largest), tokens.tokens),
        (count, model.depth, model.tokens),
    )
    if found != expected:
        raise CalibrationError(
            f"the calibration has capacities of (segments, blocks, tokens) {found}, expected {expected}: it was "
            "changed after it was written; calibrate again"
        )
    return (tokens.largest,) * count if config.plan is PlanKind.DYNAMIC_WIDTH else tokens.capacities
