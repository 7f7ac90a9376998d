"""`weights.bin`: every weight once, laid out so that a subnetwork's slice is a run of rows (DESIGN, decision 2).

The layout itself (names, head-major and group-major order) is `dydit.models.layout`; here are the file and its windows.
Each tensor starts on a 4096-byte boundary, so that runtimes can map it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from dydit.bundle.manifest import WeightEntry
from dydit.errors import CheckpointError

ALIGNMENT = 4096


def write_weights(path: Path, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, WeightEntry]:
    """Write tensors one after another, as float32, aligned; returns where each lies.

    Only one tensor is in memory at a time. Raises `CheckpointError` for a value that is not finite.
    """
    entries: dict[str, WeightEntry] = {}
    with open(path, "wb") as file:
        for name, tensor in tensors:
            array = np.ascontiguousarray(tensor.detach().float().numpy())
            if not np.isfinite(array).all():
                raise CheckpointError(f"weight {name} holds NaN or infinite values; this checkpoint cannot be exported")
            file.write(b"\0" * (-file.tell() % ALIGNMENT))
            entries[name] = WeightEntry(offset=file.tell(), shape=array.shape)
            file.write(array.tobytes())
    return entries


def runs(slots: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ascending slots as (first, count) runs of neighbours: a prefix is one run."""
    if not slots:
        return
    first = previous = slots[0]
    for slot in slots[1:]:
        if slot != previous + 1:
            yield first, previous - first + 1
            first = slot
        previous = slot
    yield first, previous - first + 1


def nbytes(entry: WeightEntry) -> int:
    """Bytes of a stored tensor."""
    return int(np.prod(entry.shape)) * np.dtype(entry.dtype).itemsize
