"""Images to the moments of their latents, by the encoder of diffusers' `AutoencoderKL`."""

from __future__ import annotations

import numpy as np

from dydit.data.small_sets import scaled
from dydit.errors import ConfigError


class LatentEncoder:
    """An autoencoder's encoder, loaded once.

    `source`: as for the decoder of `dydit export --vae`. `scale`, `shift`: replace the factors of its configuration.
    Raises `CheckpointError` if it cannot be read, `ConfigError` if it has a codebook, does not read RGB, or states no
    scaling factor.
    """

    def __init__(self, source: str, scale: float | None = None, shift: float | None = None, device: str = "cpu"):
        from dydit.export.vae_model import VaeOptions, load_vae_encoder, vae_entry

        vae = load_vae_encoder(source)
        if vae.quantised:
            raise ConfigError(f"{source} has a codebook, so its latents have no moments; give an AutoencoderKL")
        if vae.config["in_channels"] != 3:
            raise ConfigError(f"{source} encodes images of {vae.config['in_channels']} channels; expected 3, for RGB")
        self.source, self.channels, self._device = source, vae.latent_channels, device
        self._entry = vae_entry(source, vae, VaeOptions(scale=scale, shift=shift), tile=1)
        self._module = vae.module
        for part in (self._module.encoder, self._module.quant_conv):
            if part is not None:
                part.to(device)

    @property
    def scaling_words(self) -> str:
        """How latents are scaled, in words."""
        return self._entry.scaling_words

    def side(self, size: int) -> int:
        """The side of the latents of images of `size`. Raises `ConfigError` if that is not whole."""
        factor = self._entry.upscale
        if size % factor:
            raise ConfigError(f"{self.source} makes a latent of {factor}x{factor} pixels; {size} is no multiple of it")
        return size // factor

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Moments float16 [n, 2C, s, s] of images uint8 [n, 3, S, S]: mean and deviation as a model trains on them."""
        import torch

        with torch.inference_mode():
            drawn = self._module.encode(torch.from_numpy(scaled(images)).to(self._device)).latent_dist
            mean, deviation = drawn.mean.float().cpu().numpy(), drawn.std.float().cpu().numpy()
        entry = self._entry
        shift: np.ndarray | float = entry.shift_factor
        scale: np.ndarray | float = entry.scaling_factor
        if entry.latents_mean is not None and entry.latents_std is not None:
            shift = np.array(entry.latents_mean, np.float32)[:, None, None]
            scale = entry.scaling_factor / np.array(entry.latents_std, np.float32)[:, None, None]
        with np.errstate(over="ignore"):
            moments = np.concatenate([(mean - shift) * scale, deviation * scale], 1).astype(np.float16)
        if not np.isfinite(moments).all():
            raise ConfigError(
                f"{self.source} makes latents that float16 cannot hold; give another --vae or --vae-scale"
            )
        return moments
