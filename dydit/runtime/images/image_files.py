"""Image files: 8-bit images, a grid, and the `.npz` file that evaluators read.

Samples are pixels here; `dydit.runtime.images.pixels` decodes latents.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dydit.errors import ConfigError, OutputError, one_line
from dydit.files import atomic_file, new_file, write_atomic
from dydit.runtime.noise_source import read_arrays

GRID_IMAGES = 100
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"  # with the checksum of the last chunk, which Pillow does not verify


def to_uint8(samples: np.ndarray) -> np.ndarray:
    """Samples f32 [B, C, S, S] in [-1, 1] to uint8 [B, S, S, C], rounded to nearest; values outside are clipped."""
    levels = np.clip(samples * 127.5 + 128.0, 0, 255).astype(np.uint8)
    return np.ascontiguousarray(levels.transpose(0, 2, 3, 1))


def to_pil(image: np.ndarray) -> Image.Image:
    """A uint8 [S, S, 1 or 3] array as a picture."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def write_png(path: Path, image: np.ndarray) -> None:
    """Write a uint8 [H, W, 1 or 3] array as PNG, atomically."""
    data = io.BytesIO()
    to_pil(image).save(data, format="PNG")
    write_atomic(path, data.getvalue())


def is_picture(path: Path, side: int, channels: int) -> bool:
    """Whether a file exists and is an undamaged PNG, by its checksums.

    Raises `OutputError` if it is an undamaged PNG of another size: it is not of this run and must not be replaced.
    """
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data), formats=("PNG",)) as picture:
            fits = picture.size == (side, side) and picture.mode == ("L" if channels == 1 else "RGB")
            picture.verify()
    except (OSError, SyntaxError, ValueError, EOFError, struct.error):  # what Pillow raises for damaged files
        return False
    if not data.endswith(_PNG_END):
        return False
    if not fits:
        raise OutputError(f"{path} is not a picture of this run; remove it and run again")
    return True


def read_png(path: Path, side: int, channels: int) -> np.ndarray:
    """Read what `write_png` wrote, uint8 [side, side, channels]. Raises `OutputError` if it is something else."""
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            array = np.asarray(picture)
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for damaged files
        raise OutputError(f"{path} cannot be read ({one_line(error)}); remove it and run again") from error
    image = array[..., None] if array.ndim == 2 else array
    if image.shape != (side, side, channels) or image.dtype != np.uint8:
        raise OutputError(f"{path} is not a picture of this run; remove it and run again")
    return image


def make_grid(images: Sequence[np.ndarray]) -> np.ndarray:
    """Images [S, S, C] in reading order on a nearly square white sheet, two pixels apart."""
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    side, channels = images[0].shape[0], images[0].shape[-1]
    gap = 2
    pitch = side + gap
    sheet = np.full((rows * pitch - gap, columns * pitch - gap, channels), 255, np.uint8)
    for index, image in enumerate(images):
        top, left = (index // columns) * pitch, (index % columns) * pitch
        sheet[top : top + side, left : left + side] = image
    return sheet


def to_rgb(images: np.ndarray) -> np.ndarray:
    """Images [B, S, S, 1 or 3] as three channels, which evaluators expect."""
    return np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images


@dataclass(frozen=True)
class Streamed:
    """An array that is written in pieces along its first axis."""

    dtype: str
    shape: tuple[int, ...]
    pieces: Iterable[np.ndarray]


def write_npz(path: Path, arrays: dict[str, Streamed], replace: bool = True) -> None:
    """Write an uncompressed `.npz`, piece by piece and atomically; the same arrays give the same bytes.

    Without `replace`, an existing file is kept, and `OutputError` is raised if its bytes differ.
    """
    opened = atomic_file(path) if replace else new_file(path, same_is_fine=True)
    with opened as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            # A ZipInfo made from a name alone is dated 1980, so the bytes do not depend on the clock.
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                header = {"descr": np.dtype(array.dtype).str, "fortran_order": False, "shape": array.shape}
                np.lib.format.write_array_header_1_0(member, header)
                rows = 0
                for piece in array.pieces:
                    member.write(np.ascontiguousarray(piece, array.dtype).tobytes())
                    rows += len(piece)
                assert rows == array.shape[0]


def kept_arrays(path: Path, *names: str) -> list[np.ndarray] | None:
    """Arrays of an `.npz` file; None if it is missing, or damaged by its checksums."""
    try:
        return list(read_arrays(path, names, "array").values())
    except ConfigError:
        return None


def read_npz(path: Path, name: str, counts: Sequence[int]) -> Iterator[np.ndarray]:
    """Read an array that `write_npz` wrote, in pieces with `counts` rows."""
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as member:
        np.lib.format.read_magic(member)
        shape, _, dtype = np.lib.format.read_array_header_1_0(member)
        for count in counts:
            rows = member.read(count * math.prod(shape[1:]) * dtype.itemsize)
            yield np.frombuffer(rows, dtype).reshape(count, *shape[1:])
