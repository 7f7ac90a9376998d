"""Writes `weights.bin`: every weight once, with rows in the order of slots, so that subnetworks read runs of rows.

The architecture says which tensors there are (for example `dydit.models.dit.layout`). Each tensor starts at a multiple
of 4096 bytes, so that runtimes can map it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from dydit.bundle.stored_weights import ALIGNMENT, Precision, StoredType, WeightEntry, fp16_name, stored_type
from dydit.dtypes import DTYPES
from dydit.errors import CheckpointError
from dydit.models.config import ModelConfig
from dydit.quantization.quantize import quantize, scale_name

PIECE = 1 << 24
"""How many numbers are converted and written at once: 64 MiB in fp32."""
_NAMES = {each.dtype: each.value for each in (Precision.FP32, Precision.FP16, Precision.BF16)}


class Copies(NamedTuple):
    """Which copies of a layer's weight a bundle of calibrated 8 bits stores; at least one.

    `quantized`: in 8 bits, with scales. `fp16`: in fp16.
    """

    quantized: bool = True
    fp16: bool = False


def stored_forms(
    model: ModelConfig, name: str, tensor: Tensor, precision: Precision, copies: Copies | None = None
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of what a bundle of `precision` stores for one tensor. `copies`: of a weight with 8 bits."""
    kind = stored_type(model, name, precision)
    if DTYPES[kind].bytes == 1:
        copies = copies or Copies()
        if copies.quantized:
            weight, scale = quantize(tensor, model.units.weights[name].out_major, getattr(torch, kind))
            yield name, weight
            yield scale_name(name), scale
        if copies.fp16:
            yield fp16_name(name), tensor.detach().to(torch.float16)
    else:
        yield name, tensor.detach().to(getattr(torch, kind))


def write_weights(
    path: Path,
    tensors: Iterable[tuple[str, Tensor]],
    model: ModelConfig,
    precision: Precision = Precision.FP32,
    copies: Mapping[str, Copies] | None = None,
) -> dict[str, WeightEntry]:
    """Write tensors one after another, aligned; returns their entries. `copies`: of weights with 8 bits, by name.

    Only one tensor at a time is in memory, and it is converted in pieces. Raises `CheckpointError` for a value that is
    not finite, or not finite in the bundle's precision.
    """
    entries: dict[str, WeightEntry] = {}
    with open(path, "wb") as file:
        for name, tensor in tensors:
            kind = stored_type(model, name, precision)
            if DTYPES[kind].bytes == 1:
                _require_finite(name, tensor, "float32")
                quantized, fp16 = (copies or {}).get(name, Copies())
                for stored, values in stored_forms(model, name, tensor, precision, Copies(quantized)):
                    entries[stored] = _start(file, values, kind if stored == name else "float32")
                    file.write(values.contiguous().view(torch.uint8).numpy().data)
                if not fp16:
                    continue
                name, kind = fp16_name(name), "float16"
            entries[name] = _start(file, tensor, kind)
            for piece in tensor.detach().flatten().split(PIECE):
                _require_finite(name, piece, kind)
                file.write(piece.to(getattr(torch, kind)).view(torch.uint8).numpy().data)
    return entries


def _start(file: BinaryIO, tensor: Tensor, kind: StoredType) -> WeightEntry:
    """Pad the file to the next aligned offset; returns the entry of the tensor that starts there."""
    file.write(b"\0" * (-file.tell() % ALIGNMENT))
    return WeightEntry(offset=file.tell(), shape=tuple(tensor.shape), dtype=kind)


def _require_finite(name: str, values: Tensor, kind: StoredType) -> None:
    if not values.numel():
        return
    # NaN if any value is NaN. Rounding keeps the order, so the smallest and largest value tell for all.
    extremes = torch.stack(values.aminmax())
    if not torch.isfinite(extremes.to(getattr(torch, kind))).all():
        problem = f"is too large for {_NAMES[kind]}; export in another precision"
        if not torch.isfinite(extremes).all():
            problem = "is NaN or infinite; this checkpoint cannot be exported"
        raise CheckpointError(f"a value of weight {name} {problem}")
