"""Small sets of real images that are there without a download: handwritten digits, and emoji."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from dydit.data.dataset import EncodedCaptions, Examples
from dydit.errors import ConfigError
from dydit.models.config import Space, TextSpec

_ASSETS = Path(__file__).parents[1] / "assets"


class Digits:
    """scikit-learn's 1,797 handwritten digits (UCI "Optical Recognition of Handwritten Digits"), 8x8 enlarged to 16x16.

    Installed with scikit-learn, so nothing is downloaded. Not mirrored: a mirrored 2 is not a 2.
    """

    shape: tuple[int, int, int] = (1, 16, 16)
    space = Space.PIXELS
    classes = 10
    class_names: tuple[str, ...] | None = None
    text: TextSpec | None = None

    def __init__(self) -> None:
        self.images, self.labels = _load_digits()

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: np.ndarray, generators: Sequence[np.random.Generator]) -> Examples:
        """Images float32 [n, 1, 16, 16] and labels int64 [n]."""
        return Examples(self.images[indices], self.labels[indices])

    def no_caption(self) -> EncodedCaptions:
        """Digits have no captions."""
        raise NotImplementedError


class Emoji:
    """1,906 emoji of Noto Emoji (Google, Apache License 2.0) on white, 32x32 RGB, in 9 classes, each with a name.

    `captions`: the name of each image. Half of the images are mirrored when they are read, but not flags and symbols.
    `scripts/make_emoji.py` made the files from an npm package.
    """

    shape: tuple[int, int, int] = (3, 32, 32)
    space = Space.PIXELS
    text: TextSpec | None = None

    def __init__(self) -> None:
        self.images, facts = _load_emoji()
        self.labels = np.array(facts["labels"], np.int64)
        self.captions: tuple[str, ...] = tuple(facts["captions"])
        self.class_names: tuple[str, ...] | None = tuple(facts["categories"])
        self.classes = len(facts["categories"])
        self.mirrored = ~np.isin(self.labels, facts["not_mirrored"])

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: np.ndarray, generators: Sequence[np.random.Generator]) -> Examples:
        """Images float32 [n, 3, 32, 32] and labels int64 [n]."""
        drawn = np.array([each.random() < 0.5 for each in generators])
        return Examples(scaled(mirror(self.images[indices], drawn & self.mirrored[indices])), self.labels[indices])

    def no_caption(self) -> EncodedCaptions:
        """Captions are not encoded: `dydit prepare emoji` makes data with encoded ones."""
        raise NotImplementedError


def mirror(images: np.ndarray, which: np.ndarray) -> np.ndarray:
    """Images [n, C, S, S], those of `which`, bool [n], with left and right exchanged."""
    return np.where(which[:, None, None, None], images[..., ::-1], images)


def scaled(images: np.ndarray) -> np.ndarray:
    """Bytes 0..255 to float32 in [-1, 1]."""
    return images.astype(np.float32) / np.float32(127.5) - 1


@lru_cache(maxsize=1)
def _load_emoji() -> tuple[np.ndarray, dict[str, Any]]:
    """Images uint8 [n, 3, 32, 32], and what `emoji.json` says about them."""
    from PIL import Image

    facts = json.loads((_ASSETS / "emoji" / "emoji.json").read_text(encoding="utf-8"))
    with Image.open(_ASSETS / "emoji" / "emoji.png") as file:
        sheet = np.asarray(file)
    side, count = facts["side"], len(facts["labels"])
    tiles = sheet.reshape(len(sheet) // side, side, facts["columns"], side, 3).transpose(0, 2, 4, 1, 3)
    images = np.ascontiguousarray(tiles.reshape(-1, 3, side, side)[:count])
    images.flags.writeable = False
    return images, facts


@lru_cache(maxsize=1)
def _load_digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    small = bunch.images.astype(np.float32) / 8 - 1  # 0..16 to -1..1
    images = enlarge(enlarge(small, 1), 2)[:, None]
    images.flags.writeable = False
    return images, bunch.target.astype(np.int64)


def enlarge(values: np.ndarray, axis: int) -> np.ndarray:
    """Double the length along `axis` by linear interpolation: output i lies at (i + 1/2)/2 - 1/2, edges repeated."""
    moved = np.moveaxis(values, axis, -1)
    padded = np.concatenate([moved[..., :1], moved, moved[..., -1:]], -1)
    left = 0.75 * moved + 0.25 * padded[..., :-2]
    right = 0.75 * moved + 0.25 * padded[..., 2:]
    longer = np.stack([left, right], -1).reshape(*moved.shape[:-1], -1)
    return np.asarray(np.moveaxis(longer, -1, axis))


def digits_pixels(images: np.ndarray) -> np.ndarray:
    """Images [n, 1, 16, 16] in [-1, 1] to 64 features in [0, 1]: clipped means of 2x2 pixels, float64 [n, 64].

    Real and generated images are both converted by this function.
    """
    if images.ndim != 4 or images.shape[1:] != (1, 16, 16):
        raise ConfigError(f"digits are [n, 1, 16, 16]; got {list(images.shape)}")
    means = images.astype(np.float64).reshape(-1, 8, 2, 8, 2).mean((2, 4))
    return np.asarray(np.clip((means + 1) / 2, 0, 1).reshape(len(images), 64))
