"""Whether the parts of a manifest agree with each other: its weights with the model, its subnetworks with the masks.

A bundle whose parts disagree would compute one function on one backend and another, or nothing, on the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dydit.bundle.stored import Precision, WeightEntry, half_name, product_type
from dydit.models.config import ModelConfig

Shape = tuple[int, ...]


def layout_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Shape of every tensor that `dydit.models.layout` names, but for the label table, whose rows differ."""
    d, heads, patch = model.hidden_size, model.num_heads, model.patch_size**2
    head, group = model.head_dim, model.group_dim
    block: dict[str, Shape] = {
        "qkv.weight": (heads, 3 * head, d),
        "qkv.bias": (heads, 3 * head),
        "proj.weight": (heads, head, d),
        "proj.bias": (d,),
        "fc1.weight": (heads, group, d),
        "fc1.bias": (heads, group),
        "fc2.weight": (heads, group, d),
        "fc2.bias": (d,),
    }
    if model.dynamic:
        hidden = model.token_router_hidden
        block |= {"router.0.weight": (hidden, d), "router.0.bias": (hidden,)}
        block |= {"router.2.weight": (1, hidden), "router.2.bias": (1,)}
    rows = (6 * model.depth + 2) * d
    return {
        "embed.weight": (model.in_channels * patch, d),
        "embed.bias": (d,),
        "pos_embed": (model.tokens, d),
        **{f"blocks.{index}.{name}": shape for index in range(model.depth) for name, shape in block.items()},
        "final.weight": (patch * model.out_channels, d),
        "final.bias": (patch * model.out_channels,),
        "time.0.weight": (d, 256),
        "time.0.bias": (d,),
        "time.2.weight": (d, d),
        "time.2.bias": (d,),
        "time.frequencies": (128,),
        "adaln.weight": (rows, d),
        "adaln.bias": (rows,),
    }


def weights_trouble(weights: Mapping[str, WeightEntry], model: ModelConfig, precision: Precision) -> str | None:
    """What is wrong with the stored tensors; None where they are those of the model."""
    for name, shape in layout_shapes(model).items():
        copies = [each for each in (name, half_name(name)) if each in weights]
        if not copies:
            return f"weight {name} is not listed"
        for copy in copies:
            entry = weights[copy]
            expected = "float16" if copy != name else product_type(name, precision)
            if entry.shape != shape or entry.dtype not in {
                expected,
                *({precision.weight_dtype} & {"int8", "float8_e4m3fn"}),
            }:
                return f"weight {copy} is {entry.dtype} {list(entry.shape)}, expected {expected} {list(shape)}"
    table = weights.get("label.table")
    if table is None or len(table.shape) != 2 or table.shape[1] != model.hidden_size or table.dtype != "float32":
        return "weight label.table is not one row of hidden size for each class"
    odd = [name for name, entry in weights.items() if entry.offset % entry.item_bytes]
    return f"weight {odd[0]} starts in the middle of a number" if odd else None


def slots_trouble(heads: Sequence[Sequence[int]], groups: Sequence[Sequence[int]], model: ModelConfig) -> str | None:
    """What is wrong with a subnetwork's slots; None where they are ascending ones of each block."""
    for slots in (heads, groups):
        if len(slots) != model.depth:
            return f"a subnetwork has {len(slots)} blocks, the model {model.depth}"
        if any(list(block) != sorted(set(block) & set(range(model.num_heads))) for block in slots):
            return f"a subnetwork's slots are not ascending numbers in 0..{model.num_heads - 1}"
    return None


def mask_trouble(
    heads: Sequence[Sequence[int]], groups: Sequence[Sequence[int]], gated: bool, masks: np.ndarray
) -> str | None:
    """What is wrong with the masks bool [steps, L, 2, H] that a subnetwork serves; None where it can serve them."""
    held = np.zeros(masks.shape[1:], bool)
    for part, slots in enumerate((heads, groups)):
        for block, units in enumerate(slots):
            held[block, part, list(units)] = True
    if (masks & ~held).any():
        return "a step needs units that its subnetwork does not hold"
    return None if gated or (masks == held).all() else "a subnetwork without gates serves steps with fewer units"
