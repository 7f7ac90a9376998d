"""A bundle's VAE decoder: what the manifest says of it, and its graph's inputs and outputs."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dydit.bundle.graph_io import BATCH, TensorSpec
from dydit.models.config import Strict

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
    scaling_factor: float = Field(gt=0)
    shift_factor: float
    source: str


def vae_inputs(entry: VaeEntry) -> tuple[TensorSpec, ...]:
    """Input of the decoder's graph."""
    return (TensorSpec("latents", "float32", (BATCH, entry.latent_channels, entry.tile, entry.tile)),)


def vae_outputs(entry: VaeEntry) -> tuple[TensorSpec, ...]:
    """Output of the decoder's graph."""
    side = entry.tile * entry.upscale
    return (TensorSpec("images", "float32", (BATCH, 3, side, side)),)
