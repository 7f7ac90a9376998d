"""Image files in a folder. Files in sub-folders have these as their classes; files in a flat folder have no class.

Captions stand in `metadata.jsonl` of the folder, as the `imagefolder` of Hugging Face datasets has it (`file_name`, and
a column of text), or in a text file beside each image (`dog.txt` for `dog.jpg`), one in each line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from dydit.data.sources.source import Choices, Record
from dydit.errors import ConfigError, one_line

SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".avif"}
METADATA = "metadata.jsonl"
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt")


class ImageFolder:
    """The image files in a folder and below it, in the order of their paths; a `Source`."""

    size: int | None = None
    channels: int | None = None
    mirrors = True
    not_mirrored: tuple[int, ...] = ()

    def __init__(self, folder: Path, choices: Choices):
        if not folder.is_dir():
            raise ConfigError(f"{folder} is no folder; give one with images, or folders of images, in it")
        self._folder = folder / choices.split if choices.split else folder
        if not self._folder.is_dir():
            raise ConfigError(f"{folder} has no folder {choices.split}; remove --split, or name a folder in it")
        self._names = sorted(image_files(self._folder))
        if not self._names:
            raise ConfigError(f"{self._folder} holds no images ({', '.join(sorted(SUFFIXES))})")
        parents = {name.partition("/")[0] for name in self._names if "/" in name}
        flat = [name for name in self._names if "/" not in name]
        if flat and parents:
            raise ConfigError(
                f"{self._folder} holds images ({flat[0]}) beside folders of images ({min(parents)}), so their classes "
                "are not clear; move them into folders, or give one folder"
            )
        self.class_names = tuple(map(_printable, sorted(parents))) or None
        self.classes = len(parents) or 1
        self._numbers = {name: number for number, name in enumerate(sorted(parents))}
        self._metadata = _metadata(self._folder / METADATA, choices.caption_column)
        self.captioned = self._metadata is not None or self._text_file(self._names[0]).is_file()

    def __len__(self) -> int:
        return len(self._names)

    def record(self, index: int) -> Record:
        """The record of a file."""
        name = self._names[index]
        label = self._numbers.get(name.partition("/")[0], 0)
        return Record(_printable(name), self._folder / name, label, self._captions(name))

    def _captions(self, name: str) -> tuple[str, ...]:
        if self._metadata is not None:
            return self._metadata.get(name, ())
        if not self.captioned:
            return ()
        try:
            text = self._text_file(name).read_text(encoding="utf-8")
        except FileNotFoundError:
            return ()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{self._text_file(name)} cannot be read as text: {one_line(error)}") from error
        return tuple(line.strip() for line in text.splitlines() if line.strip())

    def _text_file(self, name: str) -> Path:
        return (self._folder / name).with_suffix(".txt")


def _printable(name: str) -> str:
    """A name that is valid text, whatever bytes the file system allows in names."""
    return name.encode("utf-8", "backslashreplace").decode()


def image_files(folder: Path) -> Iterator[str]:
    """The paths of image files below a folder, with slashes. What is hidden is left out; links are followed."""
    seen = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link to a folder above it
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES:
                yield (Path(place) / name).relative_to(folder).as_posix()


def _metadata(path: Path, column: str | None) -> dict[str, tuple[str, ...]] | None:
    """Captions by file from `metadata.jsonl`; None where there is no such file, or it has no captions."""
    if not path.is_file():
        return None
    captions: dict[str, tuple[str, ...]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            name = values["file_name"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}, line {number}, is no JSON object with a file_name") from error
        column = column or next((each for each in CAPTION_COLUMNS if each in values), None)
        if column is None:
            return None
        captions[str(name)] = _texts(values.get(column), f"{path}, line {number}, {column}")
    return captions


def _texts(value: object, where: str) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(texts, list) or not all(isinstance(each, str) for each in texts):
        raise ConfigError(f"{where}, is no text and no list of texts")
    return tuple(texts)
