"""Dynamic width on a device: one copy of the unit weights, of which every step reads prefixes.

The idea is that of `dydit.runtime.dynamic_width`. The weights are uploaded once, as they are stored. At the start of a
segment, units that turn on or off, and the units that move into freed slots, are exchanged by copies within the device:
three copies for each tensor of the two units, through a scratch buffer. The copies run on the compute stream, in order
with the launches, and nothing comes from the host.

    units            every tensor of units, 256-byte aligned: slots 0 .. H-1, with the units that are on in front;
                     and slot H, with zeros, where some segment has no unit on
    units.scratch    one unit of a tensor, during an exchange

A part with no unit on reads the unit of zeros, because some operators accept no empty input. It is exchanged with the
unit in front, and back before anything else moves. So an input always has the same address, and equal shapes mean equal
bindings. Execution contexts that segments share, and graphs captured from them, depend on that.
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
    UnitOrder,
    Upload,
    aligned,
)
from dydit.runtime.dynamic_width import Exchange, exchanges

UNITS, SCRATCH = "units", "units.scratch"


@dataclass(frozen=True)
class _Tensor:
    """A tensor of units: the offset of slot 0 in `units`; bytes and shape of one unit."""

    name: str
    dtype: str
    offset: int
    unit_bytes: int
    unit_shape: tuple[int, ...]

    def slot(self, number: int) -> Address:
        return Address(UNITS, self.offset + number * self.unit_bytes)


class UnitWeights:
    """Where a bundle's unit weights lie on the device, and the operations that bring a subnetwork's to the front."""

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

    def has_places_of(self, other: UnitWeights) -> bool:
        """Whether both have the same tensors at the same addresses, so that weights can stay where they are."""
        return self._tensors == other._tensors and self._zeros == other._zeros and self.buffers == other.buffers

    @property
    def stored(self) -> UnitOrder:
        """The order in which units are stored; the unit of zeros, numbered after the last unit, comes last."""
        return self._axis.nested([tuple(range(part.group.count + 1)) for part in self._axis.parts])

    def fill(self) -> tuple[Operation, ...]:
        """Upload all unit weights as they are stored."""
        ops: list[Operation] = []
        for part in self._axis.parts:
            units = part.group.count
            for tensor in self._tensors[part.start]:
                source = HostArray("weights", name=tensor.name)
                ops.append(Upload(tensor.slot(0), source, units * tensor.unit_bytes))
                if part.start in self._zeros:
                    ops.append(Clear(tensor.slot(units), tensor.unit_bytes))
        return (*ops, Arranged(self.stored))

    def enter(self, order: UnitOrder, subnet: int) -> tuple[tuple[Operation, ...], UnitOrder]:
        """The operations that bring a subnetwork's units to the front from `order`, and the order afterwards."""
        exchanges_to_make, after = self._exchanges(order, self._subnets[subnet])
        if not exchanges_to_make:
            return (), order
        copies = [copy for exchange in exchanges_to_make for copy in self._copies(exchange)]
        return (Arranged(None), *copies, Arranged(after)), after

    def _exchanges(self, order: UnitOrder, subnet: SubnetEntry) -> tuple[list[Exchange], UnitOrder]:
        done: list[Exchange] = []
        rows = [list(row) for _, row in self._axis.zip(order)]
        for row, (part, wanted) in zip(rows, self._axis.zip(subnet.units), strict=True):
            zeros = part.group.count
            if (row[0] == zeros) == bool(wanted):  # the zeros come to the front, or leave it
                _swap(row, 0, zeros)
                done.append(Exchange(part, 0, zeros))
            for first, second in exchanges(row, wanted):
                _swap(row, first, second)
                done.append(Exchange(part, first, second))
        return done, self._axis.nested([tuple(row) for row in rows])

    def _copies(self, exchange: Exchange) -> Iterator[Copy]:
        for tensor in self._tensors[exchange.part.start]:
            first, second = tensor.slot(exchange.first), tensor.slot(exchange.second)
            for to, source in ((Address(SCRATCH), first), (first, second), (second, Address(SCRATCH))):
                yield Copy(to, source, tensor.unit_bytes)

    def bindings(self, subnet: int) -> tuple[Binding, ...]:
        """The weight inputs of a subnetwork whose units are in front, in the order of `io_spec.unit_inputs`."""
        bindings = []
        for part, wanted in self._axis.zip(self._subnets[subnet].units):
            for tensor in self._tensors[part.start]:
                rows, *rest = tensor.unit_shape
                shape = (max(1, len(wanted)) * rows, *rest)
                bindings.append(Binding(tensor.name, tensor.dtype, shape, tensor.slot(0)))
        return tuple(bindings)


def _swap(row: list[int], first: int, second: int) -> None:
    row[first], row[second] = row[second], row[first]
