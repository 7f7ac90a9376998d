"""`weights.bin`: every weight once, laid out so that a subnetwork's slice is a run of rows (DESIGN, decision 2).

The layout itself (names, head-major and group-major order) is `dydit.models.layout`; here are the file and its windows.
Each tensor starts on a 4096-byte boundary, so that runtimes can map it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from dydit.bundle.stored import ITEM_BYTES, Precision, StoredType, WeightEntry, half_name, product_type
from dydit.errors import CheckpointError
from dydit.export.quantize import is_quantized, quantize, scale_name

ALIGNMENT = 4096
PIECE = 1 << 24
"""Numbers that are converted and written at once: 64 MiB of them."""
_TYPES: dict[StoredType, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "float8_e4m3fn": torch.float8_e4m3fn,
}
_NAMES = {each.dtype: each.value for each in (Precision.FP32, Precision.FP16, Precision.BF16)}


class Copies(NamedTuple):
    """What a bundle in calibrated 8 bits stores of a layer's weight, at least one: in 8 bits with scales, in fp16."""

    eighth: bool = True
    half: bool = False


def stored_type(name: str, precision: Precision) -> StoredType:
    """The type of a stored tensor: weights and biases of products follow the bundle's precision, all else is fp32."""
    if precision.in_8_bits and is_quantized(name):
        return precision.weight_dtype
    return product_type(name, precision)


def stored_forms(
    name: str, tensor: Tensor, precision: Precision, copies: Copies | None = None
) -> Iterator[tuple[str, Tensor]]:
    """What a bundle of `precision` stores for a tensor of the layout: itself in its type, or the copies of 8 bits."""
    kind = stored_type(name, precision)
    if ITEM_BYTES[kind] == 1:
        copies = copies or Copies()
        if copies.eighth:
            weight, scale = quantize(name, tensor, _TYPES[kind])
            yield name, weight
            yield scale_name(name), scale
        if copies.half:
            yield half_name(name), tensor.detach().to(torch.float16)
    else:
        yield name, tensor.detach().to(_TYPES[kind])


def write_weights(
    path: Path,
    tensors: Iterable[tuple[str, Tensor]],
    precision: Precision = Precision.FP32,
    copies: Mapping[str, Copies] | None = None,
) -> dict[str, WeightEntry]:
    """Write tensors one after another, aligned; returns where each lies. `copies`: of weights in 8 bits, by name.

    Only one tensor is in memory at a time, and of its conversion a piece. Raises `CheckpointError` for a value that is
    not finite, or is not any more in the bundle's precision.
    """
    entries: dict[str, WeightEntry] = {}
    with open(path, "wb") as file:
        for name, tensor in tensors:
            kind = stored_type(name, precision)
            if ITEM_BYTES[kind] == 1:
                _require_finite(name, tensor, "float32")
                eighth, half = (copies or {}).get(name, Copies())
                for stored, values in stored_forms(name, tensor, precision, Copies(eighth)):
                    entries[stored] = _start(file, values, kind if stored == name else "float32")
                    file.write(values.contiguous().view(torch.uint8).numpy().data)
                if not half:
                    continue
                name, kind = half_name(name), "float16"
            entries[name] = _start(file, tensor, kind)
            for piece in tensor.detach().flatten().split(PIECE):
                _require_finite(name, piece, kind)
                file.write(piece.to(_TYPES[kind]).view(torch.uint8).numpy().data)
    return entries


def _start(file: BinaryIO, tensor: Tensor, kind: StoredType) -> WeightEntry:
    """Fill up to where a tensor may start, and say what starts there."""
    file.write(b"\0" * (-file.tell() % ALIGNMENT))
    return WeightEntry(offset=file.tell(), shape=tuple(tensor.shape), dtype=kind)


def _require_finite(name: str, values: Tensor, kind: StoredType) -> None:
    if not values.numel():
        return
    extremes = torch.stack(values.aminmax())  # NaN where any is; rounding keeps the order, so these two tell for all
    if not torch.isfinite(extremes.to(_TYPES[kind])).all():
        trouble = f"is too large for {_NAMES[kind]}; export in another precision"
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
