"""What calibrated precisions take from a calibration: scales of inputs, layers that stay in fp16, the smoothing."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from dydit.bundle.stored_weights import Precision
from dydit.calibrate.activation_ranges import ActivationRanges, require_segments
from dydit.checkpoints.checkpoint import Checkpoint
from dydit.errors import CalibrationError
from dydit.export.settings import ExportConfig
from dydit.export.weights import Copies
from dydit.models.architecture import UnitAxis
from dydit.models.config import ModelConfig
from dydit.planning.plan import Plan
from dydit.quantization.smoothing import Smoothing

LARGEST = {Precision.INT8_STATIC: 127.0, Precision.FP8: 448.0}
Scales = tuple[tuple[float | None, ...], ...]
"""Scales of the inputs of layers, by block and layer (`UnitAxis.layers`); None: the layer stays in fp16."""


def segment_scales(
    checkpoint: Checkpoint, config: ExportConfig, masks: np.ndarray, plan: Plan
) -> tuple[Scales, ...] | None:
    """Scales of each segment of a plan; None if the precision is not calibrated. `masks`: bool [S, U], by slot.

    Raises `CalibrationError` for a calibration without ranges, or of another checkpoint, run or plan.
    """
    if not config.precision.is_calibrated:
        return None
    if config.activations is None:
        calibration = config.calibration_for(checkpoint.sha256, checkpoint.config, masks, plan)
        calibration.require_searched(config.precision)
    ranges = _ranges(config)
    if ranges is None:
        raise CalibrationError(
            f"the calibration has no ranges of activations, which {config.precision} needs; run `dydit calibrate` with "
            "--activations minmax"
        )
    require_segments(ranges, len(plan.segments), checkpoint.config)
    scales = ranges.input_scales(LARGEST[config.precision])
    return tuple(
        tuple(
            tuple(None if in_fp16 else scale for scale, in_fp16 in zip(*block, strict=True))
            for block in zip(*segment, strict=True)
        )
        for segment in zip(scales, ranges.fp16_layers.tolist(), strict=True)
    )


def weight_copies(axis: UnitAxis, masks: np.ndarray, plan: Plan, scales: Sequence[Scales] | None) -> dict[str, Copies]:
    """Which stored copies of each layer's weight a plan uses, by name of the weight. `masks`: bool [S, U], by slot."""
    if scales is None:
        return {}
    copies = {}
    for part in axis.parts:
        used = [masks[first:end, part.units].any() for first, end in plan.segments]
        for layer in part.group.layers:
            index = axis.layer_names.index(layer.name)
            in_fp16 = [segment[part.block][index] is None for segment in itertools.compress(scales, used)]
            copies[part.stored(layer.weight)] = Copies(quantized=not all(in_fp16) or not in_fp16, fp16=any(in_fp16))
    return copies


def planned_smoothing(model: ModelConfig, config: ExportConfig) -> Smoothing | None:
    """The smoothing that the calibrated ranges were measured with; None if there is none.

    Raises `CalibrationError` if it does not fit the channels of the model.
    """
    ranges = _ranges(config) if config.precision.is_calibrated else None
    if ranges is None or ranges.smoothing is None:
        return None
    ranges.smoothing.require_fits(model)
    return ranges.smoothing


def _ranges(config: ExportConfig) -> ActivationRanges | None:
    if config.activations is None and config.calibration is not None:
        return config.calibration.activations
    return config.activations
