"""A bundle's VAE decoder on ONNX Runtime. Latents larger than its graph are decoded in overlapping tiles.

Tiles overlap by a quarter of their side and are blended linearly there: a decoder sees only its own tile, and hard
edges would show as seams.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from dydit.bundle.io_spec import BATCH
from dydit.bundle.vae_entry import VAE_DECODER, VaeEntry, vae_inputs
from dydit.errors import BackendError
from dydit.runtime.backends.base import BackendOptions, DecodeTile
from dydit.runtime.backends.session import PROVIDERS, Session, SessionSettings, runtime

IMAGES_AT_ONCE = 4
OVERLAP = 0.25


class VaeDecoder:
    """Decodes latents of the graph's own size and larger. `folder`: the bundle's; `entry`: its manifest's `vae`.

    With device `cuda` it runs on the CPU if this onnxruntime has no CUDA provider: the backend that sampled may not
    need one.
    """

    def __init__(self, folder: Path, entry: VaeEntry, options: BackendOptions | None = None):
        self.entry = entry
        options = options or BackendOptions()
        if PROVIDERS[options.device] not in runtime().get_available_providers():
            options = dataclasses.replace(options, device="cpu")
        options = dataclasses.replace(options, packed=True)
        self._session = Session(folder / VAE_DECODER, options, SessionSettings(arena=True))

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Latents f32 [B, C, H, W], as the sampler returned them, to pixels f32 [B, 3, H*upscale, W*upscale].

        Pixels are nominally in [-1, 1]; some lie slightly outside.
        """
        return decode_tiled(latents, self.entry, self._decode, IMAGES_AT_ONCE)

    def _decode(self, tiles: np.ndarray) -> np.ndarray:
        (spec,) = vae_inputs(self.entry)
        if tiles.dtype != np.float32 or tiles.shape != spec.concrete({BATCH: len(tiles)}):
            raise BackendError(
                f"VAE decoder: latents are {tiles.dtype.name} {tiles.shape}, expected float32 {spec.shape}"
            )
        (images,) = self._session.run({"latents": tiles}, "the VAE decoder").values()
        return images


def decode_tiled(latents: np.ndarray, entry: VaeEntry, decode: DecodeTile, at_once: int) -> np.ndarray:
    """Cut latents [B, C, H, W] into tiles, decode `at_once` tiles at a time, and blend them.

    Raises `BackendError` for latents smaller than a tile.
    """
    count, _, *sides = latents.shape
    if min(sides) < entry.tile:
        raise BackendError(
            f"VAE decoder: latents of {sides[0]}x{sides[1]} are smaller than {entry.tile}x{entry.tile}, the size "
            "that it was exported for"
        )
    tops, lefts = (tile_starts(side, entry.tile) for side in sides)
    tiles_at = [(image, top, left) for image in range(count) for top in tops for left in lefts]
    up, tile = entry.upscale, entry.tile
    side = ramp(tile * up, max(1, int(tile * OVERLAP)) * up)
    weight = np.outer(side, side)
    pixels = np.zeros((count, 3, sides[0] * up, sides[1] * up), np.float32)
    weights = np.zeros(pixels.shape[2:], np.float32)
    for first in range(0, len(tiles_at), at_once):
        part = tiles_at[first : first + at_once]
        tiles = np.stack([latents[i, :, top : top + tile, left : left + tile] for i, top, left in part])
        for (image, top, left), decoded in zip(part, decode(tiles), strict=True):
            window = (slice(top * up, (top + tile) * up), slice(left * up, (left + tile) * up))
            pixels[image][:, *window] += weight * decoded
            if image == 0:
                weights[window] += weight
    return pixels / weights


def tile_starts(side: int, tile: int) -> list[int]:
    """Where tiles begin so that they cover `side` and each overlaps the next by a quarter or more."""
    stride = max(1, tile - max(1, int(tile * OVERLAP)))
    return [*range(0, side - tile, stride), side - tile]


def ramp(side: int, overlap: int) -> np.ndarray:
    """Blending weights of a tile along one side, f32 [side]: rising over `overlap` pixels, 1, falling; never 0."""
    rising = np.minimum(1, (np.arange(side) + 1) / (overlap + 1))
    return np.minimum(rising, rising[::-1]).astype(np.float32)
