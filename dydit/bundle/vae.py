"""A bundle's VAE decoder: what the manifest says of it, and its graph's inputs and outputs."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, FiniteFloat

from dydit.bundle.graph_io import BATCH, TensorSpec
from dydit.models.config import ModelConfig, Strict

VAE_DECODER: Literal["vae_decoder.onnx"] = "vae_decoder.onnx"
VAE_WEIGHTS: Literal["vae_weights.bin"] = "vae_weights.bin"


class VaeEntry(Strict):
    """A decoder from latents to RGB pixels in [-1, 1].

    The graph takes square `latents` of side `tile`, as the sampler returns them; what scales and shifts them for the
    autoencoder is inside. Larger latents are decoded in overlapping tiles. `scaling_factor`, `shift_factor`: those
    numbers, for the reader. `source`: where the autoencoder came from.
    """

    latent_channels: int = Field(ge=1)
    tile: int = Field(ge=1, description="side of the graph's latents")
    upscale: int = Field(ge=1, description="pixels of a latent's side")
    scaling_factor: float = Field(gt=0, allow_inf_nan=False)
    shift_factor: FiniteFloat
    source: str

    def unfit_reason(self, model: ModelConfig) -> str | None:
        """Why this decoder cannot serve a model's samples; None where it can."""
        if model.samples_pixels:
            return f"the model samples pixels of {model.in_channels} channels itself, and no latents to decode"
        if self.latent_channels != model.in_channels:
            return (
                f"{self.source} decodes latents of {self.latent_channels} channels, but the model has "
                f"{model.in_channels}"
            )
        if self.tile > model.input_size:
            return f"tiles of {self.tile} latents: expected 1..{model.input_size}, the side of the model's latents"
        return None


def vae_inputs(entry: VaeEntry) -> tuple[TensorSpec, ...]:
    """Input of the decoder's graph."""
    return (TensorSpec("latents", "float32", (BATCH, entry.latent_channels, entry.tile, entry.tile)),)


def vae_outputs(entry: VaeEntry) -> tuple[TensorSpec, ...]:
    """Output of the decoder's graph."""
    side = entry.tile * entry.upscale
    return (TensorSpec("images", "float32", (BATCH, 3, side, side)),)
