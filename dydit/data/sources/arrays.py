"""Sources whose images are arrays of one size: the sets that ship with dydit, `.npz` files, CIFAR-10's binary files."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dydit.data.small_sets import Digits, Emoji
from dydit.data.sources.source import Record
from dydit.errors import ConfigError, one_line

CIFAR_BINARY, CIFAR_PYTHON = "cifar-10-batches-bin", "cifar-10-batches-py"
CIFAR_FILES = {"train": tuple(f"data_batch_{number}.bin" for number in range(1, 6)), "test": ("test_batch.bin",)}
_CIFAR_ROW = 1 + 3 * 32 * 32


class ArraySource:
    """Images uint8 [n, H, W] or [n, H, W, C] with labels [n]; a `Source`."""

    def __init__(
        self,
        name: str,
        images: np.ndarray,
        labels: np.ndarray,
        class_names: tuple[str, ...] | None = None,
        captions: Sequence[str] = (),
        mirrors: bool = True,
        not_mirrored: tuple[int, ...] = (),
    ):
        self._name, self._images, self._labels, self._captions = name, images, labels, captions
        self.classes = len(class_names) if class_names else int(labels.max(initial=0)) + 1
        self.class_names = class_names
        height, width = images.shape[1:3]
        self.size = height if height == width else None
        self.channels: int | None = 1 if images.ndim == 3 or images.shape[3] == 1 else 3
        self.mirrors, self.not_mirrored, self.captioned = mirrors, not_mirrored, bool(captions)

    def __len__(self) -> int:
        return len(self._images)

    def record(self, index: int) -> Record:
        """A record with a copy of the pixels."""
        image = np.array(self._images[index])
        image = image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image
        captions = (self._captions[index],) if self._captions else ()
        return Record(f"{self._name} {index}", image, int(self._labels[index]), captions)


def digits() -> ArraySource:
    """The handwritten digits, which are not mirrored."""
    data = Digits()
    images = np.round((data.images[:, 0] + 1) * 127.5).astype(np.uint8)
    return ArraySource("digits", images, data.labels, tuple(map(str, range(10))), mirrors=False)


def emoji() -> ArraySource:
    """The emoji, with their names as captions. Flags and symbols are not mirrored."""
    data = Emoji()
    not_mirrored = tuple(map(int, np.unique(data.labels[~data.mirrored])))
    return ArraySource(
        "emoji",
        data.images.transpose(0, 2, 3, 1),
        data.labels,
        data.class_names,
        data.captions,
        not_mirrored=not_mirrored,
    )


def npz(path: Path) -> ArraySource:
    """An `.npz` file: `arr_0` uint8 [n, H, W, C], and labels in `arr_1` if it is there, as ADM samples are stored."""
    try:
        with zipfile.ZipFile(path) as archive:
            images = _member(path, archive, "arr_0.npy")
            labels = _member(path, archive, "arr_1.npy")
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path} cannot be read as .npz ({one_line(error)}); give a file of numpy.savez") from error
    if images is None or images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        found = "nothing" if images is None else f"{images.dtype} {list(images.shape)}"
        raise ConfigError(f"{path} has {found} as arr_0; expected images uint8 [n, H, W, 1 or 3]")
    if labels is None:
        return ArraySource(path.name, images, np.zeros(len(images), np.int64))
    if labels.dtype.kind not in "iu" or labels.shape != (len(images),) or labels.min(initial=0) < 0:
        raise ConfigError(
            f"{path} has {labels.dtype} {list(labels.shape)} as arr_1; expected labels from 0, whole numbers "
            f"[{len(images)}]"
        )
    return ArraySource(path.name, images, labels)


def _member(path: Path, archive: zipfile.ZipFile, name: str) -> Any:
    """An array of an `.npz` file, mapped into memory where it is stored without compression; None if it is absent."""
    if name not in archive.namelist():
        return None
    item = archive.getinfo(name)
    with archive.open(item) as member:
        if item.compress_type != zipfile.ZIP_STORED:
            return np.lib.format.read_array(member, allow_pickle=False)
        version = np.lib.format.read_magic(member)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read_header(member)
        header = member.tell()
    if dtype.hasobject:
        raise ValueError(f"{name} holds Python objects")
    with open(path, "rb") as file:
        file.seek(item.header_offset + 26)  # lengths of the name and of the extra field, which the data follow
        lengths = file.read(4)
    start = item.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
    if not all(shape):
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, "r", start + header, shape, "F" if fortran else "C")


def cifar10(folder: Path, split: str | None) -> ArraySource:
    """CIFAR-10 in its binary version: 10,000 rows of a label and 3x32x32 bytes in each file. `split`: train or test."""
    split = split or "train"
    if split not in CIFAR_FILES:
        raise ConfigError(f"CIFAR-10 has no split {split!r}; give --split train or --split test")
    inside = folder / CIFAR_BINARY if (folder / CIFAR_BINARY).is_dir() else folder
    rows = []
    for name in CIFAR_FILES[split]:
        path = inside / name
        if not path.is_file():
            raise ConfigError(f"{path} is missing; unpack the binary version of CIFAR-10 ({CIFAR_BINARY}) there")
        if path.stat().st_size % _CIFAR_ROW or not path.stat().st_size:
            raise ConfigError(f"{path} is damaged: its size is no multiple of {_CIFAR_ROW} bytes; download it again")
        rows.append(np.fromfile(path, np.uint8).reshape(-1, _CIFAR_ROW))
    table = np.concatenate(rows)
    names = _names(inside / "batches.meta.txt")
    labels = table[:, 0].astype(np.int64)
    if labels.max() >= 10:
        raise ConfigError(f"{inside} has label {labels.max()}; expected CIFAR-10's 0..9")
    images = table[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return ArraySource(f"CIFAR-10 {split}", images, labels, names if len(names) == 10 else tuple(map(str, range(10))))


def _names(path: Path) -> tuple[str, ...]:
    return tuple(path.read_text(encoding="utf-8").split()) if path.is_file() else ()
