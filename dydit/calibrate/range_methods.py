"""Four methods that choose the range of 8-bit values from the histogram of a tensor. Pure functions of a `Histogram`.

Quantization is symmetric: x is stored as round(x / s) clipped to -127..127 with s = t/127. Each method chooses the
threshold t:

    minmax       t = max |x|; nothing is clipped
    percentile   the smallest t that leaves at most a share 1-p of the values outside
    mse          the t with the smallest mean square error: s^2/12 from rounding inside and (|x|-t)^2 outside
    entropy      the t, of `CANDIDATES`, whose 128 levels have the smallest Kullback-Leibler divergence from the
                 distribution of |x| (as in Migacz, "8-bit inference with TensorRT", 2017)

A threshold is at most max |x| and never 0: a tensor of zeros is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from dydit.calibrate.histogram import Histogram
from dydit.errors import CalibrationError

LEVELS = 127
CANDIDATES = 128
"""The number of thresholds that `mse` and `entropy` try, evenly spaced in logarithm from max |x| / 64 to max |x|."""
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
    """The threshold of a tensor. `percentile`: the share of values inside the range, for that method only.

    Raises `CalibrationError` if there are no values or only zeros, for a percentile outside (0, 1], and for fewer
    values than the percentile needs.
    """
    sizes, counts = histogram.points()
    largest = histogram.most
    if not largest > 0:
        raise CalibrationError("all values to calibrate on are 0, so there is no range; sample more images")
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
            f"{total} values are too few for a percentile of {share}: at least {needed} are needed; sample more images"
        )
    inside = np.cumsum(counts) >= share * total
    return float(sizes[np.argmax(inside)]) or largest


def _error(sizes: np.ndarray, counts: np.ndarray, threshold: float) -> float:
    """Mean square error of rounding (uniform within a step, and at most x^2) and of clipping."""
    inside = np.minimum((threshold / LEVELS) ** 2 / 12, sizes**2)
    cut = np.square(np.maximum(sizes - threshold, 0))
    return float(((inside + cut) * counts).sum() / counts.sum())


def _divergence(sizes: np.ndarray, counts: np.ndarray, threshold: float, largest: float) -> float:
    """Kullback-Leibler divergence of the distribution of |x| in 8 bits from that of |x|, over fine bins up to max
    |x|."""
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
    # Values beyond the threshold become the last level, which lies at the threshold: their own bins lose their mass.
    beyond = (np.arange(fine) + 0.5) * width > threshold + step / 2
    approximate[beyond] *= 1e-3
    p = original / original.sum()
    q = np.maximum(approximate / approximate.sum(), 1e-12)
    return float((p[filled] * np.log(p[filled] / q[filled])).sum())
