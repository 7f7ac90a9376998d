"""Histograms of the magnitudes of a tensor's values, in constant memory for any number of values.

A bin contains the magnitudes with the same exponent and the same first five bits of the mantissa. An octave thus has 32
bins, each at most 3.1 % wide, for values of any size. Bins do not depend on the data: histograms of parts add up
exactly to that of the whole, in any order, over steps, batches and processes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from dydit.errors import CalibrationError

_SHIFT = 18  # of the 31 bits of the magnitude of a float32, the 8 of the exponent and 5 of the mantissa remain
BINS = 1 << (31 - _SHIFT)


def _edges() -> np.ndarray:
    """The lower edges of the bins, and the upper edge of the last one, float64 [BINS + 1]."""
    bits = (np.arange(BINS, dtype=np.uint32) << np.uint32(_SHIFT)).astype(np.uint32)
    with np.errstate(invalid="ignore"):
        edges = bits.view(np.float32).astype(np.float64)
    return np.append(np.where(np.isnan(edges), np.inf, edges), np.inf)


EDGES = _edges()


@dataclass
class Histogram:
    """Counts int64 [BINS] of magnitudes, and the exact smallest and largest value; empty at first."""

    counts: np.ndarray = field(default_factory=lambda: np.zeros(BINS, np.int64))
    least: float = np.inf
    largest: float = -np.inf

    @property
    def total(self) -> int:
        """The number of values."""
        return int(self.counts.sum())

    @property
    def most(self) -> float:
        """The largest magnitude, exact; 0 if there are no values."""
        return max(-self.least, self.largest, 0.0)

    def add(self, values: np.ndarray) -> None:
        """Count values of any shape as float32. Raises `CalibrationError` if one is NaN or infinite."""
        flat = np.ascontiguousarray(values, np.float32).reshape(-1)
        if not flat.size:
            return
        least, largest = float(flat.min()), float(flat.max())
        if not (np.isfinite(least) and np.isfinite(largest)):
            raise CalibrationError("a value to calibrate on is NaN or infinite; check the checkpoint")
        magnitudes = flat.view(np.uint32) & np.uint32(0x7FFFFFFF)
        self.counts += np.bincount(magnitudes >> np.uint32(_SHIFT), minlength=BINS)
        self.least, self.largest = min(self.least, least), max(self.largest, largest)

    def merge(self, other: Histogram) -> None:
        """Add the counts of another histogram."""
        self.counts += other.counts
        self.least, self.largest = min(self.least, other.least), max(self.largest, other.largest)

    def points(self) -> tuple[np.ndarray, np.ndarray]:
        """(magnitudes, counts) of the bins that are not empty, ascending. Magnitudes are the middles of the bins,
        float64, and at most `most`. Raises `CalibrationError` if nothing was counted.
        """
        if not self.total:
            raise CalibrationError("there are no values to calibrate on; sample more images")
        filled = np.flatnonzero(self.counts)
        middles = np.where(filled == 0, 0.0, (EDGES[filled] + EDGES[filled + 1]) / 2)
        return np.minimum(middles, self.most), self.counts[filled]
