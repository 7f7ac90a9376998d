"""What calibrated precisions have of activations: scales of what enters linear layers, by segment; a migration."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dydit.bundle.stored import Precision
from dydit.calibrate.activations import ActivationRanges, require_segments
from dydit.calibrate.file import plan_sha256
from dydit.errors import CalibrationError
from dydit.export.plan import Plan
from dydit.models.checkpoint import Checkpoint
from dydit.models.config import ModelConfig
from dydit.models.migration import Migration

if TYPE_CHECKING:
    from dydit.export.exporter import ExportConfig

LARGEST = {Precision.INT8_STATIC: 127.0, Precision.FP8: 448.0}
Scales = tuple[tuple[float, ...], ...]
"""By block, of what enters its `dydit.calibrate.activations.LAYERS`."""


def segment_scales(
    checkpoint: Checkpoint, config: ExportConfig, masks: np.ndarray, plan: Plan
) -> tuple[Scales, ...] | None:
    """Scales of each segment of a plan over the masks bool [S, L, 2, H], by slot; None where nothing is calibrated.

    Raises `CalibrationError` for a calibration without ranges, or of another checkpoint, run or plan.
    """
    if not config.precision.is_calibrated:
        return None
    if config.activations is None:
        assert config.calibration is not None
        config.calibration.require(checkpoint.sha256, config.steps, config.sampler, plan_sha256(plan.bounds, masks))
    ranges = _ranges(config)
    if ranges is None:
        raise CalibrationError(
            f"the calibration has no ranges of activations, which {config.precision} needs; run `dydit calibrate` with "
            "--activations minmax"
        )
    require_segments(ranges, len(plan.segments), checkpoint.config.depth)
    return tuple(ranges.input_scales(LARGEST[config.precision]))


def planned_migration(model: ModelConfig, config: ExportConfig) -> Migration | None:
    """The migration that the ranges of a calibrated precision go with, where there is one.

    Raises `CalibrationError` for one of another model's channels.
    """
    ranges = _ranges(config) if config.precision.is_calibrated else None
    if ranges is None or ranges.migration is None:
        return None
    ranges.migration.require_fits(model)
    return ranges.migration


def _ranges(config: ExportConfig) -> ActivationRanges | None:
    if config.activations is None and config.calibration is not None:
        return config.calibration.activations
    return config.activations
