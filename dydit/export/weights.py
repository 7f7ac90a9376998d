"""`weights.bin`: every weight once, laid out so that a subnetwork's slice is a run of rows (DESIGN, decision 2).

The layout itself (names, head-major and group-major order) is `dydit.models.layout`; here are the file and its windows.
Each tensor starts on a 4096-byte boundary, so that runtimes can map it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dydit.bundle.stored import Precision, WeightEntry
from dydit.errors import CheckpointError

ALIGNMENT = 4096
PIECE = 1 << 24
"""Numbers that are converted and written at once: 64 MiB of them."""
_PRODUCTS = ("qkv", "proj", "fc1", "fc2", "adaln")
_TYPES = {Precision.FP32: torch.float32, Precision.FP16: torch.float16, Precision.BF16: torch.bfloat16}


def stored_precision(name: str, precision: Precision) -> Precision:
    """The type of a stored tensor: the products' weights and biases follow the bundle's, all else stays fp32."""
    return precision if name.split(".")[-2:][0] in _PRODUCTS else Precision.FP32


def stored_form(name: str, tensor: Tensor, precision: Precision) -> Tensor:
    """A tensor in the type in which a bundle of `precision` stores it."""
    return tensor.detach().to(_TYPES[stored_precision(name, precision)])


def write_weights(
    path: Path, tensors: Iterable[tuple[str, Tensor]], precision: Precision = Precision.FP32
) -> dict[str, WeightEntry]:
    """Write tensors one after another, aligned; returns where each lies.

    Only one tensor is in memory at a time, and of its conversion a piece. Raises `CheckpointError` for a value that is
    not finite, or is not any more in the bundle's precision.
    """
    entries: dict[str, WeightEntry] = {}
    with open(path, "wb") as file:
        for name, tensor in tensors:
            kind = stored_precision(name, precision)
            file.write(b"\0" * (-file.tell() % ALIGNMENT))
            entries[name] = WeightEntry(offset=file.tell(), shape=tuple(tensor.shape), dtype=kind.dtype)
            for piece in tensor.detach().flatten().split(PIECE):
                _require_finite(name, piece, kind)
                file.write(piece.to(_TYPES[kind]).view(torch.uint8).numpy().data)
    return entries


def _require_finite(name: str, values: Tensor, kind: Precision) -> None:
    if not values.numel():
        return
    extremes = torch.stack(values.aminmax())  # NaN where any is; rounding keeps the order, so these two tell for all
    if not torch.isfinite(extremes.to(_TYPES[kind])).all():
        trouble = f"is too large for {kind.value}; export in another precision"
        if not torch.isfinite(extremes).all():
            trouble = "is NaN or infinite; this checkpoint cannot be exported"
        raise CheckpointError(f"a value of weight {name} {trouble}")


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
