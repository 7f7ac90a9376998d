"""Converts a diffusers DiT: its tensor names to the published ones, and its configuration to ours.

diffusers renames the tensors, splits q, k and v, and gives every block a copy of the embedders. Errors do not name the
file.

diffusers (0.42) differs from the original DiT in two ways: the sinusoid divides by 127 instead of 128, and the second
LayerNorm of a block has `norm_eps` (1e-5 by default) instead of 1e-6. We run the weights as they were trained, so our
outputs agree exactly with the original DiT, and only approximately with diffusers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from dydit.checkpoints.fit import Shapes, expected_shapes, require_fit
from dydit.checkpoints.safe_load import listed, require_sane
from dydit.errors import CheckpointError
from dydit.models.config import Routers, parse_config
from dydit.models.dit.config import DiTConfig
from dydit.models.transformer.modules import NORM_EPS, sine_positions

DIFFUSERS_EPS = 1e-5  # diffusers always writes this; see the text above
POSITIONS = "pos_embed.pos_embed"


class DiffusersConfig(BaseModel):
    """The fields of diffusers' `config.json` that we need. The literals are the values that a DiT has.

    Other keys are ignored: they do not affect the output (`dropout`, `norm_num_groups`, `upcast_attention`), or only
    with tensors that a DiT does not have.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    kind: Literal["DiTTransformer2DModel", "Transformer2DModel"] = Field(alias="_class_name")
    num_attention_heads: int = Field(gt=0)
    attention_head_dim: int = Field(gt=0)
    num_layers: int = Field(gt=0)
    sample_size: int = Field(gt=0)
    patch_size: int = Field(gt=0)
    in_channels: int = Field(gt=0)
    out_channels: int | None = None
    num_embeds_ada_norm: int = Field(gt=0)
    norm_type: Literal["ada_norm_zero"] = "ada_norm_zero"
    activation_fn: Literal["gelu-approximate"] = "gelu-approximate"
    attention_bias: Literal[True] = True
    norm_elementwise_affine: Literal[False] = False
    norm_eps: float = NORM_EPS
    attention_type: Literal["default"] = "default"
    only_cross_attention: Literal[False] = False
    double_self_attention: Literal[False] = False
    use_additional_conditions: Literal[False] | None = None
    interpolation_scale: Literal[1] | None = None
    positional_embeddings: None = None
    num_vector_embeds: None = None
    cross_attention_dim: None = None
    caption_channels: None = None
    quantization_config: None = None

    def model(self) -> DiTConfig:
        """Our configuration of the model. Raises `CheckpointError` for numbers that a DiT cannot have."""
        if self.norm_eps not in (NORM_EPS, DIFFUSERS_EPS):
            raise CheckpointError(f"has norm_eps {self.norm_eps:g}; a DiT has {NORM_EPS:g}")
        out = self.in_channels if self.out_channels is None else self.out_channels
        if out not in (self.in_channels, 2 * self.in_channels):
            raise CheckpointError(
                f"has {out} output channels for {self.in_channels} input channels; expected 1 or 2 times"
            )
        values = {
            "hidden_size": self.num_attention_heads * self.attention_head_dim,
            "depth": self.num_layers,
            "num_heads": self.num_attention_heads,
            "patch_size": self.patch_size,
            "input_size": self.sample_size,
            "in_channels": self.in_channels,
            "num_classes": self.num_embeds_ada_norm,
            "learn_sigma": out == 2 * self.in_channels,
            "routers": Routers.NONE,
        }
        return parse_config(DiTConfig, values)


def read_config(values: dict[str, Any]) -> DiTConfig:
    """The model that a `config.json` describes. Raises `ConfigError`, which names the field, if it is not a DiT."""
    return parse_config(DiffusersConfig, values).model()


_BLOCK_PARTS = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
    "adaLN_modulation.1": ("norm1.linear",),
}
_SHARED_PARTS = {
    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "norm1.emb.class_embedder.embedding_table",
}
_TOP_PARTS = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}


def diffusers_names(published: str, depth: int) -> list[str]:
    """The diffusers names of a published tensor: its pieces in order of rows, or an embedder's copies in all blocks."""
    if published == "pos_embed":
        return [POSITIONS]
    part, _, kind = published.rpartition(".")
    if part in _SHARED_PARTS:
        return [f"transformer_blocks.{block}.{_SHARED_PARTS[part]}.{kind}" for block in range(depth)]
    if part in _TOP_PARTS:
        return [f"{_TOP_PARTS[part]}.{kind}"]
    _, block, inner = part.split(".", 2)
    return [f"transformer_blocks.{block}.{piece}.{kind}" for piece in _BLOCK_PARTS[inner]]


def from_diffusers(state: Mapping[str, Tensor], config: DiTConfig, size: int) -> dict[str, Tensor]:
    """The tensors of a diffusers DiT under the published names. Only q, k and v, which are joined, are copied.

    The position embedding, which diffusers does not always store, is computed if it is absent. `size`: bytes of the
    file or files. Raises `CheckpointError` for tensors that are missing, unknown, of the wrong shape or not finite, and
    if the blocks' copies of the timestep or label embedder differ, because a published DiT has one of each.
    """
    shapes = expected_shapes(config)
    require_fit(state, _diffusers_shapes(shapes, config.depth, POSITIONS in state))
    require_sane(config.tokens * config.hidden_size, size)
    published = {}
    for name in shapes:
        sources = diffusers_names(name, config.depth)
        if name == "pos_embed" and POSITIONS not in state:
            published[name] = sine_positions(config)
        elif name.rpartition(".")[0] in _SHARED_PARTS:
            first = state[sources[0]]
            if different := [source for source in sources if not torch.equal(state[source], first)]:
                raise CheckpointError(
                    f"has blocks whose embedders differ ({listed(different)}); expected the same in all blocks"
                )
            published[name] = first
        else:
            pieces = [state[source] for source in sources]
            published[name] = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return published


def _diffusers_shapes(published: Shapes, depth: int, positions: bool) -> Shapes:
    shapes: Shapes = {}
    for name, (rows, *rest) in published.items():
        sources = diffusers_names(name, depth)
        pieces = 3 if ".attn.qkv." in name else 1
        shapes.update({source: (rows // pieces, *rest) for source in sources})
    if not positions:
        del shapes[POSITIONS]
    return shapes
