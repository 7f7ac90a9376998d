"""What a Diffusion Transformer looks like: sizes, presets, router layout. No PyTorch here."""

from __future__ import annotations

from enum import StrEnum
from functools import lru_cache
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dydit.errors import ConfigError
from dydit.models.architecture import UnitAxis
from dydit.models.dit.units import CONDITIONING, CONDITIONING_PRODUCT, block_spec, fp32_products

T = TypeVar("T", bound=BaseModel)


class Routers(StrEnum):
    """Which dynamic routers a checkpoint carries (PAPER: "TDW router")."""

    NONE = "none"  # a plain, static DiT
    FIRST_ON = "first-on"  # Linear(D, H-1); unit 0 is always on
    ALL_ROUTED = "all-routed"  # Linear(D, H), an older release; every unit may be off


class Strict(BaseModel):
    """Base of all our configurations: immutable, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelConfig(Strict):
    """Sizes of a DiT (Peebles & Xie 2023) and the layout of its DyDiT routers.

    `input_size` is the side of the latent (or pixel) square, so a model sees `tokens = (input_size/patch_size)**2`.
    """

    hidden_size: int = Field(gt=0)
    depth: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    patch_size: int = Field(gt=0)
    input_size: int = Field(gt=0)
    in_channels: int = Field(default=4, gt=0)
    num_classes: int = Field(default=1000, gt=0)
    learn_sigma: bool = True
    routers: Routers = Routers.FIRST_ON

    @model_validator(mode="after")
    def _divisible(self) -> ModelConfig:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if self.input_size % self.patch_size:
            raise ValueError(f"input_size {self.input_size} is not a multiple of patch_size {self.patch_size}")
        if self.hidden_size % 4:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of 4 (2-D sine position embedding)")
        return self

    @property
    def tokens(self) -> int:
        """N, tokens per image."""
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
        """MLP hidden channels per group; there are as many groups as heads."""
        return self.mlp_hidden // self.num_heads

    @property
    def token_router_hidden(self) -> int:
        """Width of the token router's hidden layer, D/16."""
        return max(1, self.hidden_size // 16)

    @property
    def out_channels(self) -> int:
        """Output channels: epsilon, and the variance where it is learned."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def samples_pixels(self) -> bool:
        """Whether samples are pixels, grey or RGB, and not latents that a decoder turns into pixels."""
        return self.in_channels in (1, 3)

    @property
    def null_class(self) -> int:
        """The label that means "no class" in classifier-free guidance: one past the last class."""
        return self.num_classes

    @property
    def dynamic(self) -> bool:
        """Whether the model carries routers."""
        return self.routers is not Routers.NONE

    @property
    def routed_rows(self) -> int:
        """Rows of `attn_rate.router.weight` and `mlp_rate.router.weight`."""
        return self.num_heads - (self.routers is Routers.FIRST_ON)

    @property
    def units(self) -> UnitAxis:
        """The heads and channel groups of all blocks, on one axis."""
        return _unit_axis(self)

    @property
    def low_precision(self) -> tuple[str, ...]:
        """Stored tensors, besides those of units' layers, whose type follows a bundle's precision; others are fp32."""
        return CONDITIONING_PRODUCT

    @property
    def fp32_products(self) -> frozenset[str]:
        """Stored weights whose products are fp32 in every precision."""
        return fp32_products(self)

    def is_conditioning(self, tensor: str) -> bool:
        """Whether the conditioning graph reads a stored tensor, and no other graph does."""
        return tensor.startswith(CONDITIONING)

    def without_routers(self) -> ModelConfig:
        """The static DiT of the same sizes."""
        return self.model_copy(update={"routers": Routers.NONE})


@lru_cache(64)
def _unit_axis(config: ModelConfig) -> UnitAxis:
    return UnitAxis([block_spec(config)] * config.depth)


_SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}


def preset(name: str, input_size: int = 32, **changes: Any) -> ModelConfig:
    """The published sizes by name: `S/2`, `B/4`, `XL/2`, ... for a latent of `input_size` (32 at 256 px, 64 at 512 px).

    Raises `ConfigError` for a name that is not a preset, naming those that are.
    """
    size, _, patch = name.removeprefix("DiT-").removeprefix("DyDiT-").partition("/")
    if size not in _SIZES or patch not in ("2", "4", "8"):
        known = ", ".join(f"{s}/{p}" for s in _SIZES for p in (2, 4, 8))
        raise ConfigError(f"unknown preset {name!r}; known: {known}")
    hidden, depth, heads = _SIZES[size]
    fields = {"hidden_size": hidden, "depth": depth, "num_heads": heads, "patch_size": int(patch)}
    return parse_config(ModelConfig, {**fields, "input_size": input_size, **changes})


def parse_config(kind: type[T], values: dict[str, Any]) -> T:
    """Build a configuration, turning pydantic's report into one `ConfigError` line that names each bad field."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        parts = []
        for item in error.errors():
            field = ".".join(str(part) for part in item["loc"]) or kind.__name__
            parts.append(f"{field}: {item['msg']}")
        raise ConfigError("; ".join(parts)) from error
