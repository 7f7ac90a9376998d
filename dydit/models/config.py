"""What a Diffusion Transformer looks like: sizes, presets, router layout. No PyTorch here."""

from __future__ import annotations

from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from dydit.diffusion.guidance import Guidance
from dydit.errors import ConfigError
from dydit.files import user_path
from dydit.models.architecture import UnitAxis
from dydit.models.dit.units import CONDITIONING, CONDITIONING_PRODUCT, block_spec, fp32_products, stored_shapes
from dydit.validation import SettingsError, problems_of

T = TypeVar("T", bound=BaseModel)
PICTURE_CHANNELS = (1, 3)
"""Channels that a picture has: grey, or RGB."""
UserPath = Annotated[Path, AfterValidator(user_path)]
"""A path in a configuration; `~` is the home folder."""


class Routers(StrEnum):
    """Which dynamic routers a checkpoint carries (PAPER: "TDW router")."""

    NONE = "none"  # a plain, static DiT
    FIRST_ON = "first-on"  # Linear(D, H-1); unit 0 is always on
    ALL_ROUTED = "all-routed"  # Linear(D, H), an older release; every unit may be off


class Space(StrEnum):
    """What a model was trained on, and so what it samples."""

    PIXELS = "pixels"  # grey or RGB, in [-1, 1]
    LATENTS = "latents"  # of an autoencoder, whose decoder makes pixels of them


class Strict(BaseModel):
    """Base of all our configurations: immutable, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelConfig(Strict):
    """Sizes of a DiT (Peebles & Xie 2023) and the layout of its DyDiT routers.

    `input_size` is the side of the latent (or pixel) square, so a model sees `tokens = (input_size/patch_size)**2`.
    `null_class_row`: whether the class table has a row for "no class" after those of the classes, which guidance needs.
    `space`: what the model was trained on. No weight tells, so it is None unless the checkpoint, the folder that it
    lies in, or the user states it; `samples_pixels` then goes by the number of channels.
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
    null_class_row: bool = True
    space: Space | None = None

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what has its default and older files, bundles and their digests do not have."""
        values: dict[str, Any] = handler(self)
        if values.get("null_class_row") is True:
            del values["null_class_row"]
        if values.get("space", ...) is None:
            del values["space"]
        return values

    @model_validator(mode="after")
    def _divisible(self) -> ModelConfig:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if self.input_size % self.patch_size:
            raise ValueError(f"input_size {self.input_size} is not a multiple of patch_size {self.patch_size}")
        if self.hidden_size % 4:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of 4 (2-D sine position embedding)")
        if self.space is Space.PIXELS and self.in_channels not in PICTURE_CHANNELS:
            raise ValueError(
                f"{self.in_channels} channels cannot be pixels; expected 1 (grey) or 3 (RGB). State latents instead"
            )
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
        """Whether samples are pixels, grey or RGB, and not latents that a decoder turns into pixels.

        Where `space` does not state it, models of 1 or 3 channels are taken to sample pixels. Latents of 3 channels
        exist (VQ-f4), so callers say that this is an assumption: see `space_is_assumed`.
        """
        if self.space is not None:
            return self.space is Space.PIXELS
        return self.in_channels in PICTURE_CHANNELS

    @property
    def space_is_open(self) -> bool:
        """Whether nothing states what samples are, and their channels could be those of pictures."""
        return self.space is None and self.in_channels in PICTURE_CHANNELS

    @property
    def space_is_assumed(self) -> bool:
        """Whether samples are taken to be pixels although latents of so many channels are common."""
        return self.space is None and self.in_channels == 3

    @property
    def space_words(self) -> str:
        """What samples are, for a person."""
        if not self.samples_pixels:
            return "latents"
        kind = "grey" if self.in_channels == 1 else "RGB"
        assumed = "; assumed of 3 channels: if they are latents (VQ-f4), state --space latents"
        return f"pixels, {kind}{assumed if self.space_is_assumed else ''}"

    @property
    def architecture(self) -> ModelConfig:
        """The same without `space`, which changes no weight and no graph: to be compared."""
        return self.model_copy(update={"space": None})

    @property
    def class_rows(self) -> int:
        """Rows of the class table: the labels that the network takes are below."""
        return self.num_classes + self.null_class_row

    @property
    def null_class(self) -> int | None:
        """The label that means "no class" in classifier-free guidance: one past the last class. None: there is none."""
        return self.num_classes if self.null_class_row else None

    def require_guidance(self, cfg_scale: float) -> None:
        """Raise `ConfigError` where `cfg_scale` asks for guidance and the model has no row for "no class"."""
        Guidance(cfg_scale, self.null_class)

    @property
    def dynamic(self) -> bool:
        """Whether the model carries routers."""
        return self.routers is not Routers.NONE

    @property
    def routed_rows(self) -> int:
        """Rows of `attn_rate.router.weight` and `mlp_rate.router.weight`."""
        return self.num_heads - (self.routers is Routers.FIRST_ON)

    def stating(self, space: Space | None, decoded: bool) -> ModelConfig:
        """The model with what it samples stated: `space`, or latents for one that gets a decoder and leaves it open."""
        if space is None and decoded and self.space_is_open:
            space = Space.LATENTS
        return self if space is None else parse_config(ModelConfig, {**self.model_dump(), "space": space})

    @property
    def units(self) -> UnitAxis:
        """The heads and channel groups of all blocks, on one axis."""
        return _unit_axis(self)

    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor that a bundle stores, by name."""
        return stored_shapes(self)

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


def parse_config(kind: type[T], values: dict[str, Any], where: str = "") -> T:
    """Build a configuration. Raises `SettingsError`, a `ConfigError` that names each bad field in one line.

    `where` is the file that the values come from, if they do; the line starts with it.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise SettingsError(problems_of(error), where) from error
