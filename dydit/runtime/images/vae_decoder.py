"""From latents to pixels: a bundle's VAE decoder on ONNX Runtime, in overlapping tiles where latents are larger.

Tiles overlap by a quarter of their side and are blended linearly there, since a decoder sees no further than its tile
and would leave seams.
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

    With `cuda` as its device it runs on the CPU where this onnxruntime has no CUDA provider: the backend that sampled
    may need none.
    """

    def __init__(self, folder: Path, entry: VaeEntry, options: BackendOptions | None = None):
        self.entry = entry
        options = options or BackendOptions()
        if PROVIDERS[options.device] not in runtime().get_available_providers():
            options = dataclasses.replace(options, device="cpu")
        options = dataclasses.replace(options, packed=True)
        self._session = Session(folder / VAE_DECODER, options, SessionSettings(arena=True))

    def decode(self, latents: np.ndarray, at_once: int = IMAGES_AT_ONCE) -> np.ndarray:
        """Latents f32 [B, C, H, W], as the sampler returned them, to pixels f32 [B, 3, H*upscale, W*upscale].

        `at_once` tiles or images are decoded together, which bounds the memory. Pixels are meant for [-1, 1]; some lie
        slightly outside.
        """
        return decode_tiled(latents, self.entry, self._decode, at_once)

    def _decode(self, tiles: np.ndarray) -> np.ndarray:
        feeds = {"latents": tiles}
        _check(feeds, self.entry)
        (images,) = self._session.run(feeds, "the VAE decoder").values()
        return images


def _check(feeds: dict[str, np.ndarray], entry: VaeEntry) -> None:
    specs = vae_inputs(entry)
    array = feeds["latents"]
    fits = array.ndim == 4 and array.shape[1:] == specs[0].concrete({BATCH: 1})[1:]
    if array.dtype != np.float32 or not fits:
        raise BackendError(
            f"VAE decoder: latents are {array.dtype.name} {array.shape}, expected float32 {specs[0].shape}"
        )


def decode_tiled(latents: np.ndarray, entry: VaeEntry, decode: DecodeTile, at_once: int) -> np.ndarray:
    """Cut latents [B, C, H, W] into tiles, decode `at_once` at a time, blend. Raises `BackendError` below one tile."""
    count, _, *sides = latents.shape
    if min(sides) < entry.tile:
        raise BackendError(
            f"VAE decoder: latents of {sides[0]}x{sides[1]} are smaller than the {entry.tile}x{entry.tile} that it was "
            "exported for"
        )
    tops, lefts = (tile_starts(side, entry.tile) for side in sides)
    places = [(image, top, left) for image in range(count) for top in tops for left in lefts]
    up, tile = entry.upscale, entry.tile
    weight = np.outer(*(ramp(tile * up, max(1, int(tile * OVERLAP)) * up) for _ in range(2)))
    pixels = np.zeros((count, 3, sides[0] * up, sides[1] * up), np.float32)
    weights = np.zeros(pixels.shape[2:], np.float32)
    for first in range(0, len(places), at_once):
        part = places[first : first + at_once]
        tiles = np.stack([latents[i, :, top : top + tile, left : left + tile] for i, top, left in part])
        for (image, top, left), decoded in zip(part, decode(tiles), strict=True):
            window = (slice(top * up, (top + tile) * up), slice(left * up, (left + tile) * up))
            pixels[image][:, *window] += weight * decoded
            if image == 0:
                weights[window] += weight
    return pixels / weights


def tile_starts(side: int, tile: int) -> list[int]:
    """Where tiles begin so that they cover `side`, each overlapping the next by a quarter or more."""
    stride = max(1, tile - max(1, int(tile * OVERLAP)))
    return [*range(0, side - tile, stride), side - tile]


def ramp(side: int, overlap: int) -> np.ndarray:
    """Weights of a tile along one side: rising over `overlap` pixels, 1 inside, falling; never 0. f32 [side]."""
    rising = np.minimum(1, (np.arange(side) + 1) / (overlap + 1))
    return np.minimum(rising, rising[::-1]).astype(np.float32)
