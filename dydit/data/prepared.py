"""Reads a folder that `dydit prepare` wrote, image by image, as training asks for them.

The shards are mapped into memory: opening a folder reads headers, labels and the places of captions only.

What is random about an image is drawn from its generator in this order: one number in [0, 1), below 1/2 for an image
that is mirrored (only where the data are mirrored); the number of its caption (only where there are captions); the
noise of its latent (only for latents). So the example of an image depends on that image and its generator alone.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dydit.data.dataset import EncodedCaptions, Examples
from dydit.data.dataset_folder import (
    CAPTIONS,
    EMBEDDINGS,
    IMAGES,
    LABELS,
    MOMENTS,
    NO_CAPTION,
    NUMBERS,
    TOKENS,
    DatasetInfo,
    StoredFile,
    check_sizes,
    read_info,
)
from dydit.data.small_sets import scaled
from dydit.errors import ConfigError, one_line
from dydit.extras import require
from dydit.models.config import Space, TextSpec


class PreparedData:
    """The images of a prepared folder; a `Dataset`.

    Opening it compares the sizes of the files and the shapes of the tensors with `dataset.json`; `dydit prepare
    --check` also compares hashes. Latents are drawn anew each time: mean + deviation * normal noise. The stored moments
    are scaled and shifted as the autoencoder's configuration says, so the model trains on them as they are. Raises
    `ConfigError` if the folder is unfinished or damaged.
    """

    def __init__(self, folder: Path):
        require("reading prepared data", ("safetensors",))
        self.folder, self.info = folder, read_info(folder)
        check_sizes(folder, self.info)
        self.shape, self.space, self.text = self.info.shape, self.info.space, self.info.text
        self.classes, self.class_names = self.info.classes, self.info.class_names
        self._shards = [_Shard(folder, stored, self.info) for stored in self.info.shards]
        self._starts = np.cumsum([0, *(stored.images for stored in self.info.shards)])
        self._empty = None if self.text is None else _empty_caption(folder, self.text)

    def __len__(self) -> int:
        return self.info.images

    def padded_to(self, tokens: int) -> PreparedData:
        """The same data with captions padded to `tokens`, which are no fewer than those of the longest caption."""
        assert self.text is not None and tokens >= self.text.tokens
        other = copy.copy(self)
        other.text = TextSpec(tokens, self.text.channels)
        return other

    def without_captions(self) -> PreparedData:
        """The same images and labels for a model that no texts condition."""
        other = copy.copy(self)
        other.text = None
        return other

    def batch(self, indices: np.ndarray, generators: Sequence[np.random.Generator]) -> Examples:
        """Images or latents float32 [n, C, S, S], labels int64 [n], and a caption of each where there are captions."""
        images = np.empty((len(indices), *self.shape), np.float32)
        labels = np.empty(len(indices), np.int64)
        captions = None if self.text is None else _no_captions(len(indices), self.text)
        for at, (index, generator) in enumerate(zip(indices, generators, strict=True)):
            number = int(np.searchsorted(self._starts, index, "right")) - 1
            shard, row = self._shards[number], int(index - self._starts[number])
            labels[at] = shard.labels[row]
            mirrored = self.info.mirrored and generator.random() < 0.5 and labels[at] not in self.info.not_mirrored
            if captions is not None:
                caption = shard.caption(row, generator)
                captions.embeddings[at, : len(caption)], captions.mask[at, : len(caption)] = caption, True
            images[at] = shard.image(row, mirrored) if shard.pixels else shard.latent(row, mirrored, generator)
        return Examples(images, labels, captions)

    def no_caption(self) -> EncodedCaptions:
        """The empty caption, padded like the others; n = 1."""
        assert self.text is not None and self._empty is not None
        captions = _no_captions(1, self.text)
        captions.embeddings[0, : len(self._empty)], captions.mask[0, : len(self._empty)] = self._empty, True
        return captions


class _Shard:
    """A file of images. Its handle is opened on demand, and anew in a process that the data were sent to."""

    def __init__(self, folder: Path, stored: StoredFile, info: DatasetInfo):
        self._path, self._file = folder / stored.file, None
        self.pixels = info.space is Space.PIXELS
        channels, side, _ = info.shape
        expected: dict[str, tuple[str, list[int]]] = {LABELS: ("I64", [stored.images])}
        if self.pixels:
            expected[IMAGES] = ("U8", [stored.images, channels, side, side])
        else:
            expected[MOMENTS] = ("F16", [stored.images, 2 if info.mirrored else 1, 2 * channels, side, side])
        if info.text is not None:
            expected[CAPTIONS] = ("I64", [stored.images + 1])
        self._require(expected)
        self.labels: np.ndarray = self._whole(LABELS)
        if self.labels.size and not 0 <= self.labels.min() <= self.labels.max() < info.classes:
            raise self._damaged(f"has labels outside of 0..{info.classes - 1}")
        if info.text is not None:
            self._open_captions(info.text)

    def image(self, row: int, mirrored: bool) -> np.ndarray:
        """Pixels float32 [C, S, S]."""
        image = scaled(self._row(IMAGES, row))
        return image[..., ::-1] if mirrored else image

    def latent(self, row: int, mirrored: bool, generator: np.random.Generator) -> np.ndarray:
        """A latent float32 [C, S, S], drawn from the moments."""
        mean, deviation = np.split(self._row(MOMENTS, row)[int(mirrored)].astype(np.float32), 2)
        drawn: np.ndarray = mean + deviation * generator.standard_normal(mean.shape, np.float32)
        return drawn

    def caption(self, row: int, generator: np.random.Generator) -> np.ndarray:
        """One of the image's captions, float16 [tokens, channels]."""
        first, after = int(self._captions[row]), int(self._captions[row + 1])
        number = int(self._numbers[first + generator.integers(after - first)])
        embeddings: np.ndarray = self._slice(EMBEDDINGS)[int(self._tokens[number]) : int(self._tokens[number + 1])]
        return embeddings

    def _open_captions(self, text: TextSpec) -> None:
        self._captions, self._numbers, self._tokens = (self._whole(name) for name in (CAPTIONS, NUMBERS, TOKENS))
        lengths = np.diff(self._tokens)
        if (
            self._captions[0] != 0
            or self._captions[-1] != len(self._numbers)
            or np.diff(self._captions).min(initial=1) < 1
            or self._numbers.min(initial=0) < 0
            or self._numbers.max(initial=-1) >= len(lengths)
            or self._tokens[0] != 0
            or not 1 <= lengths.min(initial=1) <= lengths.max(initial=1) <= text.tokens
        ):
            raise self._damaged("has captions that contradict each other")
        self._require({EMBEDDINGS: ("F16", [int(self._tokens[-1]), text.channels])})

    def _require(self, expected: dict[str, tuple[str, list[int]]]) -> None:
        for name, (dtype, shape) in expected.items():
            tensor = self._slice(name)
            if (tensor.get_dtype(), list(tensor.get_shape())) != (dtype, shape):
                found = f"{tensor.get_dtype()} {list(tensor.get_shape())}"
                raise self._damaged(f"has {name} of {found}; expected {dtype} {shape}")

    def _row(self, name: str, row: int) -> np.ndarray:
        array: np.ndarray = self._slice(name)[row]
        return array

    def _whole(self, name: str) -> np.ndarray:
        tensor = self._slice(name)
        if tensor.get_dtype() != "I64" or len(tensor.get_shape()) != 1:
            raise self._damaged(
                f"has {name} of {tensor.get_dtype()} {tensor.get_shape()}; expected I64 of one dimension"
            )
        return np.array(self._opened().get_tensor(name))

    def _slice(self, name: str) -> Any:
        file = self._opened()
        if name not in file.keys():  # noqa: SIM118  (it is no mapping)
            raise self._damaged(f"has no {name}")
        return file.get_slice(name)

    def _opened(self) -> Any:
        if self._file is None:
            self._file = _open(self._path)
        return self._file

    def _damaged(self, what: str) -> ConfigError:
        return _damaged(self._path, what)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}


def _open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise _damaged(path, f"cannot be read as safetensors ({one_line(error)})") from error


def _damaged(path: Path, what: str) -> ConfigError:
    return ConfigError(f"{path} {what}; remove {path.parent} and run dydit prepare again")


def _empty_caption(folder: Path, text: TextSpec) -> np.ndarray:
    """The embeddings of the empty caption, float16 [tokens, channels]."""
    file = _open(folder / NO_CAPTION)
    if EMBEDDINGS not in file.keys():  # noqa: SIM118  (it is no mapping)
        raise _damaged(folder / NO_CAPTION, f"has no {EMBEDDINGS}")
    array = np.array(file.get_tensor(EMBEDDINGS))
    if array.dtype != np.float16 or array.ndim != 2 or array.shape[1] != text.channels or len(array) > text.tokens:
        raise _damaged(
            folder / NO_CAPTION,
            f"has {EMBEDDINGS} of {array.dtype} {list(array.shape)}; expected float16 [tokens, {text.channels}]",
        )
    return array


def _no_captions(count: int, text: TextSpec) -> EncodedCaptions:
    """Padding alone: zeros float32 [count, L, channels], and a mask that is False."""
    shape = (count, text.tokens, text.channels)
    return EncodedCaptions(np.zeros(shape, np.float32), np.zeros(shape[:2], bool))
