"""`weights.bin`: every weight once, laid out so that a subnetwork's slice is a run of rows (DESIGN, decision 2).

The layout itself (names, rows in the order of units) is `dydit.models.dit.layout`; here are the file and its windows.
Each tensor starts on a 4096-byte boundary, so that runtimes can map it.
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
"""Numbers that are converted and written at once: 64 MiB of them."""
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
    """What a bundle of `precision` stores for a tensor of the layout: itself in its type, or the copies of 8 bits."""
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
    """Write tensors one after another, aligned; returns where each lies. `copies`: of weights in 8 bits, by name.

    Only one tensor is in memory at a time, and of its conversion a piece. Raises `CheckpointError` for a value that is
    not finite, or is not any more in the bundle's precision.
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
    """Fill up to where a tensor may start, and say what starts there."""
    file.write(b"\0" * (-file.tell() % ALIGNMENT))
    return WeightEntry(offset=file.tell(), shape=tuple(tensor.shape), dtype=kind)


def _require_finite(name: str, values: Tensor, kind: StoredType) -> None:
    if not values.numel():
        return
    extremes = torch.stack(values.aminmax())  # NaN where any is; rounding keeps the order, so these two tell for all
    if not torch.isfinite(extremes.to(getattr(torch, kind))).all():
        trouble = f"is too large for {_NAMES[kind]}; export in another precision"
        if not torch.isfinite(extremes).all():
            trouble = "is NaN or infinite; this checkpoint cannot be exported"
        raise CheckpointError(f"a value of weight {name} {trouble}")
