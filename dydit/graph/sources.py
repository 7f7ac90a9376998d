"""Where a graph's weights come from: windows on `weights.bin`, or inputs of the graph.

With windows a subnetwork is static, and a runtime can optimize it for its width. With inputs of symbolic width, one
graph serves every width.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from dydit.bundle.io_spec import TensorSpec, unit_input
from dydit.bundle.stored_weights import ALIGNMENT, WEIGHTS, WeightEntry
from dydit.graph.ops import DATA_TYPES, Ops
from dydit.models.architecture import Part


class WeightSource(ABC):
    """Provides the values that functions take as weights, and collects the initializers and inputs of the graph."""

    def __init__(self) -> None:
        self.initializers: dict[str, ir.Value] = {}
        self.inputs: list[TensorSpec] = []

    def local(self, name: str, array: np.ndarray) -> ir.Value:
        """A small constant of the graph itself."""
        if name not in self.initializers:
            self.initializers[name] = _initializer(name, ir.tensor(array, name=name))
        return self.initializers[name]

    @abstractmethod
    def whole(self, name: str) -> ir.Value:
        """A whole stored tensor."""

    @abstractmethod
    def has(self, name: str) -> bool:
        """Whether a tensor is stored."""

    @abstractmethod
    def units(self, ops: Ops, part: Part, tensor: str, slots: Sequence[int], padding: int = 0) -> ir.Value:
        """The rows of the given slots of a part's tensor, with the axis of units merged into the next axis.

        `padding`: a number of rows to follow, with any finite values. Only 8-bit weights for compilers have them.
        """

    @property
    def any_width(self) -> bool:
        """Whether the graph serves any number of units."""
        return False


class Windows(WeightSource):
    """Weights as external data: windows on `weights.bin`, concatenated if slots are not consecutive."""

    def __init__(self, entries: Mapping[str, WeightEntry]):
        super().__init__()
        self.entries = entries

    def whole(self, name: str) -> ir.Value:
        entry = self.entries[name]
        return self._external(name, entry)

    def has(self, name: str) -> bool:
        return name in self.entries

    def rows(self, name: str, first: int, end: int) -> ir.Value:
        """Rows first..end-1 of a stored tensor."""
        entry = self.entries[name]
        return self._external(f"{name}[{first}:{end}]", entry, first, (end - first, *entry.shape[1:]))

    def units(self, ops: Ops, part: Part, tensor: str, slots: Sequence[int], padding: int = 0) -> ir.Value:
        assert not padding, "only one window can be followed by other rows"
        name = part.stored(tensor)
        entry = self.entries[name]
        rows, *rest = entry.shape[1:]
        pieces = [
            self._external(f"{name}[{first}:{first + count}]", entry, first, (count * rows, *rest))
            for first, count in runs(slots)
        ]
        return pieces[0] if len(pieces) == 1 else ops.Concat(*pieces, axis=0)

    def _external(
        self, name: str, entry: WeightEntry, first: int = 0, shape: tuple[int, ...] | None = None
    ) -> ir.Value:
        """The window of `shape` from row `first` of a stored tensor on; by default the whole tensor."""
        if name not in self.initializers:
            shape = entry.shape if shape is None else shape
            offset = entry.offset + first * entry.item_bytes * math.prod(entry.shape[1:])
            length = entry.item_bytes * math.prod(shape)
            tensor = ir.ExternalTensor(
                WEIGHTS, offset, length, DATA_TYPES[entry.dtype], shape=ir.Shape(shape), name=name
            )
            self.initializers[name] = _initializer(name, tensor)
        return self.initializers[name]


class GatheredUnits:
    """Copies of units that are not consecutive, at the end of `weights.bin`. Each set of units has one copy."""

    def __init__(self, file: Path):
        self.file = file
        self._copies: dict[tuple[str, tuple[int, ...], int], WeightEntry] = {}

    def entry(self, name: str, entry: WeightEntry, slots: Sequence[int], padding: int = 0) -> WeightEntry:
        """The entry of a consecutive copy of the units `slots` of a stored tensor, [rows of all units, ...].

        `padding`: rows of zeros to follow.
        """
        key = name, tuple(slots), padding
        if key not in self._copies:
            unit = entry.nbytes // entry.shape[0]
            with open(self.file, "r+b") as file:
                pieces = []
                for slot in slots:
                    file.seek(entry.offset + slot * unit)
                    pieces.append(file.read(unit))
                rows, *rest = entry.shape[1:]
                pieces.append(b"\0" * (entry.item_bytes * math.prod(rest) * padding))
                end = file.seek(0, 2)
                file.write(b"\0" * (-end % ALIGNMENT) + b"".join(pieces))
            shape = (len(slots) * rows + padding, *rest)
            self._copies[key] = WeightEntry(offset=end + -end % ALIGNMENT, shape=shape, dtype=entry.dtype)
        return self._copies[key]


class SolidWindows(Windows):
    """Windows for compilers, which refuse concatenations of 8-bit constants. Units with gaps are copied instead.

    Rows of padding are those of the units that follow in the file. Where too few follow, the units are copied.
    """

    def __init__(self, entries: Mapping[str, WeightEntry], gathered: GatheredUnits):
        super().__init__(entries)
        self._gathered = gathered

    def units(self, ops: Ops, part: Part, tensor: str, slots: Sequence[int], padding: int = 0) -> ir.Value:
        name = part.stored(tensor)
        entry = self.entries[name]
        first, count = slots[0], len(slots)
        (units, rows, *rest), window = entry.shape, f"{name}[{first}:{first + count}]"
        if entry.item_bytes > 1 or (len(list(runs(slots))) == 1 and not padding):
            return super().units(ops, part, tensor, slots, padding)
        if slots[-1] == first + count - 1 and padding <= (units - first - count) * rows:
            return self._external(window, entry, first, (count * rows + padding, *rest))
        solid = self._gathered.entry(name, entry, slots, padding)
        return self._external(f"{name}{list(slots)}", solid, 0, solid.shape)


class WeightInputs(Windows):
    """Weights of units as graph inputs whose first dimension is a symbol. Tensors of fixed width stay constants."""

    any_width = True

    def units(self, ops: Ops, part: Part, tensor: str, slots: Sequence[int], padding: int = 0) -> ir.Value:
        assert not padding, "of an unknown width"
        spec = unit_input(part, tensor, self.entries[part.stored(tensor)])
        self.inputs.append(spec)
        return graph_value(spec)


def _initializer(name: str, tensor: ir.TensorProtocol) -> ir.Value:
    return ir.Value(
        name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
    )


def graph_value(spec: TensorSpec) -> ir.Value:
    """The value of a graph's input or output."""
    return ir.Value(name=spec.name, shape=ir.Shape(spec.shape), type=ir.TensorType(DATA_TYPES[spec.dtype]))


def runs(slots: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Runs of consecutive numbers in ascending slots, as (first, count). A prefix is one run."""
    if not slots:
        return
    first = previous = slots[0]
    for slot in slots[1:]:
        if slot != previous + 1:
            yield first, previous - first + 1
            first = slot
        previous = slot
    yield first, previous - first + 1
