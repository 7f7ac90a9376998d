"""The configuration of a PixArt-alpha from a state dict with the original names.

Sizes are read from the shapes of tensors. These do not show the number of heads: it comes from the routers, the
published presets, the training arguments or the user, and is never guessed. Two tensors of an original file are no part
of the model: the position embedding, which is computed, and `y_embedder.y_embedding`, which the original code takes for
images without a text. Errors do not name the file: the caller does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from dydit.checkpoints.conventions import Stated, require_sigma
from dydit.checkpoints.fit import Given, Inferred, Shapes, expected_shapes, require_fit
from dydit.errors import CheckpointError
from dydit.models.config import parse_config
from dydit.models.meta import without_memory
from dydit.models.pixart.config import PRESETS, PixArtConfig, preset, published_scale
from dydit.models.pixart.model import PixArt
from dydit.models.transformer.modules import sine_positions
from dydit.models.transformer.states import (
    block_count,
    choose_heads,
    learns_sigma,
    require_stated_heads,
    shape_of,
    side_of_positions,
)

POSITIONS, NO_TEXT = "pos_embed", "y_embedder.y_embedding"
_BLOCK = re.compile(r"blocks\.([0-9]{1,6})\.")
_MATRIX = re.compile(r"blocks\.[0-9]+\.(attn\.(qkv|proj)|mlp\.fc[12])\.weight$")
_ROUTER = re.compile(r"blocks\.[0-9]+\.(attn_rate|mlp_rate|token_selection)\.")
_WIDTH = ("t_embedder.", "csize_embedder.", "ar_embedder.", ".attn_rate.", ".mlp_rate.")
_SCALES = (1, 2, 4, 8)  # of positions, which are tried
_TOLERANCE = 0.01  # positions in 16 bits
_KNOWN = [preset(name) for name in PRESETS]


def state_shapes(config: PixArtConfig) -> Shapes:
    """Published name -> shape of every tensor that a model of `config` has."""
    with without_memory():
        single = PixArt(config.model_copy(update={"depth": 1})).state_dict()
    return {
        name.replace("blocks.0.", f"blocks.{index}."): tuple(tensor.shape)
        for index in range(config.depth)
        for name, tensor in single.items()
    }


def is_block_matrix(name: str) -> bool:
    """Whether a published name is of a block's matrix that is not zero before training."""
    return bool(_MATRIX.match(name))


def is_width_router(name: str) -> bool:
    """Whether a tensor is needed to compute the masks of timesteps."""
    return any(part in name for part in _WIDTH)


def is_router(name: str) -> bool:
    """Whether a tensor belongs to one of the three routers."""
    return bool(_ROUTER.match(name))


def complete(state: dict[str, Tensor], config: PixArtConfig, size: int) -> None:
    """Remove what is no part of the model from `state`, and check that it is complete."""
    for name in (POSITIONS, NO_TEXT):
        state.pop(name, None)
    require_fit(state, expected_shapes(config))


def infer_config(state: Mapping[str, Tensor], stated: Stated | None = None, given: Given | None = None) -> Inferred:
    """The configuration that the shapes in `state` describe; raises `CheckpointError` where they are of no PixArt.

    `stated`: by the training run, as `conventions.stated_by` finds it; what it contradicts is refused.
    """
    stated, given = stated or {}, given or Given()
    if given.num_classes is not None:
        raise CheckpointError("is conditioned by texts and has no classes; remove --num-classes")
    hidden, channels, patch_size, _ = _shape(state, "x_embedder.proj.weight", 4)
    depth = block_count({int(match[1]) for match in map(_BLOCK.match, state) if match}, "PixArt-alpha")
    rows = _shape(state, "blocks.0.attn_rate.router.weight", 2)[0] if any(map(_ROUTER.match, state)) else None
    published = [size.num_heads for size in _KNOWN if (size.hidden_size, size.depth) == (hidden, depth)]
    hint = stated.get("num_heads")
    heads, routers = choose_heads(hidden, rows, published, given.num_heads, hint if type(hint) is int else None)
    require_stated_heads(stated, heads, given.num_heads)
    learn_sigma = learns_sigma(_shape(state, "final_layer.linear.weight", 2)[0], patch_size, channels)
    require_sigma(stated, learn_sigma)
    values = {
        "hidden_size": hidden,
        "depth": depth,
        "num_heads": heads,
        "patch_size": patch_size,
        "input_size": _input_size(state, patch_size, stated, given),
        "in_channels": channels,
        "learn_sigma": learn_sigma,
        "routers": routers,
        "caption_channels": _shape(state, "y_embedder.y_proj.fc1.weight", 2)[1],
        "micro_conditions": any(name.startswith("csize_embedder.") for name in state),
    }
    notes: tuple[str, ...] = ()
    if NO_TEXT in state:
        values["text_tokens"] = _shape(state, NO_TEXT, 2)[0]
        notes = (
            f"did not read {NO_TEXT}, which the original code takes for no text; guidance takes a negative text, which "
            "may be empty, as diffusers does",
        )
    config = parse_config(PixArtConfig, values)
    return Inferred(config.model_copy(update={"interpolation_scale": _scale(state, config)}), notes)


def _input_size(state: Mapping[str, Tensor], patch_size: int, stated: Stated, given: Given) -> int:
    """The side of the inputs, from the position embedding or the user."""
    if POSITIONS in state:
        return side_of_positions(_shape(state, POSITIONS, 3)[1], patch_size, stated, given.input_size)
    if given.input_size is not None:
        return given.input_size
    raise CheckpointError(
        "does not show the side of its inputs, because it has no pos_embed; give it with --input-size (input_size=): "
        "32 for a PixArt-alpha at 256 pixels, 64 at 512, 128 at 1024"
    )


def _scale(state: Mapping[str, Tensor], config: PixArtConfig) -> int:
    """What positions are divided by: as the position embedding in the file shows, or else as published.

    The original code of models with micro-conditions computes the embedding, whatever the file holds.
    """
    usual = published_scale(config.input_size)
    if POSITIONS not in state or config.micro_conditions:
        return usual
    positions = state[POSITIONS]
    if positions.shape == (1, config.tokens, config.hidden_size):
        for scale in dict.fromkeys((usual, *_SCALES)):
            if torch.allclose(positions.float(), sine_positions(config, scale), rtol=0, atol=_TOLERANCE):
                return scale
    raise CheckpointError(
        "has a pos_embed that is not the sine embedding of a PixArt-alpha; if its model does not use it, remove "
        "pos_embed from the file and give --input-size (input_size=)"
    )


def _shape(state: Mapping[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    return shape_of(state, name, dimensions, "PixArt-alpha")
