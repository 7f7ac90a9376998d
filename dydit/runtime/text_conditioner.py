"""The texts of a run, as steps take them: keys and values of a batch's texts, computed once and kept in memory."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from dydit.bundle.io_spec import TEXT_ROWS
from dydit.runtime.backends.base import Backend

TEXT_BYTES = 1 << 30


class TextConditioner:
    """What steps take of the texts of their rows. The texts of as many batches are kept as fit in `budget` bytes.

    A PixArt-XL takes 31 MB of a text of 120 tokens. Bulk runs of many texts, whose batches take turns segment by
    segment, compute them again for each segment: a few percent of a step for one image.
    """

    def __init__(self, backend: Backend, budget: int = TEXT_BYTES):
        self._backend, self._budget = backend, budget
        self._kept: OrderedDict[bytes, dict[str, np.ndarray]] = OrderedDict()

    def feeds(self, labels: np.ndarray) -> dict[str, np.ndarray]:
        """The text inputs of a step whose rows have the texts with these labels, int64 [R]."""
        distinct, rows = np.unique(labels, return_inverse=True)
        key = distinct.tobytes()
        if key not in self._kept:
            self._kept[key] = self._backend.text_values(distinct)
        self._kept.move_to_end(key)
        while len(self._kept) > 1 and sum(map(_bytes, self._kept.values())) > self._budget:
            self._kept.popitem(last=False)
        return {**self._kept[key], TEXT_ROWS: rows.astype(np.int64)}


def _bytes(arrays: dict[str, np.ndarray]) -> int:
    return sum(array.nbytes for array in arrays.values())
