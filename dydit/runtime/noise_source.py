"""The noise of a run: drawn for each image (`dydit.diffusion.noise`), or read from a file.

A noise file is an `.npz` of `x_T` [B, C, S, S] (the starting latents), `noise` [steps, B, C, S, S] in execution order,
both floating point and finite, and integers `labels` [B]. With it, the run of another program can be repeated exactly.
`noise` is read only if the sampler adds noise.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from dydit.bundle.manifest import Manifest
from dydit.diffusion.noise import INITIAL_DRAW, image_noise, step_draw
from dydit.errors import ConfigError, one_line
from dydit.files import sha256_of
from dydit.runtime.request import Batch
from dydit.words import counted

_DAMAGED = (
    ValueError,
    EOFError,
    NotImplementedError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
    pickle.UnpicklingError,
)


class NoiseSource(Protocol):
    """Noise of the images of a batch, f32 [B, C, S, S]."""

    def initial(self, batch: Batch) -> np.ndarray:
        """The starting latents x_T."""

    def step(self, batch: Batch, step: int) -> np.ndarray:
        """The noise that execution step `step` adds."""


@dataclass(frozen=True)
class SeededNoise:
    """Noise as a function of (seed, image, draw); `shape` is that of one image's latents."""

    seed: int
    shape: tuple[int, ...]

    def initial(self, batch: Batch) -> np.ndarray:
        return image_noise(self.seed, batch.images, INITIAL_DRAW, self.shape)

    def step(self, batch: Batch, step: int) -> np.ndarray:
        return image_noise(self.seed, batch.images, step_draw(step), self.shape)


@dataclass(frozen=True)
class NoiseFile:
    """The content of a noise file, checked against a bundle. Images are found by their position in the run."""

    path: Path
    sha256: str
    x_T: np.ndarray
    noise: np.ndarray | None
    labels: tuple[int, ...]

    @classmethod
    def read(cls, path: Path, manifest: Manifest) -> NoiseFile:
        """Read a file and check it against a bundle. Raises `ConfigError` if anything does not fit."""
        model, sampling, steps = manifest.model, manifest.sampling, manifest.sampling.steps
        arrays = read_arrays(path, ("x_T", "labels"), "noise", ("noise",) if sampling.noisy_steps else ())
        if sampling.noisy_steps and "noise" not in arrays:
            raise ConfigError(
                f"{path} has no array 'noise', which {sampling.sampler} needs: it adds noise in "
                f"{len(sampling.noisy_steps)} of {counted(steps, 'step')}; expected float [steps, B, C, S, S]"
            )
        image = (model.in_channels, model.input_size, model.input_size)
        count = len(arrays["x_T"]) if arrays["x_T"].ndim else 0
        expected = {"x_T": (count, *image), "noise": (steps, count, *image), "labels": (count,)}
        for name in arrays:
            shape, array, wanted = expected[name], arrays[name], np.integer if name == "labels" else np.floating
            if not np.issubdtype(array.dtype, wanted):
                kind = "integers" if name == "labels" else "floating point"
                raise ConfigError(f"{path}: {name} is {array.dtype.name}, expected {kind}")
            if array.shape != shape or not count:
                what = ", ".join(map(str, shape)) if count else f"images, {', '.join(map(str, image))}"
                raise ConfigError(f"{path}: {name} has shape {array.shape}, expected ({what}) for this bundle")
            if not np.isfinite(array).all():
                raise ConfigError(f"{path}: {name} holds NaN or infinite values")
        floats = {name: _float32(path, name, array) for name, array in arrays.items() if name != "labels"}
        return cls(path, sha256_of(path), floats["x_T"], floats.get("noise"), tuple(arrays["labels"].tolist()))

    def initial(self, batch: Batch) -> np.ndarray:
        return self.x_T[batch.places]

    def step(self, batch: Batch, step: int) -> np.ndarray:
        assert self.noise is not None, "of a sampler that adds none"
        return self.noise[step, batch.places]


def read_arrays(path: Path, needed: Sequence[str], what: str, optional: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Arrays of an `.npz` file, by name. `what`: what they describe, for messages. Raises `ConfigError`."""
    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise ConfigError(f"{path} is a single array, expected an .npz file with {', '.join(needed)}")
        with loaded as file:
            if missing := [name for name in needed if name not in file]:
                raise ConfigError(f"{path} has no array {missing[0]!r}; expected {', '.join(needed)}")
            arrays = {name: file[name] for name in (*needed, *optional) if name in file}
    except OSError as error:
        raise ConfigError(f"cannot read {what} from {path}: {error.strerror or one_line(error)}") from error
    except _DAMAGED as error:
        raise ConfigError(f"{path} is not a {what} file: {one_line(error)}") from error
    # NumPy returns a member that does not start like an array as bytes.
    if strange := [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]:
        raise ConfigError(f"{path} is not a {what} file: {strange[0]} is not an array")
    return arrays


def _float32(path: Path, name: str, array: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        single = array.astype(np.float32)
    if not np.isfinite(single).all():
        raise ConfigError(f"{path}: {name} holds values outside the range of float32")
    return single
