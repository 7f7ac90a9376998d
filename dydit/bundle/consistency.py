"""Checks that the parts of a manifest agree: weights with the model, subnetworks with the masks.

If they did not, backends could compute different functions from the same bundle, or fail.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dydit.bundle.stored_weights import Precision, WeightEntry, fp16_name, stored_type
from dydit.models.architecture import Slots
from dydit.models.config import ModelConfig


def weights_trouble(weights: Mapping[str, WeightEntry], model: ModelConfig, precision: Precision) -> str | None:
    """What is wrong with the list of stored tensors; None if these are the tensors of the model."""
    for name, shape in model.stored_shapes().items():
        copies = [each for each in (name, fp16_name(name)) if each in weights]
        if not copies:
            return f"weight {name} is not listed"
        for copy in copies:
            entry, expected = weights[copy], "float16" if copy != name else stored_type(model, name, precision)
            if entry.shape != shape or entry.dtype != expected:
                return f"weight {copy} is {entry.dtype} {list(entry.shape)}, expected {expected} {list(shape)}"
    misaligned = [name for name, entry in weights.items() if entry.offset % entry.item_bytes]
    return f"the offset of weight {misaligned[0]} is not a multiple of its item size" if misaligned else None


def order_trouble(order: Slots, model: ModelConfig) -> str | None:
    """What is wrong with the order of stored units; None if it lists each unit of every part once."""
    if not _has_parts(order, model):
        return "the lists of units do not match the blocks and unit groups of the model"
    if any(sorted(units) != list(range(part.group.count)) for part, units in model.units.zip(order)):
        return "unit_order is not a permutation of the units of each block"
    return None


def slots_trouble(slots: Slots, model: ModelConfig) -> str | None:
    """What is wrong with a subnetwork's slots; None if they are ascending slots of each part."""
    if not _has_parts(slots, model):
        return "the lists of units do not match the blocks and unit groups of the model"
    for part, units in model.units.zip(slots):
        if list(units) != sorted(set(units) & set(range(part.group.count))):
            return "a subnetwork's units are not ascending slots of its blocks"
    return None


def _has_parts(nested: Sequence[Sequence[object]], model: ModelConfig) -> bool:
    return [len(block) for block in nested] == [len(block.groups) for block in model.units.blocks]


def mask_trouble(subnet: np.ndarray, gated: bool, masks: np.ndarray) -> str | None:
    """What is wrong with the `masks`, bool [steps, U], of the steps that run on a subnetwork; None if nothing is.

    `subnet`: the units of the subnetwork, bool [U].
    """
    if (masks & ~subnet).any():
        return "a step needs units that its subnetwork does not have"
    return None if gated or (masks == subnet).all() else "a subnetwork without gates serves steps with fewer units"
