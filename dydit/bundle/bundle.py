"""Opening a bundle: the folder that any backend runs (DESIGN, section 2). Needs neither PyTorch nor ONNX."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from dydit.bundle.manifest import MANIFEST, FileEntry, Manifest, parse_manifest
from dydit.bundle.stored import STORAGE, WEIGHTS
from dydit.errors import BundleError, one_line
from dydit.files import sha256_of


@dataclass(frozen=True)
class Bundle:
    """A verified bundle: its folder and its manifest."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path | str, verify: bool = True) -> Bundle:
        """Read the manifest and hold every listed file against its size and, with `verify`, its SHA-256.

        Raises `BundleError`, in one line, for whatever is missing, truncated, changed or outside the folder.
        """
        folder = Path(path)
        if not folder.exists():
            raise BundleError(f"{folder} does not exist; make a bundle with `dydit export CHECKPOINT --out {folder}`")
        manifest = parse_manifest(folder / MANIFEST)
        for name, entry in manifest.files.items():
            try:
                _check_file(folder, name, entry, verify)
            except (OSError, RuntimeError) as error:  # unreadable, a name too long, symlinks in a circle
                raise BundleError(f"{folder}: {name} cannot be read: {one_line(error)}") from error
        bundle = cls(folder, manifest)
        bundle._check_weights()
        return bundle

    def _check_weights(self) -> None:
        size = self.manifest.files[WEIGHTS].bytes
        for name, entry in self.manifest.weights.items():
            if entry.offset + entry.nbytes > size:
                raise BundleError(f"{self.path}: weight {name} lies outside {WEIGHTS}; export the bundle again")

    def file(self, name: str) -> Path:
        """The path of a listed file."""
        if name not in self.manifest.files:
            raise BundleError(f"{self.path}: the manifest lists no file {name!r}")
        return self.path / name

    @cached_property
    def masks(self) -> np.ndarray:
        """Step masks by slot, bool [S, U]."""
        return self.manifest.step_masks()

    def step_gates(self, step: int) -> np.ndarray:
        """The `gates` input of a step, f32 [U]."""
        return self.masks[step].astype(np.float32)

    def weight(self, name: str) -> np.ndarray:
        """A stored tensor, memory-mapped read-only, of the type that `STORAGE` gives; see `dydit.models.dit.layout`."""
        entry = self.manifest.weights[name]
        return np.memmap(self.path / WEIGHTS, STORAGE[entry.dtype], "r", entry.offset, entry.shape)


def _check_file(folder: Path, name: str, entry: FileEntry, verify: bool) -> None:
    file = folder / name
    if not file.resolve().is_relative_to(folder.resolve()):
        raise BundleError(f"{folder}: path {name!r} leaves the bundle; do not use it")
    if not file.is_file():
        raise BundleError(f"{folder}: {name} is missing; export the bundle again")
    if file.stat().st_size != entry.bytes:
        raise BundleError(
            f"{folder}: {name} has {file.stat().st_size} bytes, the manifest says {entry.bytes} "
            "(truncated or replaced); export the bundle again"
        )
    if verify and sha256_of(file) != entry.sha256:
        raise BundleError(f"{folder}: {name} was changed (its SHA-256 differs); export the bundle again")
