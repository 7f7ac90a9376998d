"""The `sensitivity` of a calibration: the loss from 8 bits in each linear layer, and the layers that stay in 16 bits.

A layer is one of `UnitAxis.layers` in one block and one segment of a plan. Its loss is what it adds to the mean square
error of an image if it is in 8 bits; its gain is the multiply-adds that then cost half as much. Layers go into 8 bits
in the order of loss per multiply-add. Every prefix of that order is a candidate, from no layer to all; its quality is
measured by sampling with it (`dydit.calibrate.precision_search`). This module is the arithmetic: NumPy, no model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from pydantic import Field, FiniteFloat, model_validator

from dydit.errors import CalibrationError
from dydit.models.config import ModelConfig
from dydit.validation import Strict

CURVE_POINTS = 6
"""Candidates that are measured for the curve, evenly spaced in multiply-adds from none to all in 8 bits."""
MOST_DECIBELS = 200.0
"""The PSNR of equal images."""
HALF_TIME = 0.5
"""The time of a product in 8 bits relative to 16 bits, in the bound on speed."""


class Quality(Strict):
    """How close images are to those of the model that is not quantized, with the same noise.

    `psnr_least`, `psnr_median`: the smallest and the median PSNR of the images, in dB. `fd_ratio`: their Fréchet
    distance to the reference images over that of the model's images; None without reference images.
    """

    psnr_least: FiniteFloat
    psnr_median: FiniteFloat
    fd_ratio: FiniteFloat | None = Field(default=None, ge=0)


class CurvePoint(Strict):
    """A prefix of the order: the number of layers in 8 bits, and their share of the multiply-adds of linear layers.

    `bound`: the speed-up over all layers in 16 bits if only linear layers took time, and a product in 8 bits took half
    the time of one in 16 bits. It is computed, not measured.
    """

    layers: int = Field(ge=0)
    share: FiniteFloat = Field(ge=0, le=1)
    bound: FiniteFloat = Field(ge=1)
    quality: Quality


class Sensitivity(Strict):
    """The target of a search and its measurements. The layers that stay in 16 bits are part of `activations`.

    `losses`: the predicted share in the mean square error of an image, by segment, block and layer; 0 if there is no
    such layer. `curve`: measured on the calibration images, by ascending number of layers in 8 bits. `chosen`: one of
    its points. `held_out`: the quality of the same choice on images of another seed.
    """

    precision: Literal["int8-static", "fp8"]
    target_psnr: FiniteFloat | None = Field(default=None, gt=0)
    target_fd_ratio: FiniteFloat | None = Field(default=None, ge=1)
    reference_sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$", description="of the reference images")
    images: int = Field(ge=1)
    peak: Literal["2, pixels in [-1, 1]", "the range of the image's own latents"]
    layers: int = Field(ge=1, description="number of layers of all segments")
    losses: tuple[tuple[tuple[FiniteFloat, ...], ...], ...]
    curve: tuple[CurvePoint, ...]
    chosen: CurvePoint
    held_out: Quality
    held_out_holds: bool

    @model_validator(mode="after")
    def _consistent(self) -> Sensitivity:
        if (self.target_psnr is None) == (self.target_fd_ratio is None):
            raise ValueError("expected one target, either PSNR or Fréchet distance")
        if self.chosen not in self.curve:
            raise ValueError("the chosen point is not on the curve")
        if len({len(block) for blocks in self.losses for block in blocks}) != 1:
            raise ValueError("every block must have losses of the same layers")
        return self


class Target(Strict):
    """What a choice must reach: at least `psnr` dB for every image, or at most `fd_ratio` times the Fréchet distance of
    the model."""

    psnr: float | None = Field(default=None, gt=0, lt=MOST_DECIBELS)
    fd_ratio: float | None = Field(default=None, ge=1, allow_inf_nan=False)

    @model_validator(mode="after")
    def _one(self) -> Target:
        if (self.psnr is None) == (self.fd_ratio is None):
            raise ValueError("set a target PSNR or a target ratio of Fréchet distances, but only one of them")
        return self

    def holds(self, quality: Quality) -> bool:
        """Whether a measured quality reaches the target."""
        if self.psnr is not None:
            return quality.psnr_least >= self.psnr
        assert self.fd_ratio is not None and quality.fd_ratio is not None
        return quality.fd_ratio <= self.fd_ratio


def layer_macs(
    config: ModelConfig, masks: np.ndarray, segments: Sequence[tuple[int, int]], token_ratio: np.ndarray
) -> np.ndarray:
    """Multiply-adds of an image in each layer over the steps of a segment, float64 [segments, L, layers].

    A segment is compiled for the union of the masks of its steps. `masks` bool [S, U]; `token_ratio` [S, L]: share of
    tokens that enter the MLP.
    """
    axis = config.units
    macs = np.empty((len(segments), config.depth, len(axis.layers)))
    for index, (first, end) in enumerate(segments):
        counts = axis.counts(np.asarray(masks[first:end].any(axis=0)))
        routed = config.tokens * token_ratio[first:end].sum(axis=0)  # [L], of all steps
        for part, units in zip(axis.parts, counts.tolist(), strict=True):
            rows = routed[part.block] if part.group.routed else config.tokens * (end - first)
            for layer in part.group.layers:
                place = axis.layer_names.index(layer.name)
                macs[index, part.block, place] = layer.in_features(units) * layer.out_features(units) * rows
    return macs


def predicted_losses(step_errors: np.ndarray, image_errors: np.ndarray) -> np.ndarray:
    """What each layer adds to the error of an image, float64 [segments, L, layers].

    `step_errors` [segments, L, layers]: error of x_prev with only this layer in 8 bits, summed over the steps of the
    segment. `image_errors` [segments]: error of the image with all layers of the segment in 8 bits; NaN if it was not
    measured. The gain from step error to image error is interpolated between measured segments (linear in logarithm).
    The losses of a segment add up to its image error. Raises `CalibrationError` for values that are negative or not
    finite, and if no image error was measured.
    """
    sums = step_errors.sum(axis=(1, 2))
    measured = ~np.isnan(image_errors)
    if not measured.any() or not np.isfinite(step_errors).all() or not np.isfinite(image_errors[measured]).all():
        raise CalibrationError("errors in 8 bits are not finite, or none was measured; check the checkpoint")
    if (step_errors < 0).any() or (image_errors[measured] < 0).any():
        raise CalibrationError("a mean square error is negative")
    known = np.flatnonzero(measured & (sums > 0) & np.nan_to_num(image_errors > 0))
    if not len(known):
        return np.zeros_like(step_errors)
    gains = np.exp(np.interp(np.arange(len(sums)), known, np.log(image_errors[known] / sums[known])))
    return np.asarray(step_errors * gains[:, None, None])


def int8_order(losses: np.ndarray, macs: np.ndarray) -> np.ndarray:
    """The layers, as flat indices int64 [layers], in the order in which they go into 8 bits: by loss per multiply-add,
    and by index if equal. Layers that do not exist (0 multiply-adds) are left out."""
    flat, size = losses.reshape(-1), macs.reshape(-1)
    existing = np.flatnonzero(size > 0)
    return np.asarray(existing[np.argsort(flat[existing] / size[existing], kind="stable")])


def fp16_layers_after(order: np.ndarray, count: int, shape: tuple[int, ...]) -> np.ndarray:
    """Which layers stay in 16 bits if the first `count` of an order are in 8 bits, bool of `shape`."""
    fp16_layers = np.zeros(math.prod(shape), bool)
    fp16_layers[order[count:]] = True
    return fp16_layers.reshape(shape)


def share_in_8_bits(order: np.ndarray, count: int, macs: np.ndarray) -> float:
    """The share of the first `count` layers of an order in the multiply-adds."""
    in_order = macs.reshape(-1)[order]
    return float(in_order[:count].sum() / in_order.sum())


def bound_on_speed(share: float) -> float:
    """The largest speed-up of all linear layers with this share in 8 bits, which take half the time of 16 bits."""
    return 1 / (1 - HALF_TIME * share)


def spread_counts(order: np.ndarray, macs: np.ndarray, points: int = CURVE_POINTS) -> list[int]:
    """At most `points` numbers of layers in 8 bits, ascending, evenly spaced in multiply-adds from none to all."""
    done = np.cumsum(macs.reshape(-1)[order])
    wanted = np.linspace(0, 1, points)[1:-1] * done[-1]
    return sorted({0, *(int(np.searchsorted(done, each)) + 1 for each in wanted), len(order)})


def most_that_holds(holds: Callable[[int], bool], total: int) -> int:
    """The largest count in 0..`total` for which a bisection finds `holds` to be true, or -1 if it is false for 0.

    `holds` was called for the result. If `holds` is true up to some count and false from there on, the result is that
    count. `holds` is called for `total` and 0 first, and at most once for each count.
    """
    if holds(total):
        return total
    if total == 0 or not holds(0):
        return -1
    low, high = 0, total
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def most_questions(total: int) -> int:
    """The largest number of calls that `most_that_holds` makes."""
    return 2 + math.ceil(math.log2(max(total, 1)))
