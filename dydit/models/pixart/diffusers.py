"""Converts a diffusers PixArt-alpha: its tensor names to the original ones, and its configuration to ours.

diffusers renames the tensors, and splits q, k and v. It computes the position embedding and does not store it. Folders
that older versions wrote call the class `Transformer2DModel`, as those of a DiT do, and hold
`caption_projection.y_embedding`, which no version reads. Errors do not name the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from dydit.checkpoints.fit import Shapes, expected_shapes, require_fit
from dydit.checkpoints.safe_load import require_sane
from dydit.errors import CheckpointError
from dydit.models.config import Routers, parse_config
from dydit.models.pixart.config import PixArtConfig
from dydit.models.transformer.modules import NORM_EPS

NO_TEXT = "caption_projection.y_embedding"
SHARED_CLASS, NORM_TYPE = "Transformer2DModel", "ada_norm_single"
_SIZE_OF_MICRO_CONDITIONS = 128  # the sample size for which diffusers has them unless the configuration says otherwise


class DiffusersConfig(BaseModel):
    """The fields of diffusers' `config.json` that we need. The literals are the values that a PixArt-alpha has.

    Other keys are ignored: they do not affect the output (`dropout`, `norm_num_groups`, `upcast_attention`,
    `num_embeds_ada_norm`).
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    kind: Literal["PixArtTransformer2DModel", "Transformer2DModel"] = Field(alias="_class_name")
    num_attention_heads: int = Field(gt=0)
    attention_head_dim: int = Field(gt=0)
    num_layers: int = Field(gt=0)
    sample_size: int = Field(gt=0)
    patch_size: int = Field(gt=0)
    in_channels: int = Field(gt=0)
    out_channels: int | None = None
    caption_channels: int = Field(gt=0)
    cross_attention_dim: int = Field(gt=0)
    interpolation_scale: int | None = None
    use_additional_conditions: bool | None = None
    norm_type: Literal["ada_norm_single"] = "ada_norm_single"
    activation_fn: Literal["gelu-approximate"] = "gelu-approximate"
    attention_bias: Literal[True] = True
    norm_elementwise_affine: Literal[False] = False
    norm_eps: float = NORM_EPS
    attention_type: Literal["default"] = "default"
    only_cross_attention: Literal[False] = False
    double_self_attention: Literal[False] = False
    positional_embeddings: None = None
    num_vector_embeds: None = None
    quantization_config: None = None

    def model(self) -> PixArtConfig:
        """Our configuration of the model. Raises `CheckpointError` for numbers that a PixArt-alpha cannot have."""
        hidden = self.num_attention_heads * self.attention_head_dim
        if self.cross_attention_dim != hidden:
            raise CheckpointError(
                f"has cross_attention_dim {self.cross_attention_dim}; expected {hidden}, its channels"
            )
        if self.norm_eps != NORM_EPS:
            raise CheckpointError(f"has norm_eps {self.norm_eps:g}; a PixArt-alpha has {NORM_EPS:g}")
        out = self.in_channels if self.out_channels is None else self.out_channels
        if out not in (self.in_channels, 2 * self.in_channels):
            raise CheckpointError(
                f"has {out} output channels for {self.in_channels} input channels; expected 1 or 2 times"
            )
        micro = self.use_additional_conditions
        values = {
            "hidden_size": hidden,
            "depth": self.num_layers,
            "num_heads": self.num_attention_heads,
            "patch_size": self.patch_size,
            "input_size": self.sample_size,
            "in_channels": self.in_channels,
            "learn_sigma": out == 2 * self.in_channels,
            "routers": Routers.NONE,
            "caption_channels": self.caption_channels,
            "micro_conditions": self.sample_size == _SIZE_OF_MICRO_CONDITIONS if micro is None else micro,
            "interpolation_scale": self.interpolation_scale,
        }
        return parse_config(PixArtConfig, values)


def read_config(values: dict[str, Any]) -> PixArtConfig:
    """The model that a `config.json` describes. Raises `ConfigError`, which names the field, if it is no PixArt."""
    return parse_config(DiffusersConfig, values).model()


_BLOCK_PARTS = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "cross_attn.q_linear": ("attn2.to_q",),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
    "cross_attn.proj": ("attn2.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
}
_EMBEDDER = "adaln_single.emb"
_TOP_PARTS = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": f"{_EMBEDDER}.timestep_embedder.linear_1",
    "t_embedder.mlp.2": f"{_EMBEDDER}.timestep_embedder.linear_2",
    "csize_embedder.mlp.0": f"{_EMBEDDER}.resolution_embedder.linear_1",
    "csize_embedder.mlp.2": f"{_EMBEDDER}.resolution_embedder.linear_2",
    "ar_embedder.mlp.0": f"{_EMBEDDER}.aspect_ratio_embedder.linear_1",
    "ar_embedder.mlp.2": f"{_EMBEDDER}.aspect_ratio_embedder.linear_2",
    "t_block.1": "adaln_single.linear",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "final_layer.linear": "proj_out",
}


def diffusers_names(published: str) -> list[str]:
    """The diffusers names of an original tensor: its pieces in order of rows."""
    part, _, kind = published.rpartition(".")
    if kind == "scale_shift_table":
        return [kind if part == "final_layer" else f"transformer_{part}.{kind}"]
    if part in _TOP_PARTS:
        return [f"{_TOP_PARTS[part]}.{kind}"]
    _, block, inner = part.split(".", 2)
    return [f"transformer_blocks.{block}.{piece}.{kind}" for piece in _BLOCK_PARTS[inner]]


def from_diffusers(state: Mapping[str, Tensor], config: PixArtConfig, size: int) -> dict[str, Tensor]:
    """The tensors of a diffusers PixArt-alpha under the original names. Only q, k and v, which are joined, are copied.

    `size`: bytes of the file or files. Raises `CheckpointError` for tensors that are missing, unknown, of the wrong
    shape or not finite.
    """
    shapes = expected_shapes(config)
    require_fit({name: tensor for name, tensor in state.items() if name != NO_TEXT}, _diffusers_shapes(shapes))
    require_sane(config.tokens * config.hidden_size, size)
    published = {}
    for name in shapes:
        pieces = [state[source] for source in diffusers_names(name)]
        published[name] = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return published


def _diffusers_shapes(published: Shapes) -> Shapes:
    shapes: Shapes = {}
    for name, (rows, *rest) in published.items():
        sources = diffusers_names(name)
        shapes.update({source: (rows // len(sources), *rest) for source in sources})
    return shapes
