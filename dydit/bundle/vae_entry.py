"""A bundle's VAE decoder: its entry in the manifest, and the inputs and outputs of its graph."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, FiniteFloat, SerializerFunctionWrapHandler, model_serializer, model_validator

from dydit.bundle.io_spec import BATCH, TensorSpec
from dydit.models.config import ModelConfig
from dydit.validation import Strict

VAE_DECODER: Literal["vae_decoder.onnx"] = "vae_decoder.onnx"
VAE_WEIGHTS: Literal["vae_weights.bin"] = "vae_weights.bin"


_ADDED = ("latents_mean", "latents_std", "codebook", "scale_assumed")
"""Fields that older bundles, and so their digests, do not have. They are left out of the file while they are empty."""


class VaeEntry(Strict):
    """A decoder from latents to RGB pixels in [-1, 1].

    The graph takes square `latents` of side `tile`, as the sampler returns them, and scales and shifts them for the
    autoencoder. Larger latents are decoded in overlapping tiles. The other fields are information for the reader: the
    autoencoder takes `latents / scaling_factor + shift_factor`, or, with a mean and deviation for each channel,
    `latents * latents_std / scaling_factor + latents_mean`. `scale_assumed`: the autoencoder's configuration states no
    scaling factor, so this is diffusers' default. `codebook`: the number of vectors in the codebook, the nearest of
    which replaces each latent before decoding; None: no codebook. `source`: where the autoencoder came from.
    """

    latent_channels: int = Field(ge=1)
    tile: int = Field(ge=1, description="side of the latents that the graph takes")
    upscale: int = Field(ge=1, description="pixels per latent, along one side")
    scaling_factor: float = Field(gt=0, allow_inf_nan=False)
    shift_factor: FiniteFloat
    source: str
    latents_mean: tuple[FiniteFloat, ...] | None = None
    latents_std: tuple[FiniteFloat, ...] | None = None
    codebook: int | None = Field(default=None, ge=1)
    scale_assumed: bool = False

    @model_serializer(mode="wrap")
    def _as_older_bundles(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = serialize(self)
        return {name: value for name, value in values.items() if value or name not in _ADDED}

    @model_validator(mode="after")
    def _one_convention(self) -> VaeEntry:
        if (self.latents_mean is None) != (self.latents_std is None):
            raise ValueError("latents_mean and latents_std must be given together, but only one of them is stated")
        if self.latents_mean is None or self.latents_std is None:
            return self
        if {len(self.latents_mean), len(self.latents_std)} != {self.latent_channels}:
            raise ValueError(
                f"latents_mean has {len(self.latents_mean)} numbers and latents_std {len(self.latents_std)}; expected "
                f"{self.latent_channels}, one for each latent channel"
            )
        if min(self.latents_std) <= 0:
            raise ValueError(f"latents_std holds {min(self.latents_std)}; expected numbers above 0")
        if self.shift_factor:
            raise ValueError("latents_mean and shift_factor both shift latents; only one of them can be stated")
        return self

    def unfit_reason(self, model: ModelConfig) -> str | None:
        """Why this decoder cannot decode a model's samples; None if it can."""
        if model.samples_pixels:
            return f"the model samples pixels of {model.in_channels} channels, so there are no latents to decode"
        return self.unfit_latents(model.in_channels, model.input_size, "the model has")

    def unfit_latents(self, channels: int, side: int, whose: str) -> str | None:
        """Why this decoder cannot decode latents [channels, side, side]; None if it can.

        `whose`: the subject and verb of the message's part about the latents, such as "the model has".
        """
        if self.latent_channels != channels:
            return f"{self.source} decodes latents of {self.latent_channels} channels, but {whose} {channels}"
        if self.tile > side:
            return f"the tile has a side of {self.tile} latents; expected 1..{side}, the side of the model's latents"
        return None

    @property
    def scaling_words(self) -> str:
        """How latents are scaled for the autoencoder, in words."""
        parts = [f"scaling factor {self.scaling_factor:g}"]
        if self.scale_assumed:
            parts[0] += " (diffusers' default: the autoencoder's configuration states none)"
        if self.shift_factor:
            parts.append(f"shift factor {self.shift_factor:g}")
        if self.latents_mean is not None:
            parts.append("a mean and deviation for each channel")
        if self.codebook is not None:
            parts.append(f"a codebook of {self.codebook}")
        return ", ".join(parts)


def vae_inputs(entry: VaeEntry) -> tuple[TensorSpec, ...]:
    """The input of the decoder's graph."""
    return (TensorSpec("latents", "float32", (BATCH, entry.latent_channels, entry.tile, entry.tile)),)


def vae_outputs(entry: VaeEntry) -> tuple[TensorSpec, ...]:
    """The output of the decoder's graph."""
    side = entry.tile * entry.upscale
    return (TensorSpec("images", "float32", (BATCH, 3, side, side)),)
