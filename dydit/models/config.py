"""What every architecture's configuration states, so that other rooms can ask it. No PyTorch here.

Each architecture adds its sizes in a subclass (`dydit.models.dit.config`). A configuration that is read from a file
names its `architecture`, and so its subclass (`dydit.models.registry`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from dydit.diffusion.guidance import Guidance
from dydit.errors import ConfigError
from dydit.files import user_path
from dydit.models.architecture import BlockSpec, UnitAxis
from dydit.models.registry import DEFAULT, architecture
from dydit.validation import SettingsError, problems_of

T = TypeVar("T", bound=BaseModel)
PICTURE_CHANNELS = (1, 3)
"""Channels that a picture has: grey, or RGB."""
UserPath = Annotated[Path, AfterValidator(user_path)]
"""A path in a configuration; `~` is the home folder."""


class Routers(StrEnum):
    """Which routers a checkpoint carries. A width router gives a logit for each unit of its group."""

    NONE = "none"  # a static model
    FIRST_ON = "first-on"  # none for unit 0, which is always on
    ALL_ROUTED = "all-routed"  # one for every unit, as in an older release; every unit may be off


class Space(StrEnum):
    """What a model was trained on, and so what it samples."""

    PIXELS = "pixels"  # grey or RGB, in [-1, 1]
    LATENTS = "latents"  # of an autoencoder, whose decoder makes pixels of them


class Strict(BaseModel):
    """Base of all our configurations: immutable, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True)
class ClassLabels:
    """The class labels that a model takes: 0 to `count` - 1, and `null`, which stands for "no class".

    Classifier-free guidance needs `null`; None: the model was trained without it. An unconditional model has one class.
    """

    count: int
    null: int | None

    @property
    def rows(self) -> int:
        """Labels that the network takes, `null` among them: they are below this number."""
        return self.count + (self.null is not None)


class ModelConfig(Strict):
    """What every architecture states of a model; a subclass adds its own sizes and says how they make the rest.

    `hidden_size`: channels D of the residual stream. `depth`: blocks. `input_size`: the side of the latent (or pixel)
    square, of `in_channels` channels. `learn_sigma`: the output has as many channels again, for the variance.
    `space`: what the model was trained on. No weight tells, so it is None unless the checkpoint, the folder that it
    lies in, or the user states it; `samples_pixels` then goes by the number of channels.
    """

    UNSTATED: ClassVar[dict[str, Any]] = {"space": None}

    architecture: str
    hidden_size: int = Field(gt=0)
    depth: int = Field(gt=0)
    input_size: int = Field(gt=0)
    in_channels: int = Field(default=4, gt=0)
    learn_sigma: bool = True
    routers: Routers = Routers.FIRST_ON
    space: Space | None = None

    @model_validator(mode="wrap")
    @classmethod
    def _of_its_architecture(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Values that are read as a `ModelConfig` become one of the architecture that they name."""
        if cls is not ModelConfig or isinstance(values, ModelConfig):
            return handler(values)
        named = values.get("architecture", DEFAULT) if isinstance(values, dict) else DEFAULT
        if not isinstance(named, str):
            raise ValueError(f"architecture must be a name, not {named!r:.40}")
        try:
            kind: Any = architecture(named).config
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return kind.model_validate(values)

    @model_serializer
    def _stated(self) -> dict[str, Any]:
        """All fields of the subclass, without those that have their default and are in no older file.

        (pydantic would write the fields of `ModelConfig` alone where a field of another configuration is declared so.)
        """
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: value for name, value in values.items() if value != self.UNSTATED.get(name, ...)}

    @model_validator(mode="after")
    def _pixels_have_colours(self) -> Self:
        if self.space is Space.PIXELS and self.in_channels not in PICTURE_CHANNELS:
            raise ValueError(
                f"{self.in_channels} channels cannot be pixels; expected 1 (grey) or 3 (RGB). State latents instead"
            )
        return self

    # What an architecture says of its models.

    @property
    @abstractmethod
    def tokens(self) -> int:
        """N, tokens per image that a token router decides on."""

    @property
    @abstractmethod
    def classes(self) -> ClassLabels:
        """The class labels that it takes."""

    @property
    @abstractmethod
    def condition_shape(self) -> tuple[int, ...]:
        """Shape of what a step takes of its timestep and label: one row of the conditioning graph's output."""

    @abstractmethod
    def block_specs(self) -> Sequence[BlockSpec]:
        """The unit groups of every block."""

    @abstractmethod
    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor that a bundle stores, by name."""

    @property
    @abstractmethod
    def low_precision(self) -> tuple[str, ...]:
        """Stored tensors, besides those of units' layers, whose type follows a bundle's precision; others are fp32."""

    @property
    @abstractmethod
    def fp32_products(self) -> frozenset[str]:
        """Stored weights whose products are fp32 in every precision."""

    @property
    def title(self) -> str:
        """What the model is, for a person: "DiT"."""
        return f"{'dynamic ' if self.dynamic else ''}{architecture(self.architecture).title}"

    @property
    def derived(self) -> frozenset[str]:
        """Stored tensors that are computed and no parameters."""
        return frozenset()

    @abstractmethod
    def is_conditioning(self, tensor: str) -> bool:
        """Whether the conditioning graph reads a stored tensor, and no other graph does."""

    @property
    @abstractmethod
    def macs(self) -> int:
        """Multiply-adds of one static forward pass for one image, as the paper counts them."""

    @property
    @abstractmethod
    def summary(self) -> str:
        """Its sizes for a person: "hidden 384, 12 blocks, 6 heads, patch 2"."""

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
    def sizes(self) -> Self:
        """The same without `space`, which changes no weight and no graph: to be compared."""
        return self.model_copy(update={"space": None})

    @property
    def null_class(self) -> int | None:
        """The label that means "no class" in classifier-free guidance; None: there is none."""
        return self.classes.null

    def require_guidance(self, cfg_scale: float) -> None:
        """Raise `ConfigError` where `cfg_scale` asks for guidance and the model has no row for "no class"."""
        Guidance(cfg_scale, self.null_class)

    @property
    def dynamic(self) -> bool:
        """Whether the model carries routers."""
        return self.routers is not Routers.NONE

    def stating(self, space: Space | None, decoded: bool) -> Self:
        """The model with what it samples stated: `space`, or latents for one that gets a decoder and leaves it open."""
        if space is None and decoded and self.space_is_open:
            space = Space.LATENTS
        return self if space is None else parse_config(type(self), {**self.model_dump(), "space": space})

    @property
    def units(self) -> UnitAxis:
        """The units of all blocks, on one axis."""
        return _unit_axis(self)

    def without_routers(self) -> Self:
        """The static model of the same sizes."""
        return self.model_copy(update={"routers": Routers.NONE})


@lru_cache(64)
def _unit_axis(config: ModelConfig) -> UnitAxis:
    return UnitAxis(config.block_specs())


def parse_model(values: dict[str, Any], where: str = "") -> ModelConfig:
    """The model that values of a file describe, of the architecture that they name; as `parse_config`."""
    kind: Any = ModelConfig
    model: ModelConfig = parse_config(kind, values, where)
    return model


def parse_config(kind: type[T], values: dict[str, Any], where: str = "") -> T:
    """Build a configuration. Raises `SettingsError`, a `ConfigError` that names each bad field in one line.

    `where` is the file that the values come from, if they do; the line starts with it.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise SettingsError(problems_of(error), where) from error
