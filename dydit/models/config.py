"""The configuration that every architecture has, for the rest of dydit. No PyTorch here.

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
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from dydit.diffusion.guidance import DEFAULT_SCALE, Guidance
from dydit.diffusion.process import Process
from dydit.diffusion.samplers import SamplerConfig, default_sampler
from dydit.errors import ConfigError
from dydit.files import user_path
from dydit.models.architecture import BlockSpec, UnitAxis
from dydit.models.registry import DEFAULT, architecture
from dydit.validation import SettingsError, Strict, problems_of

T = TypeVar("T", bound=BaseModel)
TEXTS_NEEDED = (
    "this model is conditioned by texts; give a file of their embeddings (--texts FILE) or prompts (--prompt, prompt=)"
)
PICTURE_CHANNELS = (1, 3)
"""Channels of an image: grey, or RGB."""
UserPath = Annotated[Path, AfterValidator(user_path)]
"""A path in a configuration; `~` is the home folder."""


class Routers(StrEnum):
    """Which routers a checkpoint has, and for which units its width routers compute logits."""

    NONE = "none"  # a static model
    FIRST_ON = "first-on"  # no logit for unit 0, which is always on
    ALL_ROUTED = "all-routed"  # a logit for every unit, as in an older release; every unit may be off


class TokenScope(StrEnum):
    """What a token router decides on."""

    TOKEN = "token"  # every token of an image
    LAYER = "layer"  # all tokens of an image together, by the mean of their logits: the MLP is skipped or not


class Space(StrEnum):
    """What a model was trained on, and therefore samples."""

    PIXELS = "pixels"  # grey or RGB, in [-1, 1]
    LATENTS = "latents"  # of an autoencoder, whose decoder turns them into pixels


@dataclass(frozen=True)
class ClassLabels:
    """The class labels that a model takes: 0 to `count` - 1, and `null`, which stands for "no class".

    Classifier-free guidance needs `null`; None: the model was trained without it. An unconditional model has one class.
    """

    count: int
    null: int | None

    @property
    def rows(self) -> int:
        """The number of labels that the network takes, with `null`. Labels are below this number."""
        return self.count + (self.null is not None)

    @property
    def unconditional(self) -> bool:
        """Whether there is nothing to choose: label 0 is the only one."""
        return self.rows == 1


@dataclass(frozen=True)
class TextSpec:
    """The texts that a model takes: of `tokens` each, as it was trained, with `channels` of the language model."""

    tokens: int
    channels: int


class ModelConfig(Strict):
    """The configuration of a model. Each architecture has a subclass with its own sizes.

    `hidden_size`: channels D of the residual stream. `depth`: the number of blocks L. `input_size`: the side of the
    square of latents or pixels, which has `in_channels` channels. `learn_sigma`: whether the output has as many further
    channels, for the variance. `token_scope`: what token routers decide on. `space`: what the model was trained on.
    Weights do not show it, so it is None unless the checkpoint, its folder or the user states it; `samples_pixels` then
    depends on the number of channels. `process`: how noise was added in training, and what the output predicts; None if
    nothing states it.
    `class_names`: a text for each class, of one or more names with commas between them; None if nothing states them.
    """

    UNSTATED: ClassVar[dict[str, Any]] = {
        "token_scope": TokenScope.TOKEN,
        "space": None,
        "process": None,
        "class_names": None,
    }
    OF_A_RUN: ClassVar[frozenset[str]] = frozenset()  # fields that are set for a run, and are in no file

    architecture: str
    hidden_size: int = Field(gt=0)
    depth: int = Field(gt=0)
    input_size: int = Field(gt=0)
    in_channels: int = Field(default=4, gt=0)
    learn_sigma: bool = True
    routers: Routers = Routers.FIRST_ON
    token_scope: TokenScope = TokenScope.TOKEN
    space: Space | None = None
    process: Process | None = None
    class_names: tuple[str, ...] | None = Field(default=None, repr=False)

    @model_validator(mode="wrap")
    @classmethod
    def _of_its_architecture(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Validate values for a `ModelConfig` as the subclass of the architecture that they name."""
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
        return {
            name: value
            for name, value in values.items()
            if name not in self.OF_A_RUN and value != self.UNSTATED.get(name, ...)
        }

    @model_validator(mode="after")
    def _pixels_have_colours(self) -> Self:
        if self.space is Space.PIXELS and self.in_channels not in PICTURE_CHANNELS:
            raise ValueError(
                f"{self.in_channels} channels cannot be pixels; expected 1 (grey) or 3 (RGB); state latents instead"
            )
        return self

    @model_validator(mode="after")
    def _classes_have_names(self) -> Self:
        if self.class_names is not None and len(self.class_names) != self.classes.count:
            raise ValueError(f"class_names has {len(self.class_names)} names for {self.classes.count} classes")
        return self

    # What an architecture says about its models.

    @property
    @abstractmethod
    def tokens(self) -> int:
        """N, the number of tokens per image, with `extra_tokens`."""

    @property
    def extra_tokens(self) -> int:
        """The number of tokens at the start of an image's tokens that are not of the image. They are always routed."""
        return 0

    @property
    @abstractmethod
    def classes(self) -> ClassLabels:
        """The class labels that the model takes."""

    @property
    def text(self) -> TextSpec | None:
        """The texts that condition the model, in place of class labels; None for all other models."""
        return None

    def with_texts(self, count: int, negative: bool) -> Self:
        """The model of a run with `count` texts, whose labels are their numbers. `negative`: whether there is one."""
        raise ConfigError("this model takes class labels, not texts")

    def with_classes(self, count: int) -> Self:
        """The model with another number of classes, whose names are not stated."""
        raise ConfigError(f"a {self.title} of this kind has no classes that could be changed")

    @property
    @abstractmethod
    def condition_shape(self) -> tuple[int, ...]:
        """Shape of the condition of one row: what the conditioning graph computes for a timestep and label."""

    @abstractmethod
    def block_specs(self) -> Sequence[BlockSpec]:
        """The unit groups of every block."""

    @abstractmethod
    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor that a bundle stores, by name."""

    @property
    @abstractmethod
    def low_precision(self) -> tuple[str, ...]:
        """Stored tensors in a bundle's precision, besides those of units' layers. All others are fp32."""

    @property
    @abstractmethod
    def fp32_products(self) -> frozenset[str]:
        """Stored weights whose products are fp32 in every precision."""

    @property
    def title(self) -> str:
        """The name of the kind of model in reports, such as "DiT"."""
        return f"{'dynamic ' if self.dynamic else ''}{architecture(self.architecture).title}"

    @property
    def derived(self) -> frozenset[str]:
        """Stored tensors that are computed and are not parameters."""
        return frozenset()

    @abstractmethod
    def is_conditioning(self, tensor: str) -> bool:
        """Whether no subnetwork reads a stored tensor, but only the conditioning graph or the text graph."""

    def is_text(self, tensor: str) -> bool:
        """Whether only the text graph reads a stored tensor. It then also is one of `is_conditioning`."""
        return False

    @property
    @abstractmethod
    def macs(self) -> int:
        """Multiply-adds of one static forward pass for one image, as the paper counts them."""

    @property
    @abstractmethod
    def summary(self) -> str:
        """Its sizes in words: "hidden 384, 12 blocks, 6 heads, patch 2"."""

    @property
    def token_router_hidden(self) -> int:
        """Width of the token router's hidden layer, D/16."""
        return max(1, self.hidden_size // 16)

    @property
    def out_channels(self) -> int:
        """Output channels: epsilon, and the variance if it is learned."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def usual_process(self) -> Process:
        """The process of published models, which is assumed if none is stated."""
        return Process()

    @property
    def diffusion(self) -> Process:
        """The process of training; if none is stated, the usual one."""
        return self.process or self.usual_process

    @property
    def usual_run(self) -> SamplerConfig:
        """The sampler and the number of steps with which models of this kind are published."""
        return SamplerConfig(sampler=default_sampler(self.diffusion))

    @property
    def guided_channels(self) -> int:
        """The number of channels that guidance acts on by default: 3, as in the published code of DiT."""
        return min(3, self.in_channels)

    @property
    def samples_pixels(self) -> bool:
        """Whether samples are pixels, grey or RGB, and not latents that a decoder turns into pixels.

        If `space` does not state it, models of 1 or 3 channels are assumed to sample pixels. Latents of 3 channels
        exist (VQ-f4), so callers report the assumption: see `space_is_assumed`.
        """
        if self.space is not None:
            return self.space is Space.PIXELS
        return self.in_channels in PICTURE_CHANNELS

    @property
    def space_is_open(self) -> bool:
        """Whether `space` is not stated and the number of channels could be that of pixels."""
        return self.space is None and self.in_channels in PICTURE_CHANNELS

    @property
    def space_is_assumed(self) -> bool:
        """Whether samples are assumed to be pixels although latents with that many channels are common."""
        return self.space is None and self.in_channels == 3

    @property
    def space_words(self) -> str:
        """What samples are, in words."""
        if not self.samples_pixels:
            return "latents"
        kind = "grey" if self.in_channels == 1 else "RGB"
        assumed = "; assumed because of 3 channels: if they are latents (VQ-f4), give --space latents"
        return f"pixels, {kind}{assumed if self.space_is_assumed else ''}"

    @property
    def sizes(self) -> Self:
        """The configuration without what affects no weight, such as `space` and `class_names`; for comparisons."""
        unused = {} if self.dynamic else {"token_scope": TokenScope.TOKEN}
        return self.model_copy(update={"space": None, "process": None, "class_names": None, **unused})

    def difference(self, other: ModelConfig) -> tuple[str, Any, Any]:
        """The first field in which the sizes of two models differ, with its values; they must differ in one."""
        ours, theirs = self.sizes, other.sizes
        for name in ("architecture", *type(ours).model_fields):
            values = getattr(ours, name), getattr(theirs, name, None)
            if values[0] != values[1]:
                return name, *values
        raise AssertionError(f"both are {ours}")

    @property
    def null_class(self) -> int | None:
        """The label for "no class" in classifier-free guidance; None if there is none."""
        return self.classes.null

    @property
    def usual_guidance(self) -> float:
        """The guidance scale of published examples."""
        return DEFAULT_SCALE

    def guidance_scale(self, given: float | None) -> float:
        """The guidance scale of a run: the `given` one, by default `usual_guidance`, or 1 (none) for an unconditional
        model.

        Raises `ConfigError` if the scale needs guidance and the model has no row for "no class", or if a model that
        texts condition has none.
        """
        if self.text is not None and not self.classes.rows:
            raise ConfigError(TEXTS_NEEDED)
        if self.text is not None:
            scale = self.usual_guidance if given is None else given
            if scale != 1 and self.null_class is None:
                raise ConfigError(
                    f"guidance {scale:g} needs a negative text beside the others (negative_prompt_embeds); or use "
                    "--cfg-scale 1 (guidance_scale=1)"
                )
            return scale
        usual = 1.0 if self.classes.unconditional else self.usual_guidance
        return Guidance(usual if given is None else given, self.null_class).scale

    @property
    def dynamic(self) -> bool:
        """Whether the model has routers."""
        return self.routers is not Routers.NONE

    def stating(self, space: Space | None, decoded: bool) -> Self:
        """The model with `space` stated. If that is None, a model with an open space and a decoder samples latents."""
        if space is None and decoded and self.space_is_open:
            space = Space.LATENTS
        return self if space is None else parse_config(type(self), {**self.model_dump(), "space": space})

    @property
    def units(self) -> UnitAxis:
        """The axis of the units of all blocks."""
        return _unit_axis(self)

    def without_routers(self) -> Self:
        """The static model of the same sizes."""
        return self.model_copy(update={"routers": Routers.NONE, "token_scope": TokenScope.TOKEN})


@lru_cache(64)
def _unit_axis(config: ModelConfig) -> UnitAxis:
    return UnitAxis(config.block_specs())


def parse_model(values: dict[str, Any], where: str = "") -> ModelConfig:
    """The model that values of a file describe. They may name its architecture. Raises what `parse_config` raises."""
    kind: Any = ModelConfig
    model: ModelConfig = parse_config(kind, values, where)
    return model


def parse_config(kind: type[T], values: dict[str, Any], where: str = "") -> T:
    """Build a configuration. Raises `SettingsError`, a `ConfigError` that names each bad field in one line.

    `where`: the file that the values come from, if there is one. The line starts with it.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise SettingsError(problems_of(error), where) from error
