"""What the rest of dydit knows of a model's structure: its blocks, their unit groups, and the layers that units own.

A *unit* is what a width router switches: an attention head, or a group of MLP channels. Units of one kind in one block
form a *unit group*. All units of a model lie on one axis, [U]; masks, gates and unit costs are arrays along it:

    block 0: heads 0..H-1 | block 0: MLP groups 0..H-1 | block 1: heads 0..H-1 | ...
    \\_____ a part _____/   \\_______ a part ________/

A *part* is one group of one block; there are P of them, in the same order. Within a part, units are numbered by
checkpoint (as the model was trained) or by *slot* (as they are stored in a bundle: most often used first).

No PyTorch and no ONNX here: running a bundle needs this module and neither of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

Slots = tuple[tuple[tuple[int, ...], ...], ...]
"""Ascending units of every part, by block and unit group."""


class Side(StrEnum):
    """Which side of a linear layer units share out."""

    OUTPUT = "output"  # a unit owns outputs, and their biases
    INPUT = "input"  # a unit owns inputs; the bias is everybody's


@dataclass(frozen=True)
class UnitLayer:
    """A linear layer of a block whose width follows its units, and which may be quantized.

    A bundle stores its weight as [units, unit_features, features], so that the rows of a unit lie together:
    `unit_features` on the side that units share out, `features` on the other one. `scaled_inputs`: where inputs are
    smoothed for 8 bits, their factors are stored beside the weight, because no layer before it can take them over.
    """

    name: str
    side: Side
    unit_features: int
    features: int
    scaled_inputs: bool = False

    @property
    def weight(self) -> str:
        """The stored name of the weight, within its block."""
        return f"{self.name}.weight"

    @property
    def bias(self) -> str:
        """The stored name of the bias, within its block."""
        return f"{self.name}.bias"

    @property
    def out_major(self) -> bool:
        """Whether stored rows are outputs: [out, in], as PyTorch has them; else they are inputs: [in, out]."""
        return self.side is Side.OUTPUT

    @property
    def unit_tensors(self) -> tuple[str, ...]:
        """Stored tensors whose first axis is the unit's slot, in every precision."""
        return (self.weight, self.bias) if self.out_major else (self.weight,)

    @property
    def quantized_unit_tensors(self) -> tuple[str, ...]:
        """Those that 8 bits may add: scales of output channels, factors of smoothed inputs."""
        scales = (f"{self.name}.scale",) if self.out_major else ()
        return (*scales, f"{self.name}.factor") if self.scaled_inputs else scales

    def in_features(self, units: int) -> int:
        """Input channels with so many units."""
        return self.features if self.out_major else units * self.unit_features

    def out_features(self, units: int) -> int:
        """Output channels with so many units."""
        return units * self.unit_features if self.out_major else self.features


@dataclass(frozen=True)
class UnitGroup:
    """Units of one kind in a block: `count` of them, and the layers that become narrower with each that is off.

    `macs`: multiply-adds that one unit adds to a step for one image, all tokens counted. `routed`: only the tokens that
    the block's token router selects pass through its layers. `attention`: between its layers stands attention, which
    calibrated 8 bits leave in fp16. `title`: its units, for a person.
    """

    name: str
    count: int
    layers: tuple[UnitLayer, ...]
    macs: float
    routed: bool = False
    attention: bool = False
    title: str = ""

    @property
    def unit_tensors(self) -> tuple[str, ...]:
        """Stored tensors whose first axis is the unit's slot, in every precision: inputs of a graph of any width."""
        return tuple(name for layer in self.layers for name in layer.unit_tensors)

    @property
    def all_unit_tensors(self) -> tuple[str, ...]:
        """The same with those that 8 bits may add."""
        return (*self.unit_tensors, *(name for layer in self.layers for name in layer.quantized_unit_tensors))


@dataclass(frozen=True)
class BlockSpec:
    """A block as far as width is concerned: its unit groups, in the order of execution."""

    groups: tuple[UnitGroup, ...]

    @property
    def layers(self) -> tuple[UnitLayer, ...]:
        """The layers that units own, in the order of execution."""
        return tuple(layer for group in self.groups for layer in group.layers)

    def group_of(self, layer: str) -> int:
        """The index of the unit group that owns a layer."""
        return next(i for i, group in enumerate(self.groups) if any(each.name == layer for each in group.layers))


@dataclass(frozen=True)
class Part:
    """One unit group of one block: where its units lie on the axis, [start, stop)."""

    block: int
    index: int
    group: UnitGroup
    start: int

    @property
    def stop(self) -> int:
        """One past its last unit."""
        return self.start + self.group.count

    @property
    def units(self) -> slice:
        """Its place on the axis."""
        return slice(self.start, self.stop)

    def stored(self, tensor: str) -> str:
        """The full name of one of its stored tensors: `blocks.3.layer.weight`."""
        return stored_name(self.block, tensor)


def stored_name(block: int, tensor: str) -> str:
    """The full name of a block's tensor in a bundle."""
    return f"blocks.{block}.{tensor}"


class UnitAxis:
    """The axis of all units of a model, and how arrays along it are taken apart and put together."""

    def __init__(self, blocks: Sequence[BlockSpec]):
        self.blocks = tuple(blocks)
        parts: list[Part] = []
        for block, spec in enumerate(self.blocks):
            for index, group in enumerate(spec.groups):
                parts.append(Part(block, index, group, parts[-1].stop if parts else 0))
        self.parts = tuple(parts)
        self.size = parts[-1].stop if parts else 0
        if any(spec.layers != self.blocks[0].layers for spec in self.blocks):
            raise ValueError("the blocks of a model hold the same layers")
        if any(part.group.count < 1 for part in parts):
            raise ValueError("every unit group of a model has at least one unit")
        self.layers = self.blocks[0].layers
        """The layers of a block whose width follows its units; every block has them."""
        self.layer_names = tuple(layer.name for layer in self.layers)
        self.weights = {part.stored(layer.weight): layer for part in parts for layer in part.group.layers}
        """The layer of every stored weight that units own: those that may be quantized."""
        self.biases = frozenset(part.stored(layer.bias) for part in parts for layer in part.group.layers)
        self._starts = np.array([part.start for part in parts], np.int64)

    def counts(self, masks: np.ndarray) -> np.ndarray:
        """How many units of each part are on: [..., U] -> int64 [..., P]."""
        return np.add.reduceat(masks, self._starts, axis=-1, dtype=np.int64)

    def any(self, masks: np.ndarray) -> np.ndarray:
        """Whether any unit of each part is on: bool [..., U] -> bool [..., P]."""
        return np.logical_or.reduceat(masks, self._starts, axis=-1)

    def spread(self, values: np.ndarray) -> np.ndarray:
        """One value for each part, for each of its units: [..., P] -> [..., U]."""
        return np.repeat(values, [part.group.count for part in self.parts], axis=-1)

    def per_unit(self) -> np.ndarray:
        """Multiply-adds that each unit adds to a step for one image, all tokens counted, f64 [U]."""
        return self.spread(np.array([part.group.macs for part in self.parts], np.float64))

    def routed_macs(self, masks: np.ndarray) -> np.ndarray:
        """Multiply-adds of the units that are on and routed, all tokens counted: [..., U] -> [..., L]."""
        out = np.zeros((*masks.shape[:-1], len(self.blocks)))
        for part in self.parts:
            if part.group.routed:
                out[..., part.block] += masks[..., part.units].sum(axis=-1) * part.group.macs
        return out

    def of_group(self, values: np.ndarray, name: str) -> np.ndarray:
        """The units of one group of every block, of blocks that all have as many: [..., U] -> [..., L, units]."""
        columns = [values[..., part.units] for part in self.parts if part.group.name == name]
        return np.stack(columns, axis=-2)

    @property
    def group_names(self) -> tuple[str, ...]:
        """The names of the unit groups, in the order of execution."""
        return tuple(self._units_of_groups())

    def shares(self, masks: np.ndarray) -> dict[str, float]:
        """Mean share of units that are on, [..., U], by name of the unit group."""
        return {name: float(masks[..., units].mean()) for name, units in self._units_of_groups().items()}

    def total_counts(self, mask: np.ndarray | None = None) -> dict[str, int]:
        """How many units of each group are on over all blocks, by name; by default all of them."""
        on = np.ones(self.size, bool) if mask is None else mask
        return {name: int(on[units].sum()) for name, units in self._units_of_groups().items()}

    def _units_of_groups(self) -> dict[str, list[int]]:
        units: dict[str, list[int]] = {}
        for part in self.parts:
            units.setdefault(part.group.name, []).extend(range(part.start, part.stop))
        return units

    def slots(self, mask: np.ndarray) -> Slots:
        """The units that a mask bool [U] has on."""
        return self.nested([tuple(map(int, np.flatnonzero(mask[part.units]))) for part in self.parts])

    def mask(self, slots: Iterable[Iterable[Iterable[int]]]) -> np.ndarray:
        """The mask bool [U] that has these units on: the inverse of `slots`. Raises `ValueError` for others' units."""
        mask = np.zeros(self.size, bool)
        for part, units in self.zip(slots):
            units = list(units)
            if not all(0 <= unit < part.group.count for unit in units):
                raise ValueError(f"block {part.block} has {part.group.count} {part.group.name}, not units {units}")
            mask[[part.start + unit for unit in units]] = True
        return mask

    def nested(self, values: Sequence[Any]) -> tuple[tuple[Any, ...], ...]:
        """One value for each part, by block and unit group. Raises `ValueError` where there are more or fewer."""
        if len(values) != len(self.parts):
            raise ValueError(f"{len(values)} values for {len(self.parts)} unit groups")
        each = iter(values)
        return tuple(tuple(next(each) for _ in block.groups) for block in self.blocks)

    def zip(self, nested: Iterable[Iterable[Any]]) -> Iterator[tuple[Part, Any]]:
        """(part, its value) of values by block and unit group. Raises `ValueError` where they are not of this axis."""
        values = [value for block in nested for value in block]
        yield from zip(self.parts, values, strict=True)

    @property
    def every_unit(self) -> Slots:
        """All units of every part."""
        return self.nested([tuple(range(part.group.count)) for part in self.parts])
