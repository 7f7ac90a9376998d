"""Whether a bundle gives pictures, and how what it samples becomes pixels: the one place that knows.

A model of 1 or 3 channels samples pixels itself. Latents go through the bundle's VAE decoder; without one they stay
latents. The decoder runs on ONNX Runtime, whatever backend sampled the latents: on the GPU where the device is `cuda`
and this ONNX Runtime can, else on the CPU. Engines that `dydit build` makes of it are not run yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dydit.bundle.bundle import Bundle
from dydit.bundle.manifest import Manifest
from dydit.errors import BackendError
from dydit.runtime.backends.base import BackendOptions
from dydit.runtime.backends.onnxruntime import runtime
from dydit.runtime.vae import IMAGES_AT_ONCE, VaeDecoder


@dataclass(frozen=True)
class PictureFormat:
    """Pictures of a bundle: `channels` 1 (grey) or 3 (RGB), `side` in pixels; `decoded`: from latents, by the VAE."""

    channels: int
    side: int
    decoded: bool


def picture_format(manifest: Manifest) -> PictureFormat | None:
    """What pictures a bundle gives; None where it samples latents and has no decoder."""
    model, vae = manifest.model, manifest.vae
    if vae is not None:
        return PictureFormat(3, model.input_size * vae.upscale, True)
    return PictureFormat(model.in_channels, model.input_size, False) if model.samples_pixels else None


class ToPixels:
    """Makes pixels of what a bundle samples; the decoder is loaded when it is first needed.

    Raises `BackendError` where onnxruntime is needed and missing. `at_once`: images to hand over in one call, so that
    memory is bounded; the same images in one call give the same bits.
    """

    at_once = IMAGES_AT_ONCE

    def __init__(self, bundle: Bundle, options: BackendOptions | None = None):
        self._bundle, self._options = bundle, options or BackendOptions()
        if bundle.manifest.vae is not None:
            runtime()

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        """Samples f32 [B, C, S, S] to pixels f32 [B, channels, side, side], meant for [-1, 1]."""
        if self._bundle.manifest.vae is None:
            return samples
        pixels = self._decoder.decode(samples, self.at_once)
        if not np.isfinite(pixels).all():
            raise BackendError("the VAE decoder returns NaN or infinite pixels; export the bundle with another VAE")
        return pixels

    @cached_property
    def _decoder(self) -> VaeDecoder:
        assert self._bundle.manifest.vae is not None
        return VaeDecoder(self._bundle.path, self._bundle.manifest.vae, self._options)
