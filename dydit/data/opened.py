"""Opens training data by name, and checks that it fits a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from dydit.data.dataset import Dataset, EncodedCaptions, Examples
from dydit.data.small_sets import Digits, Emoji
from dydit.errors import ConfigError
from dydit.models.config import ModelConfig, TextSpec

SMALL_SETS: dict[str, Callable[[], Dataset]] = {"digits": Digits, "emoji": Emoji}
"""Sets that ship with dydit or its packages."""


class Unlabelled:
    """The images of other data for an unconditional model: every label is 0."""

    classes = 1
    class_names: tuple[str, ...] | None = None
    text: TextSpec | None = None

    def __init__(self, data: Dataset):
        self.data, self.shape, self.space = data, data.shape, data.space

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, indices: np.ndarray, generators: Sequence[np.random.Generator]) -> Examples:
        """Images float32 [n, C, S, S] and zeros int64 [n]."""
        examples = self.data.batch(indices, generators)
        return Examples(examples.images, np.zeros_like(examples.labels))

    def no_caption(self) -> EncodedCaptions:
        """There are no captions."""
        raise NotImplementedError


def open_data(name: str) -> Dataset:
    """The named data. Raises `ConfigError` for an unknown name."""
    if name not in SMALL_SETS:
        raise ConfigError(f"unknown data {name!r}; known: {', '.join(SMALL_SETS)}")
    return SMALL_SETS[name]()


def data_for(name: str, model: ModelConfig) -> Dataset:
    """The named data, checked against the model. An unconditional model gets it without labels.

    Raises `ConfigError` as `open_data`, and if image shape, number of classes or captions do not fit the model.
    """
    data = open_data(name)
    expected = (model.in_channels, model.input_size, model.input_size)
    if data.shape != expected:
        raise ConfigError(f"data {name} has images of {data.shape}, but the model takes {expected}")
    if model.text is not None:
        _check_captions(name, data.text, model.text)
        return data
    if model.classes.unconditional:
        return Unlabelled(data)
    if data.classes > model.classes.count:
        raise ConfigError(f"data {name} has {data.classes} classes, but the model has {model.classes.count}")
    return data


def _check_captions(name: str, given: TextSpec | None, wanted: TextSpec) -> None:
    """Check that data have captions which the model can take."""
    if given is None:
        raise ConfigError(
            f"data {name} has no encoded captions, but texts condition the model; make it with dydit prepare"
        )
    if given.channels != wanted.channels:
        raise ConfigError(
            f"data {name} has captions of {given.channels} channels, but the model takes {wanted.channels}; prepare it "
            "with the model's text encoder"
        )
    if given.tokens > wanted.tokens:
        raise ConfigError(
            f"data {name} has captions of up to {given.tokens} tokens, but the model takes {wanted.tokens}"
        )
