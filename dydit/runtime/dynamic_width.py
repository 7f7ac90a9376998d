"""One copy of the weights for every width: each block keeps the units that are on in the first places of its rows, so
that a step's weights are prefixes (DESIGN, decision 12).

    mask of a step          0 1 . 3 4 . 6 .         wanted: units 0 1 3 4 6, in five places
    places before           0 1 2 3 4 5 6 7         place 2 is of a unit that is off
    exchange places 2, 6    0 1 6 3 4 5 2 7         unit 6 takes it

A unit stands in the place of its number where that is one of the first; units from further behind fill, in order, what
units that are off leave. So the order of a step's units, and with it the rounding of its sums, depends on its mask
alone, and a run that goes on in the middle repeats its numbers bit for bit. Heads may stand in any order, and so may
channel groups, as long as all tensors of the block agree: the model is the same function. From one step to the next
only units that toggle and fillers move, by exchanges in place. Nothing is lost, so nothing is ever read again.
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


@dataclass(frozen=True)
class Exchange:
    """Two places of a part (a block's heads, or its groups) whose units change places, in all of the part's tensors."""

    part: Part
    first: int
    second: int


def front(wanted: Sequence[int]) -> list[int]:
    """The units of the first places, where those that are on are `wanted`, in ascending order."""
    count, chosen = len(wanted), set(wanted)
    fillers = iter([unit for unit in wanted if unit >= count])
    return [place if place in chosen else next(fillers) for place in range(count)]


def exchanges(places: Sequence[int], wanted: Sequence[int]) -> list[tuple[int, int]]:
    """Exchanges of places, in order, after which `front(wanted)` is in front; one for each place that differs, at most.

    `places`: the unit in each place.
    """
    row, made = list(places), []
    for place, unit in enumerate(front(wanted)):
        if row[place] != unit:
            other = row.index(unit)
            row[place], row[other] = unit, row[place]
            made.append((place, other))
    return made


class Arrangement:
    """Which unit stands in which place, for each part in turn; at first the order in which they are stored."""

    def __init__(self, axis: UnitAxis):
        self._axis = axis
        self.places = [list(range(part.group.count)) for part in axis.parts]

    def arrange(self, slots: Slots) -> list[Exchange]:
        """Bring the given units of every part to the front; returns what to do to the tensors, in this order."""
        made = []
        for places, (part, units) in zip(self.places, self._axis.zip(slots), strict=True):
            for first, second in exchanges(places, units):
                places[first], places[second] = places[second], places[first]
                made.append(Exchange(part, first, second))
        return made


class SlidingWeights:
    """A bundle's unit weights in host memory, arranged for one subnetwork after another.

    They are a private map of `weights.bin`: units that never move stay shared with the file, those that do are copied
    by the page, and none is in memory twice.

    Whoever uses them holds the backend's lock. From the first exchange until the step that reads the weights has ended,
    they count as unsettled. A step that was interrupted leaves them so: half exchanged, perhaps, or read by threads
    that still work on the step. The next one then maps the file anew, and nothing is ever written to the old map again.
    """

    def __init__(self, bundle: Bundle):
        self._bundle, self._axis = bundle, bundle.manifest.model.units
        self._settled = False
        self._arrangement = Arrangement(self._axis)
        self._units: dict[str, np.ndarray] = {}

    def run(self, subnet: SubnetEntry, step: Callable[[dict[str, np.ndarray]], T]) -> T:
        """What `step` returns for the weight inputs of a subnetwork, which it must not keep."""
        result = step(self._feeds(subnet))
        self._settled = True
        return result

    def _feeds(self, subnet: SubnetEntry) -> dict[str, np.ndarray]:
        """The weight inputs (`graph_io.unit_inputs`) of a subnetwork: views, good until the next call.

        A part with no unit on gets one whose weights are zeros, which adds nothing: some operators take no empty input.
        """
        if not self._settled:
            self._map()
        self._settled = False
        for exchange in self._arrangement.arrange(subnet.units):
            places = [exchange.first, exchange.second]
            for tensor in exchange.part.group.unit_tensors:
                units = self._units[exchange.part.stored(tensor)]
                units[places] = units[places[::-1]]
        fed = {}
        for part, wanted in self._axis.zip(subnet.units):
            for name in map(part.stored, part.group.unit_tensors):
                units = self._units[name]
                front = units[: len(wanted)] if wanted else np.zeros_like(units[:1])
                fed[name] = front.reshape(math.prod(front.shape[:2]), *front.shape[2:])
        return fed

    def close(self) -> None:
        """Let go of the map."""
        self._settled = False
        self._units = {}

    def _map(self) -> None:
        """Map the file, with every unit in the place where it is stored."""
        entries = self._bundle.manifest.weights
        self._units = {}  # before the file is mapped again, or for a moment two copies would be in memory
        raw = self._bundle.mapped_weights("c")
        mapped = {}
        for name in (part.stored(tensor) for part in self._axis.parts for tensor in part.group.unit_tensors):
            entry = entries[name]
            flat = np.asarray(raw[entry.offset : entry.offset + entry.nbytes]).view(DTYPES[entry.dtype].storage)
            mapped[name] = flat.reshape(entry.shape)
        self._units, self._arrangement = mapped, Arrangement(self._axis)
