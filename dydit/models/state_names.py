"""From the names that other programs give to a DiT's tensors to the published ones.

Two forms are read besides the published one: DyDiT training files, which wrap the state dict, and diffusers' folders,
which rename the tensors, split q, k and v, and give every block a copy of the embedders. Errors do not name the file.

diffusers (0.42) computes two things otherwise than the DiT whose weights it carries: the sinusoid divides by 127
instead of 128, and the second LayerNorm of a block has `norm_eps` (1e-5 by default) instead of 1e-6. We run the weights
as they were trained, so our outputs agree with the original DiT and not, to the last digits, with diffusers.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from dydit.errors import CheckpointError
from dydit.models.config import ModelConfig, Routers, parse_config
from dydit.models.dit.model import sine_position_embedding
from dydit.models.safe_load import listed
from dydit.models.state_fit import Shapes, expected_shapes, require_fit

POSITIONS = "pos_embed.pos_embed"


@dataclass(frozen=True)
class Unpacked:
    """A state dict as it lay in a file, the entry it came from ("" for the top level), and the run's arguments."""

    state: Mapping[Any, Any]
    entry: str
    arguments: argparse.Namespace | None


def unpack(loaded: Any) -> Unpacked:
    """Find the state dict in what `torch.save` wrote: `ema` before `model` before the top level itself.

    A `module.` in front of every name, which data-parallel training leaves there, is taken off.
    """
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"holds {type(loaded).__name__}, not a state dict")
    arguments = loaded.get("args")
    for entry in ("ema", "model"):
        inner = loaded.get(entry)
        if isinstance(inner, Mapping) and inner:
            return Unpacked(
                _without_module(inner), entry, arguments if isinstance(arguments, argparse.Namespace) else None
            )
    if not any(isinstance(value, Tensor) for value in loaded.values()):
        keys = listed(str(key) for key in loaded) or "nothing"
        raise CheckpointError(f"holds no state dict: expected tensors, or `ema` or `model` with them; it holds {keys}")
    return Unpacked(_without_module(loaded), "", None)


def _without_module(state: Mapping[Any, Any]) -> Mapping[Any, Any]:
    if all(isinstance(name, str) and name.startswith("module.") for name in state):
        return {name.removeprefix("module."): value for name, value in state.items()}
    return state


class DiffusersConfig(BaseModel):
    """What we need of diffusers' `config.json`; the literals are what makes it a DiT. Other keys are ignored."""

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

    def model(self) -> ModelConfig:
        """The same in our terms; `CheckpointError` where the output is neither epsilon nor epsilon and variance."""
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
        return parse_config(ModelConfig, values)


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
    """The diffusers names of a published tensor: its pieces in row order, or for an embedder its copy in each block."""
    if published == "pos_embed":
        return [POSITIONS]
    part, _, kind = published.rpartition(".")
    if part in _SHARED_PARTS:
        return [f"transformer_blocks.{block}.{_SHARED_PARTS[part]}.{kind}" for block in range(depth)]
    if part in _TOP_PARTS:
        return [f"{_TOP_PARTS[part]}.{kind}"]
    _, block, inner = part.split(".", 2)
    return [f"transformer_blocks.{block}.{piece}.{kind}" for piece in _BLOCK_PARTS[inner]]


def from_diffusers(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The tensors of a diffusers DiT under the published names; q, k and v are joined, nothing else is copied.

    The position embedding, which diffusers does not always store, is computed where it is absent. Raises
    `CheckpointError` where tensors are missing, unknown, misshapen or not finite, and where the blocks' copies of the
    timestep or label embedder differ: a published DiT has one of each.
    """
    shapes = expected_shapes(config)
    require_fit(state, _diffusers_shapes(shapes, config.depth, POSITIONS in state))
    published = {}
    for name in shapes:
        sources = diffusers_names(name, config.depth)
        if name == "pos_embed" and POSITIONS not in state:
            published[name] = sine_position_embedding(config)
        elif name.rpartition(".")[0] in _SHARED_PARTS:
            first = state[sources[0]]
            if odd := [source for source in sources if not torch.equal(state[source], first)]:
                raise CheckpointError(
                    f"has blocks whose embedders differ ({listed(odd)}); expected one for all of them"
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
