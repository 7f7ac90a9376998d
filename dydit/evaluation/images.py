"""Images to evaluate, read a few at a time: from an `.npz` file or from a folder of PNG files.

An `.npz` file holds `arr_0`, uint8 [N, H, W, 3], which `dydit sample --npz` writes and the ADM evaluator reads. A file
of fifty thousand images of 256x256 pixels has 9.8 GB, so it is never loaded as a whole.
"""

from __future__ import annotations

import math
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from dydit.errors import ConfigError, one_line

ARRAY = "arr_0"
SHEET = "grid.png"
"""The overview that `dydit sample` writes beside its images; it is not one of them."""
_EXPECTED = "expected uint8 [images, height, width, 3]"
_DAMAGED = (OSError, ValueError, EOFError, NotImplementedError, struct.error, zlib.error, zipfile.BadZipFile)


class ImageSet(Protocol):
    """Images of one size."""

    @property
    def path(self) -> Path:
        """Where they are."""
        ...

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[N, H, W, 3]."""
        ...

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """All images in order, uint8 [size, H, W, 3]; the last batch may be smaller. Raises `ConfigError`."""
        ...


@dataclass(frozen=True)
class NpzImages:
    """The array `arr_0` of an `.npz` file."""

    path: Path
    shape: tuple[int, int, int, int]

    @classmethod
    def open(cls, path: Path) -> NpzImages:
        """Read the header. Raises `ConfigError` for a file without uint8 images of three channels."""
        try:
            with zipfile.ZipFile(path) as archive:
                if f"{ARRAY}.npy" not in archive.namelist():
                    names = ", ".join(name.removesuffix(".npy") for name in archive.namelist()) or "no arrays"
                    raise ConfigError(f"{path} contains {names}; expected the images as {ARRAY}")
                with archive.open(f"{ARRAY}.npy") as member:
                    shape, fortran, dtype = _header(member)
                    start = member.tell()
                size = archive.getinfo(f"{ARRAY}.npy").file_size
        except FileNotFoundError as error:
            raise ConfigError(f"{path} does not exist; expected an .npz file or a folder of PNG files") from error
        except _DAMAGED as error:
            raise ConfigError(f"{path} is not an .npz file of images ({one_line(error)})") from error
        problem = _problem(shape, dtype)
        if problem is None and fortran:
            problem = "its axes are in Fortran order"
        if problem:
            raise ConfigError(f"{path}: {ARRAY} is {dtype.name} {list(shape)}, {_EXPECTED}; {problem}")
        if start + math.prod(shape) != size:
            raise ConfigError(f"{path}: {ARRAY} has fewer bytes than its shape {list(shape)}; write it again")
        return cls(path, (shape[0], shape[1], shape[2], 3))

    def batches(self, size: int) -> Iterator[np.ndarray]:
        count, *image = self.shape
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(f"{ARRAY}.npy") as member:
                _header(member)
                for first in range(0, count, size):
                    rows = min(size, count - first)
                    data = member.read(rows * math.prod(image))
                    yield np.frombuffer(data, np.uint8).reshape(rows, *image)
        except _DAMAGED as error:
            raise ConfigError(f"{self.path} is damaged ({one_line(error)}); write it again") from error


def _header(member: object) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(member)  # type: ignore[arg-type]
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(member)  # type: ignore[arg-type]


def _problem(shape: tuple[int, ...], dtype: np.dtype) -> str | None:
    """What is wrong with images of this shape and type, and what to do; None if they can be evaluated."""
    if dtype != np.uint8:
        return "convert them to 8 bits (0..255) first"
    if len(shape) == 4 and shape[3] == 3 and 0 not in shape:
        return None
    if len(shape) == 3 or (len(shape) == 4 and shape[3] == 1):
        return "repeat the grey channel three times"
    if len(shape) == 4 and shape[1] == 3:
        return "move the channels to the end"
    return "these are not RGB images"


@dataclass(frozen=True)
class PngImages:
    """The PNG files of a folder, in the order of their names. Grey ones are read as RGB."""

    path: Path
    files: tuple[Path, ...]
    shape: tuple[int, int, int, int]

    @classmethod
    def open(cls, path: Path) -> PngImages:
        """List the files. Raises `ConfigError` if there is none, or if the first one is not an image."""
        files = tuple(sorted(file for file in path.glob("*.png") if file.name != SHEET))
        if not files:
            raise ConfigError(f"{path} contains no PNG files; expected a folder of images")
        height, width, _ = _read_png(files[0]).shape
        return cls(path, files, (len(files), height, width, 3))

    def batches(self, size: int) -> Iterator[np.ndarray]:
        for first in range(0, len(self.files), size):
            yield np.stack([self._read(file) for file in self.files[first : first + size]])

    def _read(self, file: Path) -> np.ndarray:
        image = _read_png(file)
        if image.shape != self.shape[1:]:
            height, width = self.shape[1:3]
            raise ConfigError(
                f"{file} has {image.shape[1]}x{image.shape[0]} pixels, but {self.files[0].name} has {width}x{height}; "
                "all images must have one size"
            )
        return image


def _read_png(path: Path) -> np.ndarray:
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            mode = picture.mode
            array = np.asarray(picture.convert("RGB") if mode == "L" else picture)
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise ConfigError(f"{path} cannot be read as a PNG image ({one_line(error)})") from error
    if mode not in ("L", "RGB"):
        raise ConfigError(f"{path} has the mode {mode}; expected RGB or grey with 8 bits and without transparency")
    return array


def open_images(path: Path) -> ImageSet:
    """Images in an `.npz` file or a folder of PNG files. Raises `ConfigError` if there are none that fit."""
    return PngImages.open(path) if path.is_dir() else NpzImages.open(path)
