"""The `activations` of a calibration: the range of the inputs of every linear layer, for each segment of a plan.

Ranges change with the timestep, so each segment has its own. `dydit.calibrate.range_methods` chooses them from
histograms.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import AliasChoices, Field, FiniteFloat, SerializerFunctionWrapHandler, model_serializer, model_validator

from dydit.calibrate.histogram import Histogram
from dydit.calibrate.range_methods import Method, Threshold, choose
from dydit.errors import CalibrationError
from dydit.models.config import ModelConfig
from dydit.quantization.smoothing import Smoothing
from dydit.validation import Strict
from dydit.words import counted

_ABSENT_WHILE_NONE = ("in_16_bits", "smoothing", "migration")  # left out of the file while they are None


def lengths_of(values: Sequence[Sequence[Sequence[Any]]]) -> list[list[int]]:
    """The lengths of the innermost sequences."""
    return [[len(block) for block in blocks] for blocks in values]


class ActivationRanges(Strict):
    """Thresholds t of the ranges [-t, t] by segment, block and layer (`UnitAxis.layers`), and the clipped shares.

    `clipped`: the share of values outside the range. A layer without inputs (a block without heads, groups or routed
    tokens) has the threshold 0. `in_16_bits`: which layers stay in 16 bits, in the same order; None: no layer does.
    `smoothing`: the ranges are those of smoothed inputs and apply to smoothed weights.
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
            raise ValueError("every segment must have the same blocks, each with a value for the same layers")
        if lengths_of(self.clipped) != lengths_of(self.thresholds):
            raise ValueError("thresholds and clipped shares have different shapes")
        if any(value < 0 for blocks in self.thresholds for block in blocks for value in block):
            raise ValueError("a threshold is negative")
        if self.in_16_bits is not None and self.fp16_layers.shape != self.shape:
            raise ValueError("in_16_bits and thresholds have different shapes")
        if self.smoothing is not None and {len(self.smoothing.blocks)} != depths:
            raise ValueError("the smoothing and the thresholds have different numbers of blocks")
        return self

    def input_scales(self, largest: float) -> list[tuple[tuple[float, ...], ...]]:
        """The scale of the input of each layer, by segment: t/`largest` (127 for int8, 448 for E4M3), or 1 where t is
        0."""
        return [
            tuple(tuple(float(np.float32(value / largest)) if value else 1.0 for value in block) for block in blocks)
            for blocks in self.thresholds
        ]

    @property
    def fp16_layers(self) -> np.ndarray:
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
    """Histograms of the inputs of each layer, [segments][L][layers]; empty at first."""

    def __init__(self, segments: int, depth: int, layers: Sequence[str]):
        self.layers = tuple(layers)
        self.histograms = [[[Histogram() for _ in layers] for _ in range(depth)] for _ in range(segments)]

    def add(self, segment: int, block: int, layer: str, values: np.ndarray) -> None:
        """Count values of any shape. Raises `CalibrationError`, naming the layer, if one is not finite."""
        try:
            self.histograms[segment][block][self.layers.index(layer)].add(values)
        except CalibrationError as error:
            raise CalibrationError(f"segment {segment}, block {block}, {layer}: {error}") from error

    def flat(self) -> list[Histogram]:
        """All histograms, by segment, block and layer."""
        return [each for blocks in self.histograms for each in itertools.chain(*blocks)]

    def together(self) -> Observations:
        """The observations with all segments as one, from which a single global scale is chosen."""
        one = Observations(1, len(self.histograms[0]), self.layers)
        for blocks in self.histograms:
            for histogram, part in zip(one.flat(), itertools.chain(*blocks), strict=True):
                histogram.merge(part)
        return one

    def choose(self, method: Method, images: int, percentile: float | None = None) -> ActivationRanges:
        """The ranges of all layers; `percentile` (0.9999 by default) applies to that method.

        Raises `CalibrationError` if nothing was counted, or if the values of a layer do not give a range.
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
    """The threshold of a layer; 0 if it has no inputs, or only zeros, which gates leave."""
    if not histogram.most > 0:
        return Threshold(0.0, 0.0, 0.0)
    return choose(histogram, method, percentile)


def repeat(ranges: ActivationRanges, segments: int) -> ActivationRanges:
    """The ranges of a single segment, repeated for `segments` segments: a global scale in the form of a plan."""
    if ranges.shape[0] != 1:
        raise CalibrationError(f"ranges of {ranges.shape[0]} segments cannot be repeated; expected 1 segment")
    return ranges.model_copy(
        update={
            "thresholds": ranges.thresholds * segments,
            "clipped": ranges.clipped * segments,
            "in_16_bits": None if ranges.in_16_bits is None else ranges.in_16_bits * segments,
        }
    )


def require_segments(ranges: ActivationRanges, segments: int, model: ModelConfig) -> None:
    """Raise `CalibrationError` if the ranges do not belong to a plan of `segments` segments of a model."""
    expected = (segments, model.depth, len(model.units.layers))
    if ranges.shape != expected:
        raise CalibrationError(
            f"the calibration has {counted(ranges.shape[0], 'segment')}, {counted(ranges.shape[1], 'block')} and "
            f"{counted(ranges.shape[2], 'layer')} per block, but this plan has {expected[0]}, {expected[1]} and "
            f"{expected[2]}; calibrate with the options of the export"
        )
