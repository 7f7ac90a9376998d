"""The `activations` of a calibration: the range of what enters every linear layer, for each segment of a plan.

Ranges drift with the timestep, so each segment has its own; how one is chosen from what was counted is
`dydit.calibrate.range_methods`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import AliasChoices, Field, FiniteFloat, SerializerFunctionWrapHandler, model_serializer, model_validator

from dydit.calibrate.histogram import Histogram
from dydit.calibrate.range_methods import Method, Threshold, choose
from dydit.errors import CalibrationError
from dydit.models.config import ModelConfig, Strict
from dydit.quantization.smoothing import Smoothing

_ABSENT_WHILE_NONE = ("in_16_bits", "smoothing", "migration")  # fields that files without them do not have


class ActivationRanges(Strict):
    """Thresholds t of [-t, t] by segment, block and layer (`UnitAxis.layers`); the shares of values outside them, too.

    A layer that nothing entered (a block without heads, groups or routed tokens) has the threshold 0. `in_16_bits`:
    which layers are not to be in 8 bits, in the same order; absent: all are. With a `smoothing`, ranges are those of
    smoothed inputs, and hold with weights that are smoothed too.
    """

    method: Method
    percentile: float | None = Field(default=None, gt=0, le=1, description="for that method")
    images: int = Field(ge=1)
    thresholds: tuple[tuple[tuple[FiniteFloat, ...], ...], ...]
    clipped: tuple[tuple[tuple[FiniteFloat, ...], ...], ...]
    in_16_bits: tuple[tuple[tuple[bool, ...], ...], ...] | None = None
    smoothing: Smoothing | None = Field(
        default=None,
        validation_alias=AliasChoices("smoothing", "migration"),
        serialization_alias="migration",  # the key in the calibration file
    )

    @model_serializer(mode="wrap")
    def _without_what_is_absent(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        return {name: value for name, value in values.items() if value is not None or name not in _ABSENT_WHILE_NONE}

    @model_validator(mode="after")
    def _consistent(self) -> ActivationRanges:
        depths = {len(blocks) for blocks in self.thresholds}
        layers = {len(block) for blocks in self.thresholds for block in blocks}
        if len(depths) != 1 or len(layers) != 1 or 0 in layers:
            raise ValueError("every segment has the same blocks, each with a value for the same layers")
        if [[len(block) for block in blocks] for blocks in self.clipped] != [
            [len(block) for block in blocks] for blocks in self.thresholds
        ]:
            raise ValueError("thresholds and clipped shares do not belong together")
        if any(value < 0 for blocks in self.thresholds for block in blocks for value in block):
            raise ValueError("a threshold is negative")
        if self.in_16_bits is not None and self.kept.shape != self.shape:
            raise ValueError("which layers stay in 16 bits does not belong to the thresholds")
        if self.smoothing is not None and {len(self.smoothing.blocks)} != depths:
            raise ValueError("the smoothing is not of the same blocks")
        return self

    def input_scales(self, largest: float) -> list[tuple[tuple[float, ...], ...]]:
        """The scale of each layer's input, by segment: t/`largest` (127 of int8, 448 of E4M3), and 1 where t is 0."""
        return [
            tuple(tuple(float(np.float32(value / largest)) if value else 1.0 for value in block) for block in blocks)
            for blocks in self.thresholds
        ]

    @property
    def kept(self) -> np.ndarray:
        """Which layers stay in 16 bits, bool [segments, L, layers]."""
        if self.in_16_bits is None:
            return np.zeros(self.shape, bool)
        lengths = {len(block) for blocks in self.in_16_bits for block in blocks}
        depths = {len(blocks) for blocks in self.in_16_bits}
        return np.array(self.in_16_bits, bool) if len(lengths) == len(depths) == 1 else np.empty(0, bool)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(segments, blocks, layers of a block)."""
        return len(self.thresholds), len(self.thresholds[0]), len(self.thresholds[0][0])


class Observations:
    """Histograms of what entered each layer of a block, by segment: [segments][L][layers]; empty at first."""

    def __init__(self, segments: int, depth: int, layers: Sequence[str]):
        self.layers = tuple(layers)
        self.histograms = [[[Histogram() for _ in layers] for _ in range(depth)] for _ in range(segments)]

    def add(self, segment: int, block: int, layer: str, values: np.ndarray) -> None:
        """Count values, of any shape. Raises `CalibrationError` naming the layer where one is not finite."""
        try:
            self.histograms[segment][block][self.layers.index(layer)].add(values)
        except CalibrationError as error:
            raise CalibrationError(f"segment {segment}, block {block}, {layer}: {error}") from error

    def merge(self, other: Observations) -> None:
        """Add what another one counted, on the same plan."""
        for ours, theirs in zip(self.flat(), other.flat(), strict=True):
            ours.merge(theirs)

    def flat(self) -> list[Histogram]:
        """All histograms, by segment, block and layer."""
        return [each for blocks in self.histograms for block in blocks for each in block]

    def together(self) -> Observations:
        """All segments counted as one: what a single global scale is chosen from."""
        depth = len(self.histograms[0])
        one = Observations(1, depth, self.layers)
        for blocks in self.histograms:
            for block, layers in enumerate(blocks):
                for layer, histogram in enumerate(layers):
                    one.histograms[0][block][layer].merge(histogram)
        return one

    def choose(self, method: Method, images: int, percentile: float | None = None) -> ActivationRanges:
        """Thresholds of all, `percentile` (0.9999 by default) for that method.

        Raises `CalibrationError` where nothing was counted at all, or a tensor's values allow no range.
        """
        if not any(each.total for each in self.flat()):
            raise CalibrationError("no activations were observed; sample more images")
        share = 0.9999 if percentile is None else percentile
        chosen = [
            [[_of(histogram, method, share) for histogram in block] for block in blocks] for blocks in self.histograms
        ]
        return ActivationRanges(
            method=method,
            percentile=share if method is Method.PERCENTILE else None,
            images=images,
            thresholds=tuple(tuple(tuple(each.value for each in block) for block in blocks) for blocks in chosen),
            clipped=tuple(tuple(tuple(each.clipped for each in block) for block in blocks) for blocks in chosen),
        )


def _of(histogram: Histogram, method: Method, percentile: float) -> Threshold:
    """A layer's threshold; 0 where nothing entered it, or zeros alone, as gates leave them."""
    if not histogram.most > 0:
        return Threshold(0.0, 0.0, 0.0)
    return choose(histogram, method, percentile)


def spread(ranges: ActivationRanges) -> np.ndarray:
    """How far a layer's ranges part over the segments: largest over least threshold, f64 [L, layers]; 1: unused."""
    values = np.asarray(ranges.thresholds)
    used = values > 0
    least = np.where(used, values, math.inf).min(0)
    return np.where(used.any(0), values.max(0) / np.where(np.isfinite(least), least, 1), 1.0)


def repeat(ranges: ActivationRanges, segments: int) -> ActivationRanges:
    """The ranges of one segment, for all of `segments`: a global scale in the form of a plan's."""
    if ranges.shape[0] != 1:
        raise CalibrationError(f"{ranges.shape[0]} segments cannot be repeated; expected 1")
    kept = None if ranges.in_16_bits is None else ranges.in_16_bits * segments
    repeated = {"thresholds": ranges.thresholds * segments, "clipped": ranges.clipped * segments, "in_16_bits": kept}
    return ranges.model_copy(update=repeated)


def require_segments(ranges: ActivationRanges, segments: int, model: ModelConfig) -> None:
    """Raise `CalibrationError` where ranges are not of a plan of so many segments of a model's layers."""
    expected = (segments, model.depth, len(model.units.layers))
    if ranges.shape != expected:
        raise CalibrationError(
            f"the calibration is of {ranges.shape[0]} segments of {ranges.shape[1]} blocks of {ranges.shape[2]} "
            f"layers, this plan has {expected[0]} of {expected[1]} of {expected[2]}; calibrate with the plan that is "
            "exported"
        )
