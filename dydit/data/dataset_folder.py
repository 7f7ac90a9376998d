"""The folder that `dydit prepare` writes: what is in it, and how it is checked.

    dataset.json             `DatasetInfo`: shape, classes, captions, and every shard with its SHA-256
    shard-00000.safetensors  a part of the images, in order:
        images      uint8 [n, C, S, S]              of pixels, or
        moments     float16 [n, F, 2C, S, S]        of latents: mean, then standard deviation, both scaled and shifted
                                                    as the autoencoder's configuration says; F is 2 if the mirrored
                                                    image has latents of its own (the second), else 1
        labels      int64 [n]
        captions    int64 [n + 1]                   image i has the captions numbers[captions[i] : captions[i + 1]]
        numbers     int64 [k]                       of captions: images may share one, which is stored once in a shard
        tokens      int64 [m + 1]                   tokens of caption j are tokens[j] .. tokens[j + 1] - 1
        embeddings  float16 [tokens, channels]      the language model's output, without padding
    prepare.json             the settings of `dydit prepare`, and the shards that it has finished; no data are in it
    no_caption.safetensors   embeddings float16 [tokens, channels]: those of the empty caption

`captions`, `numbers`, `tokens`, `embeddings` and `no_caption.safetensors` are there where texts condition the model.
`dataset.json` is written last, so a folder without it is unfinished.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from dydit.errors import ConfigError, one_line
from dydit.files import sha256_of
from dydit.models.config import Space, TextSpec, parse_config
from dydit.validation import Strict

FORMAT: Literal[1] = 1
INFO, NO_CAPTION = "dataset.json", "no_caption.safetensors"
IMAGES, MOMENTS, LABELS = "images", "moments", "labels"
CAPTIONS, NUMBERS, TOKENS, EMBEDDINGS = "captions", "numbers", "tokens", "embeddings"
_SHA256 = re.compile(r"[0-9a-f]{64}")


class StoredFile(Strict):
    """A file of the folder: its size, its hash, and the number of images in it (0 for `no_caption.safetensors`)."""

    file: str
    images: int = Field(ge=0)
    bytes: int = Field(gt=0)
    sha256: str

    @field_validator("file")
    @classmethod
    def _in_the_folder(cls, name: str) -> str:
        if name != Path(name).name or not name.endswith(".safetensors"):
            raise ValueError(f"{name!r} is not the name of a safetensors file in the folder")
        return name

    @field_validator("sha256")
    @classmethod
    def _is_a_hash(cls, value: str) -> str:
        if not _SHA256.fullmatch(value):
            raise ValueError("sha256 is not 64 hexadecimal digits")
        return value


class Captions(Strict):
    """How captions were encoded: the language model as it was named, tokens of the longest caption, and channels."""

    encoder: str
    tokens: int = Field(gt=0)
    channels: int = Field(gt=0)
    no_caption: StoredFile


class DatasetInfo(Strict):
    """What `dataset.json` says.

    `shape`: (C, S, S) of an image or latent. `mirrored`: whether half of the images are mirrored when they are read,
    but for those of the classes `not_mirrored`. `autoencoder`: the one that made the latents, as it was named; None for
    pixels. `source`: where the images came from. `skipped`: images that could not be read, with the reason.
    """

    format: Literal[1] = FORMAT
    space: Space
    shape: tuple[int, int, int]
    classes: int = Field(gt=0)
    class_names: tuple[str, ...] | None = None
    mirrored: bool
    not_mirrored: tuple[int, ...] = ()
    autoencoder: str | None = None
    captions: Captions | None = None
    source: str
    shards: tuple[StoredFile, ...] = Field(min_length=1)
    skipped: tuple[tuple[str, str], ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        channels, height, width = self.shape
        if channels < 1 or height < 1 or height != width:
            raise ValueError(f"shape {list(self.shape)} is not [channels, side, side]")
        if (self.space is Space.LATENTS) != (self.autoencoder is not None):
            raise ValueError("latents name their autoencoder, and pixels have none")
        if self.class_names is not None and len(self.class_names) != self.classes:
            raise ValueError(f"class_names has {len(self.class_names)} names for {self.classes} classes")
        return self

    @property
    def images(self) -> int:
        """Number of images."""
        return sum(shard.images for shard in self.shards)

    @property
    def text(self) -> TextSpec | None:
        """The texts that condition a model of these data."""
        return None if self.captions is None else TextSpec(self.captions.tokens, self.captions.channels)

    @property
    def files(self) -> tuple[StoredFile, ...]:
        """All files besides `dataset.json`."""
        return self.shards if self.captions is None else (*self.shards, self.captions.no_caption)


def is_dataset_folder(path: Path) -> bool:
    """Whether `dydit prepare` has finished a folder there."""
    return (path / INFO).is_file()


def read_info(folder: Path) -> DatasetInfo:
    """`dataset.json` of a folder. Raises `ConfigError` if it is absent or damaged."""
    if not is_dataset_folder(folder):
        raise ConfigError(f"{folder} holds no prepared data ({INFO} is missing); make it with dydit prepare")
    try:
        values = json.loads((folder / INFO).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{folder / INFO} cannot be read ({one_line(error)}); run dydit prepare again") from error
    return parse_config(DatasetInfo, values, str(folder / INFO))


def check_sizes(folder: Path, info: DatasetInfo) -> None:
    """Check that every file is there, and as large as it was. Raises `ConfigError`, which names the first that is not.

    This is what opening the data can afford; `check_files` reads everything.
    """
    for stored in info.files:
        path = folder / stored.file
        if not path.is_file():
            raise ConfigError(f"{path} is missing; {_again(folder)}")
        if (size := path.stat().st_size) != stored.bytes:
            raise ConfigError(f"{path} has {size:,} bytes; expected {stored.bytes:,}: it was changed; {_again(folder)}")


def check_files(
    folder: Path, info: DatasetInfo, progress: Callable[[int, int], None] = lambda done, total: None
) -> None:
    """Compare the SHA-256 of every file. Raises `ConfigError`, which names the first one that differs."""
    check_sizes(folder, info)
    for number, stored in enumerate(info.files):
        progress(number, len(info.files))
        if sha256_of(folder / stored.file) != stored.sha256:
            raise ConfigError(f"{folder / stored.file} was changed: its SHA-256 differs; {_again(folder)}")
    progress(len(info.files), len(info.files))


def _again(folder: Path) -> str:
    return f"remove {folder} and run dydit prepare again"
