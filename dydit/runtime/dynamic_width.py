"""Dynamic width on the host: one copy of the weights serves every width.

Each block keeps the units that are on in its first storage slots, so that the weights of a step are prefixes:

    mask of a step           0 1 . 3 4 . 6 .         wanted: units 0 1 3 4 6, in the first five slots
    unit in each slot        0 1 2 3 4 5 6 7         slot 2 holds a unit that is off
    exchange slots 2 and 6   0 1 6 3 4 5 2 7         slot 2 now holds unit 6

A unit stays in the slot of its own number where that is one of the first. Units from further behind fill, in order, the
slots of units that are off. So the order of a step's units, and with it the rounding of its sums, depends on its mask
alone: a run that is resumed in the middle repeats its numbers bit for bit. The units of a part may stand in any order,
as long as all of its tensors agree: the model computes the same function. From one step to the next, units are
exchanged in place. Only units that turn on or off move, and the units that fill the slots that become free; no unit is
read from the file again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from dydit.bundle.bundle import Bundle
from dydit.bundle.manifest import SubnetEntry
from dydit.dtypes import DTYPES
from dydit.models.architecture import Part, Slots, UnitAxis

T = TypeVar("T")
PIECE = 1 << 14
"""Values that are exchanged at a time, 64 KiB in fp32."""


@dataclass(frozen=True)
class Exchange:
    """Two storage slots of a part whose units are exchanged, in all of the part's tensors."""

    part: Part
    first: int
    second: int


def front(wanted: Sequence[int]) -> list[int]:
    """The units in the first slots when the units `wanted`, in ascending order, are on."""
    count, chosen = len(wanted), set(wanted)
    fillers = iter([unit for unit in wanted if unit >= count])
    return [slot if slot in chosen else next(fillers) for slot in range(count)]


def exchanges(order: Sequence[int], wanted: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs of slots to exchange, one after another, to bring `front(wanted)` to the front; one for each slot at most.

    `order`: the unit in each slot.
    """
    row, pairs = list(order), []
    for slot, unit in enumerate(front(wanted)):
        if row[slot] != unit:
            other = row.index(unit)
            row[slot], row[other] = unit, row[slot]
            pairs.append((slot, other))
    return pairs


class Arrangement:
    """Which unit lies in each storage slot, part by part; at first, units lie in the order in which they are stored."""

    def __init__(self, axis: UnitAxis):
        self._axis = axis
        self.order = [list(range(part.group.count)) for part in axis.parts]

    def arrange(self, wanted: Slots) -> list[Exchange]:
        """Bring the given units of every part to the front; returns the exchanges to make in the tensors, in order."""
        done = []
        for order, (part, units) in zip(self.order, self._axis.zip(wanted), strict=True):
            for first, second in exchanges(order, units):
                order[first], order[second] = order[second], order[first]
                done.append(Exchange(part, first, second))
        return done


def _exchange(one: np.ndarray, other: np.ndarray) -> None:
    """Exchange the values of two flat views, a piece at a time: its copy stays in the core's cache."""
    for start in range(0, one.size, PIECE):
        first, second = one[start : start + PIECE], other[start : start + PIECE]
        kept = first.copy()
        first[...] = second
        second[...] = kept


class DynamicWidthWeights:
    """A bundle's unit weights in host memory, arranged for one subnetwork after another.

    They are a private map of `weights.bin`: units that never move stay shared with the file, and units that move are
    copied page by page. No unit is in memory twice.

    The caller holds the backend's lock. From the first exchange until the step that reads the weights has ended, they
    count as unsettled. An interrupted step leaves them unsettled: they may be half exchanged, or threads may still read
    them. The next step then maps the file again, and nothing is ever written to the old map again.
    """

    def __init__(self, bundle: Bundle):
        self._bundle, self._axis = bundle, bundle.manifest.model.units
        self._settled = False
        self._arrangement = Arrangement(self._axis)
        self._units: dict[str, np.ndarray] = {}

    def run(self, subnet: SubnetEntry, step: Callable[[dict[str, np.ndarray]], T]) -> T:
        """Call `step` with the weight inputs of a subnetwork, which it must not keep; returns what it returns."""
        result = step(self._feeds(subnet))
        self._settled = True
        return result

    def _feeds(self, subnet: SubnetEntry) -> dict[str, np.ndarray]:
        """The weight inputs (`io_spec.unit_inputs`) of a subnetwork: views, valid until the next call.

        A part with no unit on gets one unit of zeros, which adds nothing: some operators accept no empty input.
        """
        if not self._settled:
            self._map()
        self._settled = False
        for exchange in self._arrangement.arrange(subnet.units):
            for tensor in exchange.part.group.unit_tensors:
                units = self._units[exchange.part.stored(tensor)]
                _exchange(units[exchange.first].reshape(-1), units[exchange.second].reshape(-1))
        feeds = {}
        for part, wanted in self._axis.zip(subnet.units):
            for name in map(part.stored, part.group.unit_tensors):
                units = self._units[name]
                front = units[: len(wanted)] if wanted else np.zeros_like(units[:1])
                feeds[name] = front.reshape(math.prod(front.shape[:2]), *front.shape[2:])
        return feeds

    def close(self) -> None:
        """Release the map."""
        self._settled = False
        self._units = {}

    def _map(self) -> None:
        """Map the file, with every unit in the slot in which it is stored."""
        entries = self._bundle.manifest.weights
        self._units = {}  # before the file is mapped again, or for a moment two copies would be in memory
        raw = self._bundle.mapped_weights("c")
        mapped = {}
        for name in (part.stored(tensor) for part in self._axis.parts for tensor in part.group.unit_tensors):
            entry = entries[name]
            flat = np.asarray(raw[entry.offset : entry.offset + entry.nbytes]).view(DTYPES[entry.dtype].storage)
            mapped[name] = flat.reshape(entry.shape)
        self._units, self._arrangement = mapped, Arrangement(self._axis)
