"""Opens training data by name, and checks that it fits a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from dydit.data.dataset import Dataset, EncodedCaptions, Examples
from dydit.data.prepared import PreparedData
from dydit.data.small_sets import Digits, Emoji
from dydit.errors import ConfigError
from dydit.files import user_path
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
    """The named data: a small set, or the folder of prepared data. Raises `ConfigError` if it is neither.

    A name with a slash in it, or that of a folder, is a path; `./digits` is a folder of that name.
    """
    if name in SMALL_SETS:
        return SMALL_SETS[name]()
    folder = user_path(name)
    if "/" in name or folder.is_dir():
        return PreparedData(folder)
    raise ConfigError(
        f"unknown data {name!r}; known: {', '.join(SMALL_SETS)}, and the path of a folder that dydit prepare wrote"
    )


def data_for(name: str, model: ModelConfig) -> Dataset:
    """The named data, checked against the model. An unconditional model gets it without labels.

    A model that texts condition gets captions padded to its tokens; any other model gets no captions. Raises
    `ConfigError` as `open_data`, and if image shape, number of classes or captions do not fit the model.
    """
    data = open_data(name)
    expected = (model.in_channels, model.input_size, model.input_size)
    if data.shape != expected:
        raise ConfigError(f"data {name} has images of {data.shape}, but the model takes {expected}")
    if model.text is not None:
        return _with_captions(name, data, model.text)
    if isinstance(data, PreparedData):
        data = data.without_captions()
    if model.classes.unconditional:
        return Unlabelled(data)
    if data.classes > model.classes.count:
        raise ConfigError(f"data {name} has {data.classes} classes, but the model has {model.classes.count}")
    return data


def _with_captions(name: str, data: Dataset, wanted: TextSpec) -> Dataset:
    """The data with captions as a model takes them."""
    if data.text is None:
        raise ConfigError(
            f"data {name} has no encoded captions, but texts condition the model; make it with dydit prepare "
            "--text-encoder"
        )
    if data.text.channels != wanted.channels:
        raise ConfigError(
            f"data {name} has captions of {data.text.channels} channels, but the model takes {wanted.channels}; "
            "prepare it with the model's text encoder"
        )
    if data.text.tokens > wanted.tokens:
        raise ConfigError(
            f"data {name} has captions of up to {data.text.tokens} tokens, but the model takes {wanted.tokens}; "
            f"prepare it with --text-tokens {wanted.tokens}"
        )
    return data.padded_to(wanted.tokens) if isinstance(data, PreparedData) else data
