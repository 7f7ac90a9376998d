"""The structure of a model for the rest of dydit: its blocks, their unit groups, and the layers that units own.

A *unit* is what a width router turns on or off: an attention head, or a group of MLP channels. The units of one kind in
a block form a *unit group*. All units of a model are on one axis, [U]. Masks, gates and unit costs are arrays along it:

    block 0: heads 0..H-1 | block 0: MLP groups 0..H-1 | block 1: heads 0..H-1 | ...
    \\_____ a part _____/   \\_______ a part ________/

A *part* is one unit group of one block. There are P parts, in the same order. The units of a part are numbered as in
the checkpoint, or by *slot*, their storage order in a bundle: the most often active units come first.

This module imports neither PyTorch nor ONNX, because running a bundle needs it but neither of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

Slots = tuple[tuple[tuple[int, ...], ...], ...]
"""Ascending units of every part, by block and unit group."""


WIDTH_ROUTER = ("width.weight", "width.bias")
"""The stored tensors of all width routers, [U, D] and [U], with a row for each unit, by slot (`width_router_rows`)."""


class Side(StrEnum):
    """The side of a linear layer that is divided among units."""

    OUTPUT = "output"  # a unit owns outputs and their biases
    INPUT = "input"  # a unit owns inputs; the bias belongs to no unit


@dataclass(frozen=True)
class UnitLayer:
    """A linear layer of a block whose width depends on its active units, and which may be quantized.

    A bundle stores its weight as [units, unit_features, features], so the rows of a unit are contiguous.
    `unit_features`: channels per unit, on the side that is divided among units. `features`: channels on the other side.
    `scaled_inputs`: whether the factors of smoothed inputs are stored with the weight, because no layer before it can
    absorb them.
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
    def scale(self) -> str:
        """The stored name of the scales of output channels, which only 8 bits have, within its block."""
        return f"{self.name}.scale"

    @property
    def factor(self) -> str:
        """The stored name of the factors of smoothed inputs, which only 8 bits have, within its block."""
        return f"{self.name}.factor"

    @property
    def out_major(self) -> bool:
        """Whether the stored rows are outputs, [out, in], as in PyTorch. Otherwise they are inputs, [in, out]."""
        return self.side is Side.OUTPUT

    @property
    def unit_tensors(self) -> tuple[str, ...]:
        """Stored tensors whose first axis is the slot of the unit, in every precision."""
        return (self.weight, self.bias) if self.out_major else (self.weight,)

    @property
    def quantized_unit_tensors(self) -> tuple[str, ...]:
        """Such tensors that only 8 bits have: scales of output channels, factors of smoothed inputs."""
        scales = (self.scale,) if self.out_major else ()
        return (*scales, self.factor) if self.scaled_inputs else scales

    def in_features(self, units: int) -> int:
        """Input channels with the given number of active units."""
        return self.features if self.out_major else units * self.unit_features

    def out_features(self, units: int) -> int:
        """Output channels with the given number of active units."""
        return units * self.unit_features if self.out_major else self.features


@dataclass(frozen=True)
class UnitGroup:
    """The `count` units of one kind in a block, and the layers that are narrower if some of the units are off.

    `macs`: multiply-adds that one unit adds to a step for one image, with all tokens. `routed`: whether only the tokens
    that the block's token router selects pass through its layers. `attention`: whether attention, which stays in fp16
    with calibrated 8 bits, is between its layers. `attention_macs`: the part of `macs` that is attention and no layer.
    `title`: the name of its units in reports.
    """

    name: str
    count: int
    layers: tuple[UnitLayer, ...]
    macs: float
    routed: bool = False
    attention: bool = False
    title: str = ""
    attention_macs: float = 0.0

    @property
    def unit_tensors(self) -> tuple[str, ...]:
        """Stored tensors whose first axis is the unit's slot: the weight inputs of the graph of dynamic width."""
        return tuple(name for layer in self.layers for name in layer.unit_tensors)

    @property
    def all_unit_tensors(self) -> tuple[str, ...]:
        """`unit_tensors`, and those that may be stored with 8 bits."""
        return (*self.unit_tensors, *(name for layer in self.layers for name in layer.quantized_unit_tensors))


@dataclass(frozen=True)
class Product:
    """A matrix product of a step, or an attention, that no unit owns. Numbers are those of one row of the batch.

    `macs`: multiply-adds. `reads`, `writes`: values of its inputs and outputs, without weights. `weight`: the stored
    name of its weight; None for attention. `once`: whether it is computed once for an image, even with guidance.
    `router`: whether it is one of a token router.
    """

    macs: int
    reads: int
    writes: int
    weight: str | None = None
    once: bool = False
    router: bool = False

    @classmethod
    def of(
        cls, weight: str, vectors: int, inputs: int, outputs: int, once: bool = False, router: bool = False
    ) -> Product:
        """A linear layer on a number of vectors."""
        return cls(vectors * inputs * outputs, vectors * inputs, vectors * outputs, weight, once, router)


@dataclass(frozen=True)
class BlockSpec:
    """The unit groups of a block, in the order of execution."""

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
    """One unit group of one block. Its units are [start, stop) on the axis."""

    block: int
    index: int
    group: UnitGroup
    start: int

    @property
    def stop(self) -> int:
        """The index after its last unit."""
        return self.start + self.group.count

    @property
    def units(self) -> slice:
        """Its units as a slice of the axis."""
        return slice(self.start, self.stop)

    def stored(self, tensor: str) -> str:
        """The full stored name of one of its tensors: `blocks.3.layer.weight`."""
        return stored_name(self.block, tensor)


def stored_name(block: int, tensor: str) -> str:
    """The full name of a block's tensor in a bundle."""
    return f"blocks.{block}.{tensor}"


def block_of(stored: str) -> int | None:
    """The block of a tensor in a bundle, by its full name; None if it is of no block. The inverse of `stored_name`."""
    match = re.fullmatch(r"blocks\.(\d+)\..+", stored)
    return None if match is None else int(match[1])


class UnitAxis:
    """The axis of all units of a model, with methods for arrays along it."""

    def __init__(self, blocks: Sequence[BlockSpec]):
        self.blocks = tuple(blocks)
        parts: list[Part] = []
        for block, spec in enumerate(self.blocks):
            for index, group in enumerate(spec.groups):
                parts.append(Part(block, index, group, parts[-1].stop if parts else 0))
        self.parts = tuple(parts)
        self.size = parts[-1].stop if parts else 0
        if any(spec.layers != self.blocks[0].layers for spec in self.blocks):
            raise ValueError("the blocks of a model must have the same layers")
        if any(part.group.count < 1 for part in parts):
            raise ValueError("every unit group of a model must have at least one unit")
        self.layers = self.blocks[0].layers
        """The layers of a block that units own. All blocks have the same."""
        self.layer_names = tuple(layer.name for layer in self.layers)
        self.weights = {part.stored(layer.weight): layer for part in parts for layer in part.group.layers}
        """The layers that units own, by stored name of the weight. Only these weights may be quantized."""
        self.biases = frozenset(part.stored(layer.bias) for part in parts for layer in part.group.layers)
        self._starts = np.array([part.start for part in parts], np.int64)

    def counts(self, masks: np.ndarray) -> np.ndarray:
        """The number of active units of each part: [..., U] -> int64 [..., P]."""
        return np.add.reduceat(masks, self._starts, axis=-1, dtype=np.int64)

    def any(self, masks: np.ndarray) -> np.ndarray:
        """Whether each part has any active unit: bool [..., U] -> bool [..., P]."""
        return np.logical_or.reduceat(masks, self._starts, axis=-1)

    def spread(self, values: np.ndarray) -> np.ndarray:
        """Repeat the value of each part for all of its units: [..., P] -> [..., U]."""
        return np.repeat(values, [part.group.count for part in self.parts], axis=-1)

    def per_unit(self) -> np.ndarray:
        """Multiply-adds that each unit adds to a step for one image, with all tokens, f64 [U]."""
        return self.spread(np.array([part.group.macs for part in self.parts], np.float64))

    def routed_macs(self, masks: np.ndarray) -> np.ndarray:
        """Multiply-adds of the active units in routed groups, with all tokens: [..., U] -> [..., L]."""
        out = np.zeros((*masks.shape[:-1], len(self.blocks)))
        for part in self.parts:
            if part.group.routed:
                out[..., part.block] += masks[..., part.units].sum(axis=-1) * part.group.macs
        return out

    def of_group(self, values: np.ndarray, name: str) -> np.ndarray:
        """The units of one group of every block, if all have the same number: [..., U] -> [..., L, units]."""
        columns = [values[..., part.units] for part in self.parts if part.group.name == name]
        return np.stack(columns, axis=-2)

    @property
    def group_names(self) -> tuple[str, ...]:
        """The names of the unit groups, in the order of execution."""
        return tuple(self._units_of_groups())

    def shares(self, masks: np.ndarray) -> dict[str, float]:
        """The mean share of active units in masks [..., U], by name of the unit group."""
        return {name: float(masks[..., units].mean()) for name, units in self._units_of_groups().items()}

    def total_counts(self, mask: np.ndarray | None = None) -> dict[str, int]:
        """The number of active units by name of the unit group. `mask`: bool [U], by default all on."""
        on = np.ones(self.size, bool) if mask is None else mask
        return {name: int(on[units].sum()) for name, units in self._units_of_groups().items()}

    @property
    def group_titles(self) -> str:
        """The names of the unit groups' units in reports: "attention heads and channel groups"."""
        return " and ".join(dict.fromkeys(group.title or group.name for group in self.blocks[0].groups))

    def _units_of_groups(self) -> dict[str, list[int]]:
        units: dict[str, list[int]] = {}
        for part in self.parts:
            units.setdefault(part.group.name, []).extend(range(part.start, part.stop))
        return units

    def slots(self, mask: np.ndarray) -> Slots:
        """The active units of a mask, bool [U]."""
        return self.nested([tuple(map(int, np.flatnonzero(mask[part.units]))) for part in self.parts])

    def mask(self, slots: Iterable[Iterable[Iterable[int]]]) -> np.ndarray:
        """The mask, bool [U], with these active units: the inverse of `slots`. `ValueError` for unknown units."""
        mask = np.zeros(self.size, bool)
        for part, units in self.zip(slots):
            units = list(units)
            if not all(0 <= unit < part.group.count for unit in units):
                raise ValueError(f"block {part.block} has {part.group.count} {part.group.name}, not slots {units}")
            mask[[part.start + unit for unit in units]] = True
        return mask

    def nested(self, values: Sequence[Any]) -> tuple[tuple[Any, ...], ...]:
        """Values of all parts, nested by block and unit group. Raises `ValueError` for another number of values."""
        if len(values) != len(self.parts):
            raise ValueError(f"{len(values)} values for {len(self.parts)} unit groups")
        each = iter(values)
        return tuple(tuple(next(each) for _ in block.groups) for block in self.blocks)

    def zip(self, nested: Iterable[Iterable[Any]]) -> Iterator[tuple[Part, Any]]:
        """(part, value) of values nested by block and unit group. Raises `ValueError` for another number of values."""
        values = [value for block in nested for value in block]
        yield from zip(self.parts, values, strict=True)

    @property
    def every_unit(self) -> Slots:
        """All units of every part."""
        return self.nested([tuple(range(part.group.count)) for part in self.parts])
