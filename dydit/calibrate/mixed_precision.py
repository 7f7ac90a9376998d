"""The `sensitivity` of a calibration: what 8 bits cost in each linear layer, and which layers therefore stay in 16.

A layer is one of `UnitAxis.layers` of one block in one segment of a plan. Its loss is what it adds to an image's mean
square error by being in 8 bits, its gain the multiply-adds that are then half as expensive. Layers go into 8 bits in
the order of loss per multiply-add: every prefix of that order is a choice, from none to all, and how good one is, is
measured by sampling with it (`dydit.calibrate.precision_search`). Here is the arithmetic: NumPy, no model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from pydantic import Field, FiniteFloat, model_validator

from dydit.errors import CalibrationError
from dydit.models.config import ModelConfig, Strict

CURVE_POINTS = 6
"""Choices that are measured for the curve alone, evenly spread in multiply-adds from none to all in 8 bits."""
MOST_DECIBELS = 200.0
"""What equal images count as."""
HALF_TIME = 0.5
"""Of a product in 16 bits, in the bound on speed."""


class Quality(Strict):
    """How near images are to those of the model that is not quantised, with the same noise.

    `psnr_least`, `psnr_median`: decibels over the images. `fd_ratio`: their Fréchet distance to the reference, over
    that of the model's, where one was given.
    """

    psnr_least: FiniteFloat
    psnr_median: FiniteFloat
    fd_ratio: FiniteFloat | None = Field(default=None, ge=0)


class CurvePoint(Strict):
    """A prefix of the order: so many layers in 8 bits, and the share of the linear layers' multiply-adds that is.

    `bound`: speed over that of all in 16 bits if nothing but the linear layers took time, and a product in 8 bits took
    half of one in 16: arithmetic, not measured.
    """

    layers: int = Field(ge=0)
    share: FiniteFloat = Field(ge=0, le=1)
    bound: FiniteFloat = Field(ge=1)
    quality: Quality


class Sensitivity(Strict):
    """What was searched for, found, and measured. The layers that stay are with the `activations`.

    `losses`: by segment, block and layer, the predicted part of an image's mean square error; 0 where there is no such
    layer. `curve`: by layers in 8 bits, ascending, measured on the images calibrated on; `chosen` is one of them, and
    `held_out` how the same choice does on images of another seed.
    """

    precision: Literal["int8-static", "fp8"]
    target_psnr: FiniteFloat | None = Field(default=None, gt=0)
    target_fd_ratio: FiniteFloat | None = Field(default=None, ge=1)
    reference_sha256: str | None = Field(
        default=None, pattern="^[0-9a-f]{64}$", description="of the images compared to"
    )
    images: int = Field(ge=1)
    peak: Literal["2, pixels in [-1, 1]", "the range of the image's own latents"]
    layers: int = Field(ge=1, description="that there are, of all segments")
    losses: tuple[tuple[tuple[FiniteFloat, ...], ...], ...]
    curve: tuple[CurvePoint, ...]
    chosen: CurvePoint
    held_out: Quality
    held_out_holds: bool

    @model_validator(mode="after")
    def _consistent(self) -> Sensitivity:
        if (self.target_psnr is None) == (self.target_fd_ratio is None):
            raise ValueError("there is one target, of PSNR or of the Fréchet distance")
        if self.chosen not in self.curve:
            raise ValueError("the chosen point is not on the curve")
        if len({len(block) for blocks in self.losses for block in blocks}) != 1:
            raise ValueError("every block has losses of the same layers")
        return self


class Target(Strict):
    """What a choice must keep: every image at least so many decibels, or a Fréchet distance of at most so many times
    the model's."""

    psnr: float | None = Field(default=None, gt=0, lt=MOST_DECIBELS)
    fd_ratio: float | None = Field(default=None, ge=1, allow_inf_nan=False)

    @model_validator(mode="after")
    def _one(self) -> Target:
        if (self.psnr is None) == (self.fd_ratio is None):
            raise ValueError("give a target PSNR or a target ratio of Fréchet distances, one of them")
        return self

    def holds(self, quality: Quality) -> bool:
        """Whether a measured quality keeps the target."""
        if self.psnr is not None:
            return quality.psnr_least >= self.psnr
        assert self.fd_ratio is not None and quality.fd_ratio is not None
        return quality.fd_ratio <= self.fd_ratio


def layer_macs(
    config: ModelConfig, masks: np.ndarray, segments: Sequence[tuple[int, int]], token_ratio: np.ndarray
) -> np.ndarray:
    """Multiply-adds of an image in each layer over a segment's steps, float64 [segments, L, layers], as it is
    compiled: for the union of its steps' masks.

    `masks` bool [S, U], `token_ratio` [S, L] share of tokens that enter the MLP.
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
    """What each layer adds to an image's error, float64 [segments, L, layers].

    `step_errors` [segments, L, layers]: of x_prev, summed over a segment's steps, each layer alone in 8 bits.
    `image_errors` [segments]: of the image, where all of that segment's layers are; NaN where that was not measured,
    and then as amplified as between the neighbours that were (linear in logarithm). A segment's losses add up to its
    image error. Raises `CalibrationError` for values that are negative or infinite, or where nothing was measured.
    """
    sums = step_errors.sum(axis=(1, 2))
    measured = ~np.isnan(image_errors)
    if not measured.any() or not np.isfinite(step_errors).all() or not np.isfinite(image_errors[measured]).all():
        raise CalibrationError("errors in 8 bits are not finite, or none was measured; hold the model against its file")
    if (step_errors < 0).any() or (image_errors[measured] < 0).any():
        raise CalibrationError("a mean square error is negative")
    known = np.flatnonzero(measured & (sums > 0) & np.nan_to_num(image_errors > 0))
    if not len(known):
        return np.zeros_like(step_errors)
    gains = np.exp(np.interp(np.arange(len(sums)), known, np.log(image_errors[known] / sums[known])))
    return np.asarray(step_errors * gains[:, None, None])


def int8_order(losses: np.ndarray, macs: np.ndarray) -> np.ndarray:
    """The layers, as flat indices, from that which goes into 8 bits first: least loss per multiply-add; of equals the
    first. Layers that do not exist (0 multiply-adds) are not among them. int64 [layers]."""
    flat, size = losses.reshape(-1), macs.reshape(-1)
    there = np.flatnonzero(size > 0)
    return np.asarray(there[np.argsort(flat[there] / size[there], kind="stable")])


def kept_after(order: np.ndarray, count: int, shape: tuple[int, ...]) -> np.ndarray:
    """Which layers stay in 16 bits when the first `count` of an order are in 8, bool of `shape`."""
    kept = np.zeros(math.prod(shape), bool)
    kept[order[count:]] = True
    return kept.reshape(shape)


def share_in_8_bits(order: np.ndarray, count: int, macs: np.ndarray) -> float:
    """The share of multiply-adds that the first `count` of an order are."""
    in_order = macs.reshape(-1)[order]
    return float(in_order[:count].sum() / in_order.sum())


def bound_on_speed(share: float) -> float:
    """How many times as fast all linear layers can be with such a share in 8 bits, which take half the time of 16."""
    return 1 / (1 - HALF_TIME * share)


def spread_counts(order: np.ndarray, macs: np.ndarray, points: int = CURVE_POINTS) -> list[int]:
    """At most `points` numbers of layers in 8 bits, ascending, their multiply-adds evenly spread from none to all."""
    done = np.cumsum(macs.reshape(-1)[order])
    wanted = np.linspace(0, 1, points)[1:-1] * done[-1]
    return sorted({0, *(int(np.searchsorted(done, each)) + 1 for each in wanted), len(order)})


def most_that_holds(holds: Callable[[int], bool], total: int) -> int:
    """The largest count in 0..`total` that a bisection finds to hold, or -1 where 0 does not: every answer was asked.

    Where `holds` is true up to a count and false from there on, it is the largest of all. It is asked for `total` and 0
    first, each count at most once.
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
    """How many answers `most_that_holds` asks for at most."""
    return 2 + math.ceil(math.log2(max(total, 1)))
