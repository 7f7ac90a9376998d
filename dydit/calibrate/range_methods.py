"""From what a tensor took to the range that 8 bits should span: four methods, pure functions of a `Histogram`.

Quantisation is symmetric: x is stored as round(x / s) clipped to -127..127 with s = t/127, and t is the threshold that
each method chooses:

    minmax       t = max |x|; nothing is clipped
    percentile   the least t that leaves at most a share 1-p of the values outside
    mse          t with the least mean square error, rounding s^2/12 inside and (|x|-t)^2 outside
    entropy      t whose 128 levels lose the least of the distribution of |x|, in Kullback-Leibler divergence, over the
                 candidates of `CANDIDATES` (as in Migacz, "8-bit inference with TensorRT", 2017)

A threshold is never beyond max |x|, and never 0: a tensor of zeros has none, which is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from dydit.calibrate.histogram import Histogram
from dydit.errors import CalibrationError

LEVELS = 127
CANDIDATES = 128
"""Thresholds that `mse` and `entropy` try, evenly spread in logarithm from 1/64 of max |x| to max |x| itself."""
_SPAN = 64


class Method(StrEnum):
    """How a threshold is chosen."""

    MINMAX = "minmax"
    PERCENTILE = "percentile"
    MSE = "mse"
    ENTROPY = "entropy"


@dataclass(frozen=True)
class Threshold:
    """A range [-value, value], the share of values outside it, and the mean square error of 8 bits over it."""

    value: float
    clipped: float
    error: float


def choose(histogram: Histogram, method: Method, percentile: float = 0.9999) -> Threshold:
    """The threshold of a tensor. `percentile`: the share of values that stays inside, for that method alone.

    Raises `CalibrationError` for no values, zeros alone, a percentile outside (0, 1], or fewer values than it needs to
    mean anything.
    """
    sizes, counts = histogram.points()
    largest = histogram.most
    if not largest > 0:
        raise CalibrationError("all values to calibrate on are 0: there is no range; sample more images")
    candidates = largest * np.exp(np.linspace(-np.log(_SPAN), 0, CANDIDATES))
    candidates[-1] = largest
    if method is Method.MINMAX:
        value = largest
    elif method is Method.PERCENTILE:
        value = _percentile(sizes, counts, percentile, largest)
    elif method is Method.MSE:
        value = float(candidates[np.argmin([_error(sizes, counts, each) for each in candidates])])
    else:
        value = float(candidates[np.argmin([_divergence(sizes, counts, each, largest) for each in candidates])])
    outside = float(counts[sizes > value].sum() / counts.sum())
    return Threshold(value, outside, _error(sizes, counts, value))


def _percentile(sizes: np.ndarray, counts: np.ndarray, share: float, largest: float) -> float:
    if not 0 < share <= 1:
        raise CalibrationError(f"percentile {share} is outside (0, 1]; 0.9999 keeps all but one in 10,000")
    total = int(counts.sum())
    if share < 1 and total * (1 - share) < 1 - 1e-9:
        needed = int(np.ceil(1 / (1 - share) - 1e-9))
        raise CalibrationError(
            f"{total} values tell nothing of a share of {share}: at least {needed} are needed; sample more images"
        )
    inside = np.cumsum(counts) >= share * total
    return float(sizes[np.argmax(inside)]) or largest


def _error(sizes: np.ndarray, counts: np.ndarray, threshold: float) -> float:
    """Mean square error: that of rounding, evenly spread over a step, but no more than x^2; and of what is cut off."""
    inside = np.minimum((threshold / LEVELS) ** 2 / 12, sizes**2)
    cut = np.square(np.maximum(sizes - threshold, 0))
    return float(((inside + cut) * counts).sum() / counts.sum())


def _divergence(sizes: np.ndarray, counts: np.ndarray, threshold: float, largest: float) -> float:
    """Kullback-Leibler divergence of the 8-bit distribution of |x| from its own, both over fine bins up to max |x|."""
    fine = 16 * LEVELS
    width = largest / fine
    place = np.minimum((sizes / width).astype(np.int64), fine - 1)
    original = np.bincount(place, counts, fine).astype(np.float64)
    step = threshold / LEVELS
    level = np.minimum(np.rint((np.arange(fine) + 0.5) * width / step), LEVELS).astype(np.int64)
    filled = original > 0
    sums = np.bincount(level, original, LEVELS + 1)
    members = np.bincount(level[filled], minlength=LEVELS + 1)
    approximate = np.where(filled, sums[level] / np.maximum(members[level], 1), 0.0)
    # What lies beyond the threshold becomes the last level, whose place is the threshold: its mass is lost elsewhere.
    beyond = (np.arange(fine) + 0.5) * width > threshold + step / 2
    approximate[beyond] *= 1e-3
    p = original / original.sum()
    q = np.maximum(approximate / approximate.sum(), 1e-12)
    return float((p[filled] * np.log(p[filled] / q[filled])).sum())
