"""The configuration of a PixArt-alpha, and its published presets. NumPy only."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from dydit.diffusion.samplers import Sampler, SamplerConfig
from dydit.errors import ConfigError
from dydit.models.config import ClassLabels, TextSpec, parse_config
from dydit.models.pixart import units
from dydit.models.transformer.config import ModulatedConfig
from dydit.models.transformer.units import attention_macs, mlp_macs

COUNTED_TEXT_TOKENS = 40
PIXELS_PER_LATENT = 8
PADDING_BIAS = -10_000.0
"""What is added to the attention scores of padding, as in diffusers: its share is then 0."""


class PixArtConfig(ModulatedConfig):
    """Sizes of a PixArt-alpha (Chen et al. 2023) and the layout of its DyDiT routers.

    There are N = (input_size/patch_size)**2 tokens. `caption_channels`: those of the language model's output.
    `text_tokens`: the longest text of training, with padding. `micro_conditions`: whether the model also reads the
    resolution and the aspect ratio, as published at 1024 px. `interpolation_scale`: what the positions of patches are
    divided by; by default that of the published model of this size. `texts`, `negative_text`: of a run (`with_texts`).
    """

    OF_A_RUN: ClassVar[frozenset[str]] = frozenset({"texts", "negative_text"})

    architecture: Literal["pixart"] = "pixart"
    patch_size: int = Field(default=2, gt=0)
    caption_channels: int = Field(default=4096, gt=0)
    text_tokens: int = Field(default=120, gt=0)
    micro_conditions: bool = False
    interpolation_scale: int = Field(gt=0)
    texts: int = Field(default=0, ge=0, repr=False)
    negative_text: bool = Field(default=False, repr=False)

    @model_validator(mode="before")
    @classmethod
    def _of_published_scale(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("interpolation_scale") is not None:
            return values
        side = values.get("input_size")
        return {**values, "interpolation_scale": published_scale(side) if type(side) is int else 1}

    @model_validator(mode="after")
    def _divisible_for_embeddings(self) -> PixArtConfig:
        if self.hidden_size % 4:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of 4 (2-D sine position embedding)")
        if self.micro_conditions and self.hidden_size % 3:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of 3 (micro_conditions)")
        return self

    @property
    def text(self) -> TextSpec:
        return TextSpec(self.text_tokens, self.caption_channels)

    def with_texts(self, count: int, negative: bool) -> Self:
        return self.model_copy(update={"texts": count, "negative_text": negative})

    @property
    def classes(self) -> ClassLabels:
        """The texts of a run take the place of classes, the negative text that of "no class"."""
        return ClassLabels(self.texts, self.texts if self.negative_text else None)

    @property
    def sizes(self) -> Self:
        return super().sizes.model_copy(update={"texts": 0, "negative_text": False})

    @property
    def pixels(self) -> int:
        """The side of the images of the latents, which micro-conditions state."""
        return PIXELS_PER_LATENT * self.input_size

    @property
    def usual_run(self) -> SamplerConfig:
        return SamplerConfig(sampler=Sampler.DPM_SOLVER, steps=20)

    @property
    def usual_guidance(self) -> float:
        return 4.5

    @property
    def guided_channels(self) -> int:
        return self.in_channels

    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        return units.stored_shapes(self)

    @property
    def low_precision(self) -> tuple[str, ...]:
        return units.low_precision(self)

    @property
    def fp32_products(self) -> frozenset[str]:
        return units.fp32_products(self)

    @property
    def derived(self) -> frozenset[str]:
        return frozenset({"time.frequencies", "pos_embed"})

    def is_conditioning(self, tensor: str) -> bool:
        return units.is_conditioning(tensor)

    def is_text(self, tensor: str) -> bool:
        return units.is_text(tensor)

    @property
    def macs(self) -> int:
        """Blocks with texts of 40 tokens: 141.04 G for XL/2 at 256 px, the figure of DyDiT's paper."""
        return self.macs_with(COUNTED_TEXT_TOKENS)

    def macs_with(self, text_tokens: int) -> int:
        """Multiply-adds of all blocks for one image and a text of `text_tokens`, which are 148.31 G for 120 of them.

        Cross-attention to L tokens has 2ND^2 for queries and the projection, 2LD^2 for keys and values, and 2NLD.
        """
        n, d = self.tokens, self.hidden_size
        cross = 2 * n * d * d + 2 * text_tokens * d * d + 2 * n * text_tokens * d
        return self.depth * (attention_macs(self) + mlp_macs(self) + cross)


def published_scale(input_size: int) -> int:
    """The interpolation scale of the published models: 1 at 256 and 512 px, 2 at 1024 px."""
    return max(input_size // 64, 1)


PRESETS = ("XL/2",)


def preset(name: str = "XL/2", input_size: int = 32, **changes: Any) -> PixArtConfig:
    """The published sizes for a latent of `input_size`: 32 at 256 px, 64 at 512 px, 128 at 1024 px.

    Only the last has micro-conditions. With routers, unless `changes` say otherwise. Raises `ConfigError`, which lists
    the presets, for a name that is not one of them.
    """
    if name.removeprefix("PixArt-") not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; expected one of: {', '.join(PRESETS)}")
    values = {"hidden_size": 1152, "depth": 28, "num_heads": 16, "input_size": input_size}
    return parse_config(PixArtConfig, {**values, "micro_conditions": input_size == 128, **changes})
