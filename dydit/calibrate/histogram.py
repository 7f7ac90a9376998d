"""What is kept of the values that a tensor took: counts by size, of any number of values in the same memory.

A bin holds the values that share sign, exponent and the first six bits of the mantissa, so that within an octave there
are 64 bins, each 1.6 % wide at most, whatever the values turn out to be. Bins do not depend on the data: histograms of
parts add up to that of the whole, in any order and to the last count, over steps, batches and processes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

import numpy as np

from dydit.errors import CalibrationError

_SHIFT = 17  # of the 32 bits of a float32: sign, 8 of exponent, 6 of mantissa stay
BINS = 1 << (32 - _SHIFT)
_NEGATIVE = BINS // 2  # bins from here on hold negative values


def _edges() -> np.ndarray:
    """The least magnitude of each bin of one sign, and an end, float64 [BINS / 2 + 1]."""
    bits = (np.arange(_NEGATIVE + 1, dtype=np.uint64) << _SHIFT).astype(np.uint32)
    with np.errstate(invalid="ignore"):
        edges = bits.view(np.float32).astype(np.float64)
    edges[-1] = np.inf  # where the numbers of the other sign begin
    return edges


EDGES = _edges()


@dataclass
class Histogram:
    """Counts int64 [BINS], and the exact extremes of all values; empty at first."""

    counts: np.ndarray = field(default_factory=lambda: np.zeros(BINS, np.int64))
    least: float = np.inf
    largest: float = -np.inf

    @property
    def total(self) -> int:
        """How many values there were."""
        return int(self.counts.sum())

    def add(self, values: np.ndarray) -> None:
        """Count values, of any shape, as float32. Raises `CalibrationError` where one is NaN or infinite."""
        flat = np.ascontiguousarray(values, np.float32).reshape(-1)
        if not flat.size:
            return
        least, largest = float(flat.min()), float(flat.max())
        if not (np.isfinite(least) and np.isfinite(largest)):
            raise CalibrationError("a value to calibrate on is NaN or infinite; hold the model against its checkpoint")
        self.counts += np.bincount(flat.view(np.uint32) >> np.uint32(_SHIFT), minlength=BINS)
        self.least, self.largest = min(self.least, least), max(self.largest, largest)

    def merge(self, other: Histogram) -> None:
        """Add what another one counted."""
        self.counts += other.counts
        self.least, self.largest = min(self.least, other.least), max(self.largest, other.largest)

    @classmethod
    def of(cls, values: np.ndarray) -> Self:
        """The histogram of some values."""
        made = cls()
        made.add(values)
        return made

    def points(self) -> tuple[np.ndarray, np.ndarray]:
        """(values, counts) of the bins that are not empty, ascending: float64 middles, no farther out than extremes.

        Raises `CalibrationError` where nothing was counted.
        """
        if not self.total:
            raise CalibrationError("there are no values to calibrate on; sample more images")
        middles = (EDGES[:-1] + EDGES[1:]) / 2
        middles[0] = 0.0
        both = np.concatenate([middles, -middles])
        filled = np.flatnonzero(self.counts)
        order = np.argsort(both[filled], kind="stable")
        return np.clip(both[filled][order], self.least, self.largest), self.counts[filled][order]
