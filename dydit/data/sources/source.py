"""What a source of images is: records that are listed at once, and opened one by one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Record:
    """An image before it is decoded. It goes to another process for that.

    `name`: for messages, and the same in every run. `image`: a file, the bytes of one, or pixels uint8 [H, W] or
    [H, W, C]. `label`: 0 in a source without classes. `captions`: none where the source has none.
    """

    name: str
    image: Path | bytes | np.ndarray
    label: int = 0
    captions: tuple[str, ...] = ()


class Source(Protocol):
    """Images in an order that is the same in every run.

    `size` and `channels`: those of the images, where all are squares of one size; else None. `mirrors`: whether a
    mirrored image is still one of its class, but for the classes `not_mirrored`.
    """

    classes: int
    class_names: tuple[str, ...] | None
    size: int | None
    channels: int | None
    mirrors: bool
    not_mirrored: tuple[int, ...]
    captioned: bool

    def __len__(self) -> int:
        """Number of records."""
        ...

    def record(self, index: int) -> Record:
        """A record; its image is not decoded."""
        ...


@dataclass(frozen=True)
class Choices:
    """What a user says about a source, where it cannot be seen: which part of it, and which columns."""

    split: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    caption_column: str | None = None
