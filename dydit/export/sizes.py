"""How much memory a plan's subnetworks take when all of them are loaded. NumPy, no graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dydit.bundle.costs import Residency
from dydit.bundle.graph_io import GROUP_TENSORS, HEAD_TENSORS
from dydit.bundle.stored import ITEM_BYTES, Precision, WeightEntry, half_name
from dydit.export.plan import Plan
from dydit.models.config import ModelConfig

Slots = Sequence[Sequence[int]]


@dataclass(frozen=True, eq=False)
class SubnetSize:
    """A subnetwork: what tells it from others, the units that it maps, bool [L, 2, H], and bytes of units' weights."""

    key: tuple[bytes, bytes]
    mapped_units: np.ndarray
    mapped: int
    joined: int


class PlanSizes:
    """Sizes of the plans of one model; what was found for a segment serves all plans that have it.

    `masks` bool [S, L, 2, H] by slot, `unit_bytes` [L, 2, H] bytes of a unit's weights, `fixed` bytes that every
    subnetwork reads besides.
    """

    def __init__(self, masks: np.ndarray, unit_bytes: np.ndarray, fixed: int):
        self._masks, self._unit_bytes, self._fixed = masks, unit_bytes, fixed
        self._known: dict[tuple[int, int], SubnetSize] = {}

    def subnets(self, plan: Plan) -> list[SubnetSize]:
        """A plan's distinct subnetworks: the same units with and without gates are two, as the exporter writes them."""
        each = (self._segment(*segment) for segment in plan.segments)
        return list({subnet.key: subnet for subnet in each}.values())

    def weights(self, plan: Plan) -> int:
        """Bytes of the weights of a plan's subnetworks, each with its own copy: as engines hold them."""
        return sum(subnet.mapped + subnet.joined + self._fixed for subnet in self.subnets(plan))

    def resident(self, plan: Plan, residency: Residency) -> int:
        """Bytes of memory with all of a plan's subnetworks loaded, as `Residency` describes."""
        subnets, depth = self.subnets(plan), self._masks.shape[1]
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
            gated = np.asarray((masks != union).any(axis=(0, -1)))
            mapped = union & self._side_by_side(union)[..., None]
            size, all_of_it = int((mapped * self._unit_bytes).sum()), int((union * self._unit_bytes).sum())
            self._known[first, end] = SubnetSize((union.tobytes(), gated.tobytes()), mapped, size, all_of_it - size)
        return self._known[first, end]

    def _side_by_side(self, union: np.ndarray) -> np.ndarray:
        """Which parts' units have no holes between them, bool [L, 2]."""
        starts = union[..., 1:] & ~union[..., :-1]
        return np.asarray(starts.sum(axis=-1) + union[..., 0] <= 1)


def unit_bytes(model: ModelConfig, precision: Precision = Precision.FP32) -> np.ndarray:
    """Bytes of one head's and one group's weights, [L, 2, H] float64."""
    d, hd, gs = model.hidden_size, model.head_dim, model.group_dim
    item, added = ITEM_BYTES[precision.weight_dtype], _channel_bytes(precision)
    sizes = np.empty((model.depth, 2, model.num_heads))
    sizes[:, 0], sizes[:, 1] = item * 4 * hd * d + added * 3 * hd, item * 2 * gs * d + added * gs
    return sizes


def subnet_bytes(
    model: ModelConfig,
    precision: Precision,
    weights: Mapping[str, WeightEntry],
    slots: tuple[Slots, Slots],
    in_16_bits: Sequence[Sequence[str]] | None,
) -> int:
    """Bytes of stored weights that a subnetwork of these slots of heads and groups, by block, reads."""
    kept = in_16_bits or ((),) * model.depth
    total = fixed_bytes(model, precision)
    for block, layers in enumerate(kept):
        for units, parts in zip(slots, (HEAD_TENSORS, GROUP_TENSORS), strict=True):
            for part in parts:
                (layer, _, what), name = part.partition("."), f"blocks.{block}.{part}"
                half = layer in layers
                stored = weights.get(half_name(name) if half and what == "weight" else name)
                if stored is not None and not (half and what == "scale"):  # scales are there with 8 bits only
                    total += stored.nbytes // model.num_heads * len(units[block])
        total -= 4 * model.hidden_size * sum(layer in layers for layer in ("proj", "fc2"))  # scales, not read
    return total


def _channel_bytes(precision: Precision) -> int:
    """Bytes of an output channel's bias, and of its scale with 8 bits."""
    return ITEM_BYTES[precision.dtype] + (4 if precision.in_8_bits else 0)


def fixed_bytes(model: ModelConfig, precision: Precision = Precision.FP32) -> int:
    """Bytes of the weights that every subnetwork reads at any width: embedding, routers, final layer, biases."""
    d, p2 = model.hidden_size, model.patch_size**2
    r = model.token_router_hidden
    router = (r * d + 2 * r + 1) if model.dynamic else 0
    embed = (p2 * model.in_channels + 1 + model.tokens) * d
    final = p2 * model.out_channels * (d + 1)
    biases = 2 * d * _channel_bytes(precision)
    return 4 * (embed + final + model.depth * router) + model.depth * biases
