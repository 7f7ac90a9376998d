"""Whether a bundle gives pictures, and how its samples become pixels. No other module decides that.

`ModelConfig.samples_pixels` says whether a model samples pixels. Latents go through the bundle's VAE decoder; without
one they stay latents. The decoder runs on the backend if that has one (`Backend.tile_decoder`: TensorRT, with an engine
that `dydit build` made), else on ONNX Runtime: on the GPU if the device is `cuda` and this ONNX Runtime supports it, or
on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dydit.bundle.manifest import Manifest
from dydit.errors import BackendError
from dydit.runtime.backends.base import Backend
from dydit.runtime.backends.session import runtime
from dydit.runtime.images.vae_decoder import IMAGES_AT_ONCE, VaeDecoder, decode_tiled


@dataclass(frozen=True)
class PictureFormat:
    """Pictures of a bundle: `channels` 1 (grey) or 3 (RGB), `side` in pixels; `decoded`: from latents, by the VAE."""

    channels: int
    side: int
    decoded: bool


def picture_format(manifest: Manifest) -> PictureFormat | None:
    """The format of a bundle's pictures; None if it samples latents and has no decoder."""
    model, vae = manifest.model, manifest.vae
    if vae is not None:
        return PictureFormat(3, model.input_size * vae.upscale, True)
    return PictureFormat(model.in_channels, model.input_size, False) if model.samples_pixels else None


def require_finite(pixels: np.ndarray) -> np.ndarray:
    """Return a decoder's pixels. Raises `BackendError` for NaN and infinities, which would silently become black."""
    if not np.isfinite(pixels).all():
        raise BackendError("the VAE decoder returns NaN or infinite pixels; use another VAE")
    return pixels


class ToPixels:
    """Turns the samples of a backend into pixels. The decoder is loaded when it is first needed.

    Raises `BackendError` if onnxruntime is needed and missing. Pass at most `IMAGES_AT_ONCE` in one call, which bounds
    the memory. Equal images in a call give equal bits.
    """

    def __init__(self, backend: Backend):
        self._bundle, self._options = backend.bundle, backend.options
        self._vae = backend.bundle.manifest.vae
        self._own = None if self._vae is None else backend.tile_decoder()
        if self._vae is not None and self._own is None:
            runtime()

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        """Samples f32 [B, C, S, S] to pixels f32 [B, channels, side, side], nominally in [-1, 1]."""
        if self._vae is None:
            return samples
        if self._own is not None:
            pixels = decode_tiled(samples, self._vae, self._own, IMAGES_AT_ONCE)
        else:
            pixels = self._decoder.decode(samples)
        return require_finite(pixels)

    @cached_property
    def _decoder(self) -> VaeDecoder:
        assert self._vae is not None
        return VaeDecoder(self._bundle.path, self._vae, self._options)
