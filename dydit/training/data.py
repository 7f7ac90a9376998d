"""Training data behind one protocol. A new kind of data is a new class here and a line in `_KNOWN`.

Images are float32 [n, C, S, S] in [-1, 1] (or scaled latents), labels int64 [n]. Images are read by index, so the loop
alone decides the order and can repeat it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Protocol

import numpy as np

from dydit.errors import ConfigError
from dydit.models.config import ModelConfig


class Dataset(Protocol):
    """Labelled images or latents that can be read by index."""

    shape: tuple[int, int, int]  # (C, S, S)
    classes: int
    flip: bool  # whether mirrored images are as good as the images

    def __len__(self) -> int:
        """Number of images."""
        ...

    def batch(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images float32 [n, C, S, S] and labels int64 [n] at `indices` [n]."""
        ...


class Digits:
    """scikit-learn's 1,797 handwritten digits (UCI "Optical Recognition of Handwritten Digits"), 8x8 enlarged to 16x16.

    Installed with scikit-learn, so nothing is downloaded. Not mirrored: a mirrored 2 is not a 2.
    """

    shape = (1, 16, 16)
    classes = 10
    flip = False

    def __init__(self) -> None:
        self.images, self.labels = _load_digits()

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images float32 [n, 1, 16, 16] and labels int64 [n]."""
        return self.images[indices], self.labels[indices]


class Unlabelled:
    """The images of other data for an unconditional model: every label is 0."""

    classes = 1

    def __init__(self, data: Dataset):
        self.data, self.shape, self.flip = data, data.shape, data.flip

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images float32 [n, C, S, S] and zeros int64 [n]."""
        images, labels = self.data.batch(indices)
        return images, np.zeros_like(labels)


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


_KNOWN: dict[str, Callable[[], Dataset]] = {"digits": Digits}


def open_data(name: str, model: ModelConfig) -> Dataset:
    """The named data, checked against the model. An unconditional model gets it without labels.

    Raises `ConfigError` for an unknown name, and if image shape or number of classes do not fit the model.
    """
    if name not in _KNOWN:
        raise ConfigError(f"unknown data {name!r}; known: {', '.join(_KNOWN)}")
    data = _KNOWN[name]()
    expected = (model.in_channels, model.input_size, model.input_size)
    if data.shape != expected:
        raise ConfigError(f"data {name} has images of {data.shape}, but the model takes {expected}")
    if model.classes.unconditional:
        return Unlabelled(data)
    if data.classes > model.classes.count:
        raise ConfigError(f"data {name} has {data.classes} classes, but the model has {model.classes.count}")
    return data


def known_data() -> tuple[str, ...]:
    """The names of all data."""
    return tuple(_KNOWN)


def find_data(name: str) -> Dataset:
    """The named data, for no model in particular. Raises `ConfigError` for an unknown name."""
    if name not in _KNOWN:
        raise ConfigError(f"unknown data {name!r}; known: {', '.join(_KNOWN)}")
    return _KNOWN[name]()
