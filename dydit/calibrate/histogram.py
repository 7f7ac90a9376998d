"""What is kept of the values that a tensor took: counts by magnitude, of any number of values in the same memory.

A bin holds the magnitudes that share exponent and the first five bits of the mantissa, so that an octave has 32 bins,
each 3.1 % wide at most, whatever the values turn out to be. Bins do not depend on the data: histograms of parts add up
to that of the whole, in any order and to the last count, over steps, batches and processes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

import numpy as np

from dydit.errors import CalibrationError

_SHIFT = 18  # of the 31 bits of a float32's magnitude, 8 of exponent and 5 of mantissa stay
BINS = 1 << (31 - _SHIFT)


def _edges() -> np.ndarray:
    """The least magnitude of each bin, and an end, float64 [BINS + 1]."""
    bits = (np.arange(BINS, dtype=np.uint32) << np.uint32(_SHIFT)).astype(np.uint32)
    with np.errstate(invalid="ignore"):
        edges = bits.view(np.float32).astype(np.float64)
    return np.append(np.where(np.isnan(edges), np.inf, edges), np.inf)


EDGES = _edges()


@dataclass
class Histogram:
    """Counts int64 [BINS] of magnitudes, and the exact extremes of the values themselves; empty at first."""

    counts: np.ndarray = field(default_factory=lambda: np.zeros(BINS, np.int64))
    least: float = np.inf
    largest: float = -np.inf

    @property
    def total(self) -> int:
        """How many values there were."""
        return int(self.counts.sum())

    @property
    def most(self) -> float:
        """The largest magnitude, exactly; 0 where there is none."""
        return max(-self.least, self.largest, 0.0)

    def add(self, values: np.ndarray) -> None:
        """Count values, of any shape, as float32. Raises `CalibrationError` where one is NaN or infinite."""
        flat = np.ascontiguousarray(values, np.float32).reshape(-1)
        if not flat.size:
            return
        least, largest = float(flat.min()), float(flat.max())
        if not (np.isfinite(least) and np.isfinite(largest)):
            raise CalibrationError("a value to calibrate on is NaN or infinite; hold the model against its checkpoint")
        magnitudes = flat.view(np.uint32) & np.uint32(0x7FFFFFFF)
        self.counts += np.bincount(magnitudes >> np.uint32(_SHIFT), minlength=BINS)
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
        """(magnitudes, counts) of the bins that are not empty, ascending: float64 middles, none beyond `most`.

        Raises `CalibrationError` where nothing was counted.
        """
        if not self.total:
            raise CalibrationError("there are no values to calibrate on; sample more images")
        filled = np.flatnonzero(self.counts)
        middles = np.where(filled == 0, 0.0, (EDGES[filled] + EDGES[filled + 1]) / 2)
        return np.minimum(middles, self.most), self.counts[filled]
