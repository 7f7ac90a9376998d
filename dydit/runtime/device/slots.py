"""The unit weights of a sliding plan on a device: one copy, of which every step reads prefixes (`runtime.sliding`).

They are uploaded once, tensor after tensor, as they are stored. Entering a segment exchanges the units that toggle, and
those that fill their places, by copies within the device: three for each tensor of the two units, through a scratch
buffer, on the compute stream and so in order with the launches. Nothing comes from the host, so no second stream has to
refill weights while a step runs, and nothing can overtake anything.

    units            every tensor of units, 256-byte aligned: places 0 .. H-1, those of the units that are on in front;
                     and place H, with zeros, where a segment has nothing on
    units.scratch    one unit of a tensor, on its way

A part with nothing on reads the unit of zeros (some operators take no empty input): it changes places with the unit in
front, and back before anything else moves. So an input has one address for ever, and equal shapes mean equal bindings:
what the execution contexts that segments share, and the graphs captured from them, depend on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dydit.bundle.manifest import Manifest, SubnetEntry
from dydit.runtime.device.operations import (
    Address,
    Arranged,
    Binding,
    Clear,
    Copy,
    HostArray,
    Operation,
    Places,
    Upload,
    aligned,
)
from dydit.runtime.sliding import PARTS, Exchange, exchanges

UNITS, SCRATCH = "units", "units.scratch"


@dataclass(frozen=True)
class _Tensor:
    """A tensor of units: where place 0 is in `units`; bytes and shape of one unit."""

    name: str
    dtype: str
    offset: int
    unit_bytes: int
    unit_shape: tuple[int, ...]

    def place(self, place: int) -> Address:
        return Address(UNITS, self.offset + place * self.unit_bytes)


class Slots:
    """Where the unit weights of a bundle lie, and the operations that bring a subnetwork's to the front."""

    def __init__(self, manifest: Manifest):
        model, self._subnets = manifest.model, manifest.subnets
        self._units, self._depth = model.num_heads, model.depth
        each_wanted = (wanted for subnet in manifest.subnets for wanted in _wanted(subnet))
        self._zeros = {(block, part) for block, part, units in each_wanted if not units}
        self._tensors: dict[tuple[int, int], list[_Tensor]] = {}
        end = 0
        for key in ((block, part) for block in range(model.depth) for part in range(len(PARTS))):
            self._tensors[key] = []
            for name in (f"blocks.{key[0]}.{tensor}" for tensor in PARTS[key[1]]):
                entry = manifest.weights[name]
                unit = entry.nbytes // self._units
                self._tensors[key].append(_Tensor(name, entry.dtype, end, unit, entry.shape[1:]))
                end += aligned((self._units + (key in self._zeros)) * unit)
        self.buffers = {UNITS: end, SCRATCH: max(tensor.unit_bytes for tensor in self._all())}

    def _all(self) -> Iterator[_Tensor]:
        return (tensor for tensors in self._tensors.values() for tensor in tensors)

    @property
    def stored(self) -> Places:
        """The order in which units are stored; the zeros, numbered H, come last."""
        return ((tuple(range(self._units + 1)),) * len(PARTS),) * self._depth

    def fill(self) -> tuple[Operation, ...]:
        """Upload everything as it is stored."""
        ops: list[Operation] = []
        for key, tensors in self._tensors.items():
            for tensor in tensors:
                source = HostArray("weights", name=tensor.name)
                ops.append(Upload(tensor.place(0), source, self._units * tensor.unit_bytes))
                if key in self._zeros:
                    ops.append(Clear(tensor.place(self._units), tensor.unit_bytes))
        return (*ops, Arranged(self.stored))

    def enter(self, places: Places, subnet: int) -> tuple[tuple[Operation, ...], Places]:
        """What brings a subnetwork's units to the front, with the units at `places`; and their places then."""
        made, after = self._exchanges(places, self._subnets[subnet])
        if not made:
            return (), places
        copies = [copy for exchange in made for copy in self._copies(exchange)]
        return (Arranged(None), *copies, Arranged(after)), after

    def _exchanges(self, places: Places, subnet: SubnetEntry) -> tuple[list[Exchange], Places]:
        made: list[Exchange] = []
        rows = [[list(row) for row in block] for block in places]
        for block, part, wanted in _wanted(subnet):
            row = rows[block][part]
            if (row[0] == self._units) == bool(wanted):  # the zeros come to the front, or go
                _swap(row, 0, self._units)
                made.append(Exchange(block, part, 0, self._units))
            for first, second in exchanges(row, wanted):
                _swap(row, first, second)
                made.append(Exchange(block, part, first, second))
        return made, tuple(tuple(map(tuple, block)) for block in rows)

    def _copies(self, exchange: Exchange) -> Iterator[Copy]:
        for tensor in self._tensors[exchange.block, exchange.part]:
            first, second = tensor.place(exchange.first), tensor.place(exchange.second)
            for to, source in ((Address(SCRATCH), first), (first, second), (second, Address(SCRATCH))):
                yield Copy(to, source, tensor.unit_bytes)

    def bindings(self, subnet: int) -> tuple[Binding, ...]:
        """The weight inputs of a subnetwork whose units are in front, in the order of `graph_io.unit_inputs`."""
        made = []
        for block, part, wanted in _wanted(self._subnets[subnet]):
            for tensor in self._tensors[block, part]:
                rows, *rest = tensor.unit_shape
                shape = (max(1, len(wanted)) * rows, *rest)
                made.append(Binding(tensor.name, tensor.dtype, shape, tensor.place(0)))
        return tuple(made)


def _wanted(subnet: SubnetEntry) -> Iterator[tuple[int, int, Sequence[int]]]:
    """(block, part, units that are on), in the order of the weights."""
    for block, parts in enumerate(zip(subnet.heads, subnet.groups, strict=True)):
        for part, units in enumerate(parts):
            yield block, part, units


def _swap(row: list[int], first: int, second: int) -> None:
    row[first], row[second] = row[second], row[first]
