"""Whether the parts of a manifest agree with each other: its weights with the model, its subnetworks with the masks.

A bundle whose parts disagree would compute one function on one backend and another, or nothing, on the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dydit.bundle.stored_weights import Precision, WeightEntry, fp16_name, stored_type
from dydit.models.architecture import Slots
from dydit.models.config import ModelConfig


def weights_trouble(weights: Mapping[str, WeightEntry], model: ModelConfig, precision: Precision) -> str | None:
    """What is wrong with the stored tensors; None where they are those of the model."""
    for name, shape in model.stored_shapes().items():
        copies = [each for each in (name, fp16_name(name)) if each in weights]
        if not copies:
            return f"weight {name} is not listed"
        for copy in copies:
            entry, expected = weights[copy], "float16" if copy != name else stored_type(model, name, precision)
            if entry.shape != shape or entry.dtype != expected:
                return f"weight {copy} is {entry.dtype} {list(entry.shape)}, expected {expected} {list(shape)}"
    odd = [name for name, entry in weights.items() if entry.offset % entry.item_bytes]
    return f"weight {odd[0]} starts in the middle of a number" if odd else None


def order_trouble(order: Slots, model: ModelConfig) -> str | None:
    """What is wrong with the order of stored units; None where it has each unit of every part once."""
    if not _has_parts(order, model):
        return "units are not listed for the blocks and unit groups of the model"
    if any(sorted(units) != list(range(part.group.count)) for part, units in model.units.zip(order)):
        return "a unit order is not a permutation of the units of each block"
    return None


def slots_trouble(slots: Slots, model: ModelConfig) -> str | None:
    """What is wrong with a subnetwork's slots; None where they are ascending ones of each part."""
    if not _has_parts(slots, model):
        return "units are not listed for the blocks and unit groups of the model"
    for part, units in model.units.zip(slots):
        if list(units) != sorted(set(units) & set(range(part.group.count))):
            return "a subnetwork's slots are not ascending units of its blocks"
    return None


def _has_parts(nested: Sequence[Sequence[object]], model: ModelConfig) -> bool:
    return [len(block) for block in nested] == [len(block.groups) for block in model.units.blocks]


def mask_trouble(held: np.ndarray, gated: bool, masks: np.ndarray) -> str | None:
    """What is wrong with the masks bool [steps, U] that a subnetwork of the units `held` [U] serves, or None."""
    if (masks & ~held).any():
        return "a step needs units that its subnetwork does not hold"
    return None if gated or (masks == held).all() else "a subnetwork without gates serves steps with fewer units"
