"""Opens a source: its kind is stated, or recognised from what lies at its path."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path

from dydit.data.sources import arrays
from dydit.data.sources.coco import CocoCaptions, annotation_files
from dydit.data.sources.hugging_face import HuggingFaceData, is_data_folder
from dydit.data.sources.image_folder import ImageFolder
from dydit.data.sources.source import Choices, Source
from dydit.errors import ConfigError
from dydit.files import user_path

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SMALL = {"digits": arrays.digits, "emoji": arrays.emoji}


class SourceKind(StrEnum):
    """Kinds of sources."""

    BUILT_IN = "built-in"
    FOLDER = "folder"
    HUGGING_FACE = "huggingface"
    CIFAR10 = "cifar10"
    COCO = "coco"
    NPZ = "npz"


def open_source(name: str, kind: SourceKind | None, choices: Choices) -> Source:
    """The source of a name or path. Raises `ConfigError` if it cannot be read as its kind, stated or recognised."""
    kind = kind or kind_of(name)
    path = user_path(name)
    if kind is SourceKind.HUGGING_FACE:
        return HuggingFaceData(name, choices)
    if kind is SourceKind.COCO:
        return CocoCaptions(path, choices)
    if kind is SourceKind.FOLDER:
        return ImageFolder(path, choices)
    if kind is SourceKind.CIFAR10:
        return arrays.cifar10(path, choices.split)
    if choices.split is not None:
        raise ConfigError(f"{name} has no splits; remove --split")
    if kind is SourceKind.NPZ:
        return arrays.npz(path)
    if name not in _SMALL:
        raise ConfigError(f"unknown built-in data {name!r}; known: {', '.join(_SMALL)}")
    return _SMALL[name]()


def kind_of(name: str) -> SourceKind:
    """The kind of a source, from its name and what lies there. Raises `ConfigError` if nothing is there."""
    path = user_path(name)
    if name in _SMALL:
        return SourceKind.BUILT_IN
    if path.is_file() and path.suffix == ".npz":
        return SourceKind.NPZ
    if path.is_dir():
        return _kind_of_folder(path)
    if path.exists():
        raise ConfigError(f"{name} is a file; give a folder of images, an .npz file, or a data set of Hugging Face")
    if _HUB_NAME.fullmatch(name) and not Path(name.partition("/")[0]).is_dir():
        return SourceKind.HUGGING_FACE
    raise ConfigError(
        f"{name}: no such file or folder (built-in data are {' and '.join(_SMALL)}; a data set of the Hugging Face hub "
        "is named OWNER/NAME, or anything with --kind huggingface)"
    )


def _kind_of_folder(path: Path) -> SourceKind:
    if is_data_folder(path):
        return SourceKind.HUGGING_FACE
    first = arrays.CIFAR_FILES["train"][0]
    if any((place / first).is_file() for place in (path, path / arrays.CIFAR_BINARY)):
        return SourceKind.CIFAR10
    if any((place / first.removesuffix(".bin")).is_file() for place in (path, path / arrays.CIFAR_PYTHON)):
        raise ConfigError(
            f"{path} holds the Python version of CIFAR-10, which is pickled and could run code; give the binary "
            f"version ({arrays.CIFAR_BINARY})"
        )
    if annotation_files(path):
        return SourceKind.COCO
    return SourceKind.FOLDER
