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

from collections.abc import Iterator
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
from dydit.runtime.dynamic_width import Exchange, exchanges

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
        self._axis, self._subnets = manifest.model.units, manifest.subnets
        each_wanted = (wanted for subnet in manifest.subnets for wanted in self._axis.zip(subnet.units))
        self._zeros = {part.start for part, units in each_wanted if not units}
        self._tensors: dict[int, list[_Tensor]] = {}
        end = 0
        for part in self._axis.parts:
            self._tensors[part.start] = []
            for name in map(part.stored, part.group.unit_tensors):
                entry = manifest.weights[name]
                unit = entry.nbytes // part.group.count
                self._tensors[part.start].append(_Tensor(name, entry.dtype, end, unit, entry.shape[1:]))
                end += aligned((part.group.count + (part.start in self._zeros)) * unit)
        self.buffers = {UNITS: end, SCRATCH: max(tensor.unit_bytes for tensor in self._all())}

    def _all(self) -> Iterator[_Tensor]:
        return (tensor for tensors in self._tensors.values() for tensor in tensors)

    @property
    def stored(self) -> Places:
        """The order in which units are stored; the zeros, numbered after the last unit, come last."""
        return self._axis.nested([tuple(range(part.group.count + 1)) for part in self._axis.parts])

    def fill(self) -> tuple[Operation, ...]:
        """Upload everything as it is stored."""
        ops: list[Operation] = []
        for part in self._axis.parts:
            units = part.group.count
            for tensor in self._tensors[part.start]:
                source = HostArray("weights", name=tensor.name)
                ops.append(Upload(tensor.place(0), source, units * tensor.unit_bytes))
                if part.start in self._zeros:
                    ops.append(Clear(tensor.place(units), tensor.unit_bytes))
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
        rows = [list(row) for _, row in self._axis.zip(places)]
        for row, (part, wanted) in zip(rows, self._axis.zip(subnet.units), strict=True):
            zeros = part.group.count
            if (row[0] == zeros) == bool(wanted):  # the zeros come to the front, or go
                _swap(row, 0, zeros)
                made.append(Exchange(part, 0, zeros))
            for first, second in exchanges(row, wanted):
                _swap(row, first, second)
                made.append(Exchange(part, first, second))
        return made, self._axis.nested([tuple(row) for row in rows])

    def _copies(self, exchange: Exchange) -> Iterator[Copy]:
        for tensor in self._tensors[exchange.part.start]:
            first, second = tensor.place(exchange.first), tensor.place(exchange.second)
            for to, source in ((Address(SCRATCH), first), (first, second), (second, Address(SCRATCH))):
                yield Copy(to, source, tensor.unit_bytes)

    def bindings(self, subnet: int) -> tuple[Binding, ...]:
        """The weight inputs of a subnetwork whose units are in front, in the order of `graph_io.unit_inputs`."""
        made = []
        for part, wanted in self._axis.zip(self._subnets[subnet].units):
            for tensor in self._tensors[part.start]:
                rows, *rest = tensor.unit_shape
                shape = (max(1, len(wanted)) * rows, *rest)
                made.append(Binding(tensor.name, tensor.dtype, shape, tensor.place(0)))
        return tuple(made)


def _swap(row: list[int], first: int, second: int) -> None:
    row[first], row[second] = row[second], row[first]
