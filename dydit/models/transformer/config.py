"""The configuration that transformers on image patches share. NumPy only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from dydit.models.architecture import BlockSpec
from dydit.models.config import ModelConfig
from dydit.models.transformer import units
from dydit.words import counted


class TransformerConfig(ModelConfig):
    """Sizes of a transformer on patches of `patch_size`, with `num_heads` heads and as many groups of MLP channels.

    `GELU`: its form, as PyTorch and ONNX name it. `QKV_BIAS`: whether checkpoints have a bias of queries, keys and
    values; if not, zeros are stored.
    """

    GELU: ClassVar[Literal["tanh", "none"]] = "tanh"
    QKV_BIAS: ClassVar[bool] = True

    num_heads: int = Field(gt=0)
    patch_size: int = Field(gt=0)

    @model_validator(mode="after")
    def _divisible(self) -> TransformerConfig:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if self.input_size % self.patch_size:
            raise ValueError(f"input_size {self.input_size} is not a multiple of patch_size {self.patch_size}")
        return self

    def block_name(self, block: int) -> str:
        """The start of the published names of a block's tensors."""
        return f"blocks.{block}"

    @property
    def side(self) -> int:
        """Patches along a side of the input."""
        return self.input_size // self.patch_size

    @property
    def patches(self) -> int:
        """The number of tokens that are patches, which the paper counts as N."""
        return self.side**2

    @property
    def tokens(self) -> int:
        return self.extra_tokens + self.patches

    @property
    def patch_features(self) -> int:
        """The number of input values in a patch."""
        return self.in_channels * self.patch_size**2

    @property
    def head_dim(self) -> int:
        """Channels per attention head."""
        return self.hidden_size // self.num_heads

    @property
    def mlp_hidden(self) -> int:
        """Hidden channels of the MLP, 4D."""
        return 4 * self.hidden_size

    @property
    def group_dim(self) -> int:
        """Hidden channels of the MLP per group. There are as many groups as heads."""
        return self.mlp_hidden // self.num_heads

    def block_specs(self) -> Sequence[BlockSpec]:
        return [units.block_spec(self)] * self.depth

    @property
    def summary(self) -> str:
        heads = counted(self.num_heads, "head")
        return f"hidden {self.hidden_size}, {counted(self.depth, 'block')}, {heads}, patch {self.patch_size}"


class ModulatedConfig(TransformerConfig):
    """Sizes of a transformer whose blocks are modulated by vectors of a condition (adaLN)."""

    @property
    def vectors(self) -> int:
        """The number of modulation vectors, 6L+2 (`dydit.models.transformer.modulation`)."""
        return 6 * self.depth + 2

    @property
    def condition_shape(self) -> tuple[int, ...]:
        return (self.vectors, self.hidden_size)
