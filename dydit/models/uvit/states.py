"""The configuration of a U-ViT from a state dict with the published names.

Sizes are read from the shapes of tensors. These do not show the number of heads: it comes from the routers, a published
preset, training arguments or the user, and is never guessed. Errors do not name the file: the caller does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dydit.checkpoints.conventions import Stated, require_side
from dydit.checkpoints.fit import ClassTable, Given, Inferred, Shapes, class_table, expected_shapes, require_fit
from dydit.errors import CheckpointError
from dydit.models.config import parse_config
from dydit.models.meta import without_memory
from dydit.models.transformer.states import (
    block_count,
    choose_heads,
    rebuilt_class_table,
    require_stated_heads,
    shape_of,
)
from dydit.models.uvit.config import PRESETS, UViTConfig, preset
from dydit.models.uvit.model import LABEL_STD, UViT

LABELS = "label_emb.weight"

_BLOCK = r"(?:in_blocks\.[0-9]{1,6}|mid_block|out_blocks\.[0-9]{1,6})"
_HALVES = {name: re.compile(rf"{name}\.([0-9]{{1,6}})\.") for name in ("in_blocks", "out_blocks")}
_MATRIX = re.compile(rf"{_BLOCK}\.(attn\.(qkv|proj)|mlp\.fc[12])\.weight$")
_ROUTER = re.compile(rf"{_BLOCK}\.(attn_rate|mlp_rate|token_selection)\.")
_KNOWN = [preset(name) for name in PRESETS]


def state_shapes(config: UViTConfig) -> Shapes:
    """Published name -> shape of every tensor that a model of `config` has."""
    with without_memory():
        small = UViT(config.model_copy(update={"depth": 3 if config.half else 1})).state_dict()
    shapes: Shapes = {}
    for name, tensor in small.items():
        half = name.partition(".")[0]
        copies = range(config.half) if half in _HALVES else range(1)
        shapes |= {name.replace(f"{half}.0.", f"{half}.{index}.", 1): tuple(tensor.shape) for index in copies}
    return shapes


def is_block_matrix(name: str) -> bool:
    """Whether a published name is of a block's matrix that is not zero before training."""
    return bool(_MATRIX.match(name))


def is_width_router(name: str) -> bool:
    """Whether a tensor is needed to compute the masks of timesteps."""
    return name.startswith("time_embed.") or ".attn_rate." in name or ".mlp_rate." in name


def is_router(name: str) -> bool:
    """Whether a tensor belongs to one of the three routers."""
    return bool(_ROUTER.match(name))


def complete(state: dict[str, Tensor], config: UViTConfig, size: int) -> None:
    """Check that `state` is a complete model."""
    require_fit(state, expected_shapes(config))


def with_classes(
    state: Mapping[str, Tensor], config: UViTConfig, kept: Sequence[int | None], generator: torch.Generator
) -> dict[str, Tensor]:
    """See `Architecture.with_classes`."""
    return {**state, LABELS: rebuilt_class_table(state[LABELS], kept, config.null_class, LABEL_STD, generator)}


def infer_config(state: Mapping[str, Tensor], stated: Stated | None = None, given: Given | None = None) -> Inferred:
    """The configuration that the shapes in `state` describe; raises `CheckpointError` where they describe no U-ViT.

    `stated`: by the training run, as `conventions.stated_by` finds it; what it contradicts is refused.
    """
    stated, given = stated or {}, given or Given()
    if any(name.startswith("context_embed.") for name in state):
        raise CheckpointError("is a U-ViT that reads texts (it has context_embed), which dydit does not have")
    hidden, channels, patch_size, _ = _shape(state, "patch_embed.proj.weight", 4)
    half = _half(state)
    routed = "mid_block.attn_rate.router.weight"
    rows = _shape(state, routed, 2)[0] if any(map(_ROUTER.match, state)) else None
    published = [size.num_heads for size in _KNOWN if (size.hidden_size, size.half) == (hidden, half)]
    hint = stated.get("num_heads")
    heads, routers = choose_heads(hidden, rows, published, given.num_heads, hint if type(hint) is int else None)
    require_stated_heads(stated, heads, given.num_heads)
    classes = _classes(state, stated, given)
    side = _input_size(state, patch_size, classes is not None, stated, given)
    values = {
        "hidden_size": hidden,
        "depth": 2 * half + 1,
        "num_heads": heads,
        "patch_size": patch_size,
        "input_size": side,
        "in_channels": channels,
        "num_classes": 0 if classes is None else classes.count,
        "null_class_row": classes is not None and classes.null_row,
        "mlp_time_embed": "time_embed.0.weight" in state,
        "conv": "final_layer.weight" in state,
        "skip": "out_blocks.0.skip_linear.weight" in state,
        "routers": routers,
    }
    return Inferred(parse_config(UViTConfig, values), () if classes is None else classes.notes)


def _half(state: Mapping[str, Tensor]) -> int:
    counts = []
    for pattern in _HALVES.values():
        numbers = {int(match[1]) for match in map(pattern.match, state) if match}
        counts.append(block_count(numbers, "U-ViT") if numbers else 0)
    before, after = counts
    if before != after:
        raise CheckpointError(f"is not a whole U-ViT: it has {before} in_blocks, but {after} out_blocks")
    return before


def _classes(state: Mapping[str, Tensor], stated: Stated, given: Given) -> ClassTable | None:
    """How to read the class table; None for an unconditional model."""
    if LABELS in state:
        return class_table(_shape(state, LABELS, 2)[0], stated, given.num_classes)
    if given.num_classes not in (None, 0):
        raise CheckpointError("has no class table: it is unconditional; remove --num-classes")
    return None


def _input_size(state: Mapping[str, Tensor], patch_size: int, conditional: bool, stated: Stated, given: Given) -> int:
    tokens = _shape(state, "pos_embed", 3)[1] - (2 if conditional else 1)
    side = math.isqrt(max(tokens, 0))
    if side * side != tokens or not tokens:
        extra = "the time and the class" if conditional else "the time"
        raise CheckpointError(f"has a pos_embed of {tokens} patches besides {extra}; expected a square number")
    side *= patch_size
    if given.input_size not in (None, side):
        raise CheckpointError(
            f"has a pos_embed of inputs with a side of {side}, not {given.input_size}; remove --input-size"
        )
    require_side(stated, side)
    return side


def _shape(state: Mapping[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    return shape_of(state, name, dimensions, "U-ViT")
