"""Fills one shard of a prepared folder: pixels or moments, labels and captions, as bytes of safetensors."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dydit.data.dataset_folder import CAPTIONS, EMBEDDINGS, IMAGES, LABELS, MOMENTS, NUMBERS, TOKENS
from dydit.data.latents import LatentEncoder
from dydit.errors import ConfigError


class CaptionEncoder:
    """The language model of captions, which are cut to `tokens`. `at_once`: captions that are computed together."""

    def __init__(self, source: str, tokens: int, at_once: int, device: str):
        from dydit.runtime.prompts import TextEncoder

        self.source, self.tokens, self._at_once = source, tokens, at_once
        self._encoder = TextEncoder(source, device)
        self._encoder.require_tokens(tokens)
        self.channels = self._encoder.channels

    def encode(
        self, captions: list[str], progress: Callable[[int, int], None] = lambda done, total: None
    ) -> tuple[list[np.ndarray], int]:
        """Embeddings float16 [its tokens, channels] of each caption, and the number of captions that were cut."""
        rows, cut = self._encoder.embed(captions, self.tokens, self._at_once, progress)
        with np.errstate(over="ignore"):
            stored = [row.astype(np.float16) for row in rows]
        if not all(len(row) for row in stored):
            raise ConfigError(f"{self.source} makes no tokens of {captions[[*map(len, stored)].index(0)]!r}")
        if not all(np.isfinite(row).all() for row in stored):
            raise ConfigError(f"{self.source} makes embeddings that float16 cannot hold; give another --text-encoder")
        return stored, cut


class ShardWriter:
    """Takes images in order, in batches; `contents` are the tensors of the shard.

    `latents`: the autoencoder; None stores pixels. `mirrored`: also store the latents of the mirrored image.
    """

    def __init__(self, latents: LatentEncoder | None, mirrored: bool, batch_size: int):
        self._latents, self._mirrored, self._batch_size = latents, mirrored, batch_size
        self._waiting: list[np.ndarray] = []
        self._images: list[np.ndarray] = []
        self._labels: list[int] = []
        self._numbers: dict[str, int] = {}
        self._captions: list[tuple[str, ...]] = []

    def __len__(self) -> int:
        return len(self._labels)

    def add(self, pixels: np.ndarray, label: int, captions: tuple[str, ...]) -> None:
        """Take the next image, uint8 [C, S, S]."""
        self._labels.append(label)
        self._captions.append(captions)
        for each in captions:
            self._numbers.setdefault(each, len(self._numbers))
        self._waiting.append(pixels)
        if len(self._waiting) == self._batch_size:
            self._encode()

    def contents(
        self, captions: CaptionEncoder | None, progress: Callable[[int, int], None]
    ) -> tuple[dict[str, np.ndarray], int]:
        """The tensors, and the number of captions that were cut."""
        self._encode()
        tensors = {LABELS: np.array(self._labels, np.int64)}
        tensors[IMAGES if self._latents is None else MOMENTS] = np.concatenate(self._images)
        if captions is None:
            return tensors, 0
        embeddings, cut = captions.encode(list(self._numbers), progress)
        tensors |= {
            CAPTIONS: _starts([len(each) for each in self._captions]),
            NUMBERS: np.array([self._numbers[each] for group in self._captions for each in group], np.int64),
            TOKENS: _starts([len(each) for each in embeddings]),
            EMBEDDINGS: np.concatenate(embeddings),
        }
        return tensors, cut

    def _encode(self) -> None:
        if not self._waiting:
            return
        images, self._waiting = np.stack(self._waiting), []
        if self._latents is None:
            self._images.append(images)
            return
        forms = [images, np.ascontiguousarray(images[..., ::-1])] if self._mirrored else [images]
        self._images.append(np.stack([self._latents.encode(each) for each in forms], 1))


def shard_bytes(tensors: dict[str, np.ndarray]) -> bytes:
    """The tensors as a safetensors file, the same bytes for the same values."""
    from safetensors.numpy import save

    written: bytes = save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()})
    return written


def _starts(lengths: list[int]) -> np.ndarray:
    return np.cumsum([0, *lengths], dtype=np.int64)
