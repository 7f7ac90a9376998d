"""Token slots of each segment of a plan, from a calibration that is checked to belong to this export."""

from __future__ import annotations

import numpy as np

from dydit.bundle.manifest import Manifest, PlanKind, Routing
from dydit.checkpoints.checkpoint import Checkpoint
from dydit.errors import CalibrationError, ConfigError
from dydit.export.settings import ExportConfig
from dydit.planning.plan import Plan

Capacities = tuple[int, ...]
"""MLP token slots per row, by block."""


def keeps_every_token(manifest: Manifest) -> bool:
    """Whether capacity routing has a slot for every token in every block that has MLP units, so it drops no token."""
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
    """Capacities of each segment of a plan; None without capacity routing. `masks`: bool [S, U], by slot.

    They come from the calibration if there is one; otherwise all segments have the same. With dynamic width, whose one
    graph has one capacity per block, every segment gets the calibration's largest. Raises `ConfigError` for wrong
    capacities, and `CalibrationError`, naming what differs, for a calibration of another checkpoint, run or plan.
    """
    model, count = checkpoint.config, len(plan.segments)
    if config.calibration is not None and not model.dynamic:
        raise CalibrationError(f"{checkpoint.path} is a static model: it routes no tokens, so it takes no calibration")
    if config.routing is not Routing.CAPACITY or not model.dynamic:
        return None
    if config.calibration is None:
        capacities = config.capacities or (model.tokens,) * model.depth
        if len(capacities) != model.depth or not all(1 <= c <= model.tokens for c in capacities):
            raise ConfigError(f"capacities {capacities}: expected {model.depth} numbers in 1..{model.tokens}")
        return (capacities,) * count
    tokens = config.calibration_for(checkpoint.sha256, model, masks, plan).tokens
    sizes = len(tokens.capacities), len(tokens.largest), tokens.tokens
    expected = count, model.depth, model.tokens
    if sizes != expected:
        raise CalibrationError(
            f"the calibration has capacities for (segments, blocks, tokens) {sizes}, expected {expected}: it was "
            "changed after it was written; calibrate again"
        )
    return (tokens.largest,) * count if config.plan is PlanKind.DYNAMIC_WIDTH else tokens.capacities
