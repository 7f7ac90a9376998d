"""The configuration of a DiT, and its published presets. NumPy only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from dydit.errors import ConfigError
from dydit.models.architecture import BlockSpec
from dydit.models.config import ClassLabels, ModelConfig, Routers, parse_config
from dydit.models.dit import units
from dydit.words import counted


class DiTConfig(ModelConfig):
    """Sizes of a DiT (Peebles & Xie 2023) and the layout of its DyDiT routers.

    There are N = (input_size/patch_size)**2 tokens. A block has `num_heads` heads and as many groups of MLP channels.
    `null_class_row`: whether the class table has a row for "no class" after the rows of the classes.
    """

    UNSTATED: ClassVar[dict[str, Any]] = {**ModelConfig.UNSTATED, "null_class_row": True}

    architecture: Literal["dit"] = "dit"
    num_heads: int = Field(gt=0)
    patch_size: int = Field(gt=0)
    num_classes: int = Field(default=1000, gt=0)
    null_class_row: bool = True

    @model_validator(mode="after")
    def _divisible(self) -> DiTConfig:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if self.input_size % self.patch_size:
            raise ValueError(f"input_size {self.input_size} is not a multiple of patch_size {self.patch_size}")
        if self.hidden_size % 4:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of 4 (2-D sine position embedding)")
        return self

    @property
    def tokens(self) -> int:
        return (self.input_size // self.patch_size) ** 2

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

    @property
    def classes(self) -> ClassLabels:
        return ClassLabels(self.num_classes, self.num_classes if self.null_class_row else None)

    @property
    def vectors(self) -> int:
        """The number of modulation vectors, 6L+2.

        Block l has 6l..6l+5: shift1, 1+scale1, gate1, shift2, 1+scale2, gate2. The last two are the final layer's shift
        and 1+scale. The conditioning graph adds the 1 once, so that steps need not.
        """
        return 6 * self.depth + 2

    @property
    def condition_shape(self) -> tuple[int, ...]:
        return (self.vectors, self.hidden_size)

    def block_specs(self) -> Sequence[BlockSpec]:
        return [units.block_spec(self)] * self.depth

    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        return units.stored_shapes(self)

    @property
    def low_precision(self) -> tuple[str, ...]:
        return units.CONDITIONING_PRODUCT

    @property
    def fp32_products(self) -> frozenset[str]:
        return units.fp32_products(self)

    @property
    def title(self) -> str:
        return "DyDiT" if self.dynamic else "DiT"

    @property
    def derived(self) -> frozenset[str]:
        return frozenset({"time.frequencies"})

    def is_conditioning(self, tensor: str) -> bool:
        return tensor.startswith(units.CONDITIONING)

    @property
    def macs(self) -> int:
        """Blocks, adaLN projections, embedders, final layer, and 4 per LayerNorm element: 6.07 G for S/2, 23.02 G for
        B/2 and 118.69 G for XL/2 at 256 px.
        """
        n, d, patch = self.tokens, self.hidden_size, self.patch_size**2
        blocks = self.depth * (units.attention_macs(self) + units.mlp_macs(self) + 6 * d * d)
        embed = n * patch * self.in_channels * d + 256 * d + d * d
        final = n * d * patch * self.out_channels + 2 * d * d
        norms = 4 * n * d * (2 * self.depth + 1)
        return blocks + embed + final + norms

    @property
    def summary(self) -> str:
        heads = counted(self.num_heads, "head")
        return f"hidden {self.hidden_size}, {counted(self.depth, 'block')}, {heads}, patch {self.patch_size}"


_DIGITS = {
    "hidden_size": 128,
    "depth": 6,
    "num_heads": 8,
    "patch_size": 2,
    "input_size": 16,
    "in_channels": 1,
    "num_classes": 10,
    "routers": Routers.NONE,
}
_SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}


def preset(name: str, input_size: int = 32, **changes: Any) -> DiTConfig:
    """The published sizes by name: `S/2`, `B/4`, `XL/2`, ... for a latent of `input_size` (32 at 256 px, 64 at 512 px);
    or `digits`, the static model of handwritten digits that comes with dydit.

    Raises `ConfigError`, which lists the presets, for a name that is not one of them.
    """
    if name == "digits":
        return parse_config(DiTConfig, {**_DIGITS, **changes})
    size, _, patch = name.removeprefix("DiT-").removeprefix("DyDiT-").partition("/")
    if size not in _SIZES or patch not in ("2", "4", "8"):
        known = ", ".join(f"{s}/{p}" for s in _SIZES for p in (2, 4, 8))
        raise ConfigError(f"unknown preset {name!r}; expected one of: {known}")
    hidden, depth, heads = _SIZES[size]
    fields = {"hidden_size": hidden, "depth": depth, "num_heads": heads, "patch_size": int(patch)}
    return parse_config(DiTConfig, {**fields, "input_size": input_size, **changes})
