"""Opening a bundle, the folder that any backend runs. This module needs neither PyTorch nor ONNX."""

from __future__ import annotations

import dataclasses
import errno
import shlex
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from dydit.bundle.manifest import MANIFEST, FileEntry, Manifest, parse_manifest
from dydit.bundle.stored_weights import WEIGHTS
from dydit.bundle.texts import Texts
from dydit.dtypes import DTYPES
from dydit.errors import BackendError, BundleError, one_line
from dydit.files import sha256_of, user_path

_NO_MAPS = {errno.ENODEV, errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EACCES, errno.EPERM}

Stamp = tuple[int, int, int] | None


@dataclass(frozen=True)
class Bundle:
    """A verified bundle: its folder and its manifest.

    Files are read when they are needed, perhaps long after they were verified. `stamps` tell whether a file was
    replaced since then: inode, size and modification time of each file, as `open` read them. They are empty if the
    bundle was not made by `open`. `texts`: of the run, for a model that texts condition; see `with_texts`.
    """

    path: Path
    manifest: Manifest
    stamps: dict[str, Stamp] = field(default_factory=dict, compare=False, repr=False)
    texts: Texts | None = field(default=None, compare=False, repr=False)

    @classmethod
    def open(cls, path: Path | str, verify: bool = True) -> Bundle:
        """Read the manifest and check the size of every listed file and, with `verify`, its SHA-256.

        Files may be links, as in the cache of a hub: only their content is checked. Raises `BundleError`, in one line,
        for a file that is missing, truncated or changed, and for a file name that leads out of the folder.
        """
        folder = user_path(path)
        if not folder.exists():
            command = shlex.join(["dydit", "export", "CHECKPOINT", "--out", str(folder)])
            raise BundleError(f"{folder} does not exist; export a bundle with `{command}`")
        manifest = parse_manifest(folder / MANIFEST)
        stamps: dict[str, Stamp] = {}
        for name, entry in manifest.files.items():
            try:
                stamps[name] = _stamp(folder / name)
                _check_file(folder, name, entry, verify)
            except (OSError, RuntimeError) as error:  # unreadable, a name too long, links in a circle
                raise BundleError(f"{folder}: {name} cannot be read: {one_line(error)}") from error
        bundle = cls(folder, manifest, stamps)
        bundle._check_weights()
        return bundle

    def with_texts(self, texts: Texts) -> Bundle:
        """The bundle for a run with these texts. Labels are their numbers."""
        model = self.manifest.model.with_texts(texts.count, texts.negative)
        return dataclasses.replace(self, manifest=self.manifest.model_copy(update={"model": model}), texts=texts)

    def _check_weights(self) -> None:
        size = self.manifest.files[WEIGHTS].bytes
        for name, entry in self.manifest.weights.items():
            if entry.offset + entry.nbytes > size:
                raise BundleError(f"{self.path}: weight {name} lies outside {WEIGHTS}; export the bundle again")

    def file(self, name: str) -> Path:
        """The path of a listed file. Raises `BundleError` if the file was replaced after the bundle was opened."""
        if name not in self.manifest.files:
            raise BundleError(f"{self.path}: the manifest lists no file {name!r}")
        file = self.path / name
        if name in self.stamps and (stamp := _stamp(file)) != self.stamps[name]:
            # The file may only have been touched or copied back, so its content decides.
            if stamp is None or sha256_of(file) != self.manifest.files[name].sha256:
                raise BundleError(
                    f"{self.path}: {name} was changed or removed after the bundle was opened; open the bundle again"
                )
            self.stamps[name] = stamp
        return file

    @cached_property
    def masks(self) -> np.ndarray:
        """Step masks by slot, bool [S, U]."""
        return self.manifest.step_masks()

    def step_gates(self, step: int) -> np.ndarray:
        """The `gates` input of a step, f32 [U]."""
        return self.masks[step].astype(np.float32)

    def weight(self, name: str) -> np.ndarray:
        """A stored tensor, memory-mapped read-only, of the type `Dtype.storage`.

        The architecture describes names and layouts, for example `dydit.models.dit.layout`.
        """
        entry = self.manifest.weights[name]
        raw = self.mapped_weights()[entry.offset : entry.offset + entry.nbytes]
        return raw.view(DTYPES[entry.dtype].storage).reshape(entry.shape)

    def mapped_weights(self, mode: Literal["r", "c"] = "r") -> np.ndarray:
        """`weights.bin` as uint8, mapped by `mapped_file`."""
        return mapped_file(self.file(WEIGHTS), mode)


def _stamp(file: Path) -> Stamp:
    try:
        status = file.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def mapped_file(path: Path, mode: Literal["r", "c"] = "r") -> np.ndarray:
    """A file as uint8, memory-mapped. Mode `r` is read-only; with `c`, changes stay in this process.

    The file is read if the file system does not support mapping. Raises `BackendError` if there is too little memory.
    """
    size = 0
    try:
        size = path.stat().st_size
        if size == 0:
            return np.zeros(0, np.uint8)
        try:
            return np.memmap(path, np.uint8, mode)
        except OSError as error:
            if error.errno not in _NO_MAPS:
                raise
        raw = np.fromfile(path, np.uint8)
        raw.flags.writeable = mode == "c"
        return raw
    except (OSError, MemoryError) as error:
        if isinstance(error, OSError) and error.errno != errno.ENOMEM:
            raise
        raise BackendError(
            f"not enough memory or address space (see `ulimit -v`) for the {size} bytes of {path}; free some memory, "
            "or use a bundle of a lower precision"
        ) from error


def _check_file(folder: Path, name: str, entry: FileEntry, verify: bool) -> None:
    file = folder / name
    if not file.is_file():
        raise BundleError(f"{folder}: {name} is missing; export the bundle again")
    if file.stat().st_size != entry.bytes:
        raise BundleError(
            f"{folder}: {name} has {file.stat().st_size} bytes, but the manifest says {entry.bytes} "
            "(truncated or replaced); export the bundle again"
        )
    if verify and sha256_of(file) != entry.sha256:
        raise BundleError(f"{folder}: {name} was changed (its SHA-256 differs); export the bundle again")
