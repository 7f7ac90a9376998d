"""The configuration of a DiT from a state dict with the published names.

Sizes are read from the shapes of tensors. These do not show the number of heads: it comes from the routers, a published
preset, the training arguments or the user, and is never guessed. Errors do not name the file: the caller does.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dydit.checkpoints.conventions import Stated, require_sigma
from dydit.checkpoints.fit import Given, Inferred, Shapes, class_table, expected_shapes, require_fit
from dydit.checkpoints.safe_load import require_sane
from dydit.errors import CheckpointError, ConfigError
from dydit.models.config import Routers, parse_config
from dydit.models.dit.config import DiTConfig, preset
from dydit.models.dit.model import LABEL_STD, DiT
from dydit.models.meta import without_memory
from dydit.models.transformer.modules import sine_positions
from dydit.models.transformer.states import (
    block_count,
    learns_sigma,
    rebuilt_class_table,
    require_stated_heads,
    shape_of,
    side_of_positions,
)
from dydit.models.transformer.states import choose_heads as heads_of

POSITIONS, LABELS = "pos_embed", "y_embedder.embedding_table.weight"
ANCHORS = ("x_embedder.proj.weight", "pos_embed.proj.weight")
"""The patch embedder, as published and in diffusers. Every DiT has one of them."""
TOP_LEVEL = ("x_embedder", "t_embedder", "y_embedder", "pos_embed", "blocks", "transformer_blocks", "final_layer")
"""The first parts of a DiT's names, as published and in diffusers."""
OUTPUT = "final_layer.linear.weight"

_BLOCK = re.compile(r"blocks\.([0-9]{1,6})\.")
_MATRIX = re.compile(r"blocks\.[0-9]+\.(attn\.(qkv|proj)|mlp\.fc[12])\.weight$")
_ROUTER = re.compile(r"blocks\.[0-9]+\.(attn_rate|mlp_rate|token_selection)\.")
_PRESETS = [preset(f"{size}/2") for size in ("S", "B", "L", "XL")]


def state_shapes(config: DiTConfig) -> Shapes:
    """Published name -> shape of every tensor that a model of `config` has, `pos_embed` included."""
    with without_memory():
        single = DiT(config.model_copy(update={"depth": 1})).state_dict()
    return {
        name.replace("blocks.0.", f"blocks.{index}."): tuple(tensor.shape)
        for index in range(config.depth)
        for name, tensor in single.items()
    }


def is_block_matrix(name: str) -> bool:
    """Whether a published name is of a block's matrix that is not zero before training, unlike those of adaLN."""
    return bool(_MATRIX.match(name))


def is_width_router(name: str) -> bool:
    """Whether a tensor is needed to compute the masks of timesteps."""
    return any(part in name for part in ("t_embedder.", ".attn_rate.", ".mlp_rate."))


def is_router(name: str) -> bool:
    """Whether a tensor belongs to one of the three routers."""
    return bool(_ROUTER.match(name))


def complete(state: dict[str, Tensor], config: DiTConfig, size: int) -> None:
    """Check that `state` is a complete model, and compute the position embedding if it was not saved.

    An untrained row for "no class" is removed from the class table. `size`: bytes of the file.
    """
    shapes = expected_shapes(config)
    if LABELS in state and len(state[LABELS]) == config.classes.rows + 1:
        state[LABELS] = state[LABELS][: config.classes.rows]
    if POSITIONS in state:
        require_fit(state, shapes)
        return
    require_sane(config.tokens * config.hidden_size, size)
    require_fit(state, {name: shape for name, shape in shapes.items() if name != POSITIONS})
    state[POSITIONS] = sine_positions(config)


def with_classes(
    state: Mapping[str, Tensor], config: DiTConfig, kept: Sequence[int | None], generator: torch.Generator
) -> dict[str, Tensor]:
    """See `Architecture.with_classes`."""
    return {**state, LABELS: rebuilt_class_table(state[LABELS], kept, config.null_class, LABEL_STD, generator)}


def infer_config(state: Mapping[str, Tensor], stated: Stated | None = None, given: Given | None = None) -> Inferred:
    """The configuration that the shapes in `state` describe; raises `CheckpointError` where they describe no DiT.

    `stated`: by the training run, as `conventions.stated_by` finds it; what it contradicts is refused.
    """
    stated, given = stated or {}, given or Given()
    patch = _shape(state, "x_embedder.proj.weight", 4)
    hidden, channels, patch_size = patch[0], patch[1], patch[2]
    depth = block_count({int(match[1]) for match in map(_BLOCK.match, state) if match}, "DiT")
    rows = _shape(state, "blocks.0.attn_rate.router.weight", 2)[0] if any(map(_ROUTER.match, state)) else None
    heads, routers = choose_heads(hidden, depth, rows, given.num_heads, _heads_from(stated, hidden))
    require_stated_heads(stated, heads, given.num_heads)
    learn_sigma = learns_sigma(_shape(state, "final_layer.linear.weight", 2)[0], patch_size, channels)
    require_sigma(stated, learn_sigma)
    side, side_notes = _input_size(state, patch_size, stated, given.input_size)
    classes = class_table(_shape(state, LABELS, 2)[0], stated, given.num_classes)
    values = {
        "hidden_size": hidden,
        "depth": depth,
        "num_heads": heads,
        "patch_size": patch_size,
        "input_size": side,
        "in_channels": channels,
        "num_classes": classes.count,
        "learn_sigma": learn_sigma,
        "routers": routers,
        "null_class_row": classes.null_row,
    }
    return Inferred(parse_config(DiTConfig, values), (*side_notes, *classes.notes))


def _input_size(
    state: Mapping[str, Tensor], patch_size: int, stated: Stated, given: int | None
) -> tuple[int, tuple[str, ...]]:
    """The side of the inputs, from the position embedding, the user or the training arguments, and notes."""
    if POSITIONS in state:
        return side_of_positions(_shape(state, POSITIONS, 3)[1], patch_size, stated, given), ()
    if given is not None:
        return given, ()
    pixels = stated.get("image_size")
    if type(pixels) is int and pixels > 0 and "vae" in stated and pixels % 8 == 0:
        return pixels // 8, (
            f"input size {pixels // 8}: its training arguments say images of {pixels} pixels and a VAE",
        )
    raise CheckpointError(
        "does not show the side of its inputs, because it has no pos_embed; give it with --input-size (input_size=): "
        "32 for a latent DiT at 256 pixels, 64 at 512"
    )


def choose_heads(
    hidden: int, depth: int, rows: int | None, given: int | None = None, hint: int | None = None
) -> tuple[int, Routers]:
    """The head count and router layout of a DiT (`dydit.models.transformer.states.choose_heads`)."""
    published = [size.num_heads for size in _PRESETS if (size.hidden_size, size.depth) == (hidden, depth)]
    return heads_of(hidden, rows, published, given, hint)


def _heads_from(stated: Stated, hidden: int) -> int | None:
    """The head count that training arguments name: `num_heads`, or that of a published `model` of this hidden size."""
    heads, model = stated.get("num_heads"), stated.get("model")
    if type(heads) is int:
        return heads
    if isinstance(model, str):
        with contextlib.suppress(ConfigError):
            size = preset(model)
            return size.num_heads if size.hidden_size == hidden else None
    return None


def _shape(state: Mapping[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    return shape_of(state, name, dimensions, "DiT")
