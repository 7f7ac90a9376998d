"""The memory that a plan's subnetworks take when all of them are loaded. NumPy only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dydit.bundle.measurements import Residency
from dydit.bundle.stored_weights import Precision, WeightEntry, fp16_name, stored_type
from dydit.dtypes import DTYPES
from dydit.models.architecture import Slots, UnitAxis, UnitLayer
from dydit.models.config import ModelConfig
from dydit.planning.plan import Plan


@dataclass(frozen=True, eq=False)
class SubnetSize:
    """The size of a subnetwork. `key`: equal for equal subnetworks. `mapped_units`: the units that it maps, bool [U].

    `mapped` and `joined`: bytes of the weights of units that it maps, and of units that it joins into its own copy.
    """

    key: tuple[bytes, bytes]
    mapped_units: np.ndarray
    mapped: int
    joined: int


class PlanSizes:
    """Sizes of the plans of one model. The size of a segment is computed once for all plans that have it.

    `masks`: bool [S, U], by slot. `unit_bytes`: bytes of each unit's weights, [U]. `fixed`: bytes of the other weights
    that every subnetwork reads.
    """

    def __init__(self, axis: UnitAxis, masks: np.ndarray, unit_bytes: np.ndarray, fixed: int):
        self._axis, self._masks, self._unit_bytes, self._fixed = axis, masks, unit_bytes, fixed
        self._known: dict[tuple[int, int], SubnetSize] = {}

    def subnets(self, plan: Plan) -> list[SubnetSize]:
        """A plan's distinct subnetworks. As in the exporter, the same units with and without gates count as two."""
        each = (self._segment(*segment) for segment in plan.segments)
        return list({subnet.key: subnet for subnet in each}.values())

    def weights(self, plan: Plan) -> int:
        """Bytes of the weights of a plan's subnetworks if each has its own copy, as engines do."""
        return sum(subnet.mapped + subnet.joined + self._fixed for subnet in self.subnets(plan))

    def resident(self, plan: Plan, residency: Residency) -> int:
        """Bytes of memory with all of a plan's subnetworks loaded, by the formula of `Residency`."""
        subnets, depth = self.subnets(plan), len(self._axis.blocks)
        mapped = np.logical_or.reduce([subnet.mapped_units for subnet in subnets])
        shared = float((mapped * self._unit_bytes).sum()) + self._fixed
        own = sum(residency.mapped * subnet.mapped + residency.joined * subnet.joined for subnet in subnets)
        each = residency.subnet + depth * residency.block
        fitted = residency.workspace + residency.shared * shared + len(subnets) * each + own
        return round((1 + residency.margin) * fitted)

    def _segment(self, first: int, end: int) -> SubnetSize:
        if (first, end) not in self._known:
            masks = self._masks[first:end]
            union = np.asarray(masks.any(axis=0))
            gated = self._axis.any((masks != union).any(axis=0))
            mapped = union & self._axis.spread(self._side_by_side(union))
            size, total = (int((units * self._unit_bytes).sum()) for units in (mapped, union))
            self._known[first, end] = SubnetSize((union.tobytes(), gated.tobytes()), mapped, size, total - size)
        return self._known[first, end]

    def _side_by_side(self, union: np.ndarray) -> np.ndarray:
        """Whether the units of each part have no gaps between them, bool [P]."""
        starts = union & ~np.concatenate([[False], union[:-1]])
        starts[[part.start for part in self._axis.parts]] = union[[part.start for part in self._axis.parts]]
        return self._axis.counts(starts) <= 1


def unit_bytes(model: ModelConfig, precision: Precision = Precision.FP32) -> np.ndarray:
    """Bytes of each unit's weights, [U] float64."""
    item, channel = DTYPES[precision.weight_dtype].bytes, _channel_bytes(precision)

    def of(layer: UnitLayer) -> int:
        return item * layer.unit_features * layer.features + channel * layer.unit_features * layer.out_major

    return model.units.spread(np.array([sum(map(of, part.group.layers)) for part in model.units.parts], np.float64))


def subnet_bytes(
    model: ModelConfig,
    precision: Precision,
    weights: Mapping[str, WeightEntry],
    slots: Slots,
    fp16_layers: Sequence[Sequence[str]] | None,
) -> int:
    """Bytes of stored weights that a subnetwork with these slots reads. `fp16_layers`: by block."""
    total = fixed_bytes(model, precision)
    for part, units in model.units.zip(slots):
        in_fp16 = fp16_layers[part.block] if fp16_layers else ()
        for layer in part.group.layers:
            for tensor in (*layer.unit_tensors, *layer.quantized_unit_tensors):
                name = part.stored(tensor)
                if layer.name in in_fp16:
                    if tensor == layer.scale:  # a layer in fp16 reads no scales
                        continue
                    name = fp16_name(name) if tensor == layer.weight else name
                if (stored := weights.get(name)) is not None:
                    total += stored.nbytes // part.group.count * len(units)
        # The scales of inner-major layers belong to no unit, so `fixed_bytes` counted them.
        in_major = [layer for layer in part.group.layers if layer.name in in_fp16 and not layer.out_major]
        total -= sum(4 * layer.features for layer in in_major)
    return total


def _channel_bytes(precision: Precision) -> int:
    """Bytes of the bias of an output channel and, with 8 bits, of its scale."""
    return DTYPES[precision.dtype].bytes + (4 if precision.in_8_bits else 0)


def fixed_bytes(model: ModelConfig, precision: Precision = Precision.FP32) -> int:
    """Bytes of the weights that every subnetwork reads at any width, without units' weights and conditioning."""
    of_units = {part.stored(name) for part in model.units.parts for name in part.group.unit_tensors}
    total = 0
    for name, shape in model.stored_shapes().items():
        if name not in of_units and not model.is_conditioning(name):
            shared = name in model.units.biases
            total += math.prod(shape) * (
                _channel_bytes(precision) if shared else DTYPES[stored_type(model, name, precision)].bytes
            )
    return total
