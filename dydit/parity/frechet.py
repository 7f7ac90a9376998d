"""The Fréchet distance of small sets of images to reference images, on features that need no network.

Features are an image's coordinates on the first principal components of the reference, and distances are those of the
normals fitted to both (`dydit.training.evaluate`). They tell whether a set moved away from the reference more than
another set did; they are no FID, and say nothing across references.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from dydit.errors import ConfigError, one_line
from dydit.files import sha256_of
from dydit.models.config import ModelConfig
from dydit.training.evaluate import frechet_distance

COMPONENTS = 16
LEAST_IMAGES = 4 * COMPONENTS
"""Images of a set, so that its covariance of the components means something."""
_NAMES = ("images", "latents")


@dataclass(frozen=True, eq=False)
class FrechetReference:
    """Reference images as their mean [F], components [F, K] and features [n, K]; and the SHA-256 of their file."""

    sha256: str
    mean: np.ndarray
    components: np.ndarray
    features: np.ndarray

    @classmethod
    def read(cls, path: Path, config: ModelConfig) -> Self:
        """Read an `.npz` with `images`, or `latents` as `dydit sample --latents-out` writes them: floats [n, C, S, S]
        of the model's shape, pixels in [-1, 1]. Raises `ConfigError`, in one line, for whatever does not fit.
        """
        images = _read(path)
        shape = (config.in_channels, config.input_size, config.input_size)
        if not np.issubdtype(images.dtype, np.floating) or images.shape[1:] != shape:
            raise ConfigError(
                f"{path}: the reference is {images.dtype.name} {list(images.shape)}, expected floating point "
                f"[images, {', '.join(map(str, shape))}], as the model makes them"
            )
        if len(images) < LEAST_IMAGES:
            raise ConfigError(f"{path}: {len(images)} reference images are too few; {LEAST_IMAGES} are needed")
        if not np.isfinite(images).all():
            raise ConfigError(f"{path}: the reference holds NaN or infinite values")
        flat = pictures(images, config).reshape(len(images), -1).astype(np.float64)
        mean = flat.mean(axis=0)
        if not flat.std(axis=0).any():
            raise ConfigError(f"{path}: all reference images are the same; nothing can be near or far of them")
        values, vectors = np.linalg.eigh(np.cov(flat, rowvar=False).reshape(flat.shape[1], -1))
        components = vectors[:, np.argsort(-values, kind="stable")[:COMPONENTS]]
        return cls(sha256_of(path), mean, components, (flat - mean) @ components)

    def distance(self, images: np.ndarray) -> float:
        """Of images [n, C, S, S] as `pictures` gives them, at least `LEAST_IMAGES`."""
        flat = images.reshape(len(images), -1).astype(np.float64)
        return max(0.0, frechet_distance((flat - self.mean) @ self.components, self.features))


def pictures(images: np.ndarray, config: ModelConfig) -> np.ndarray:
    """What counts of a model's images [n, C, S, S]: pixels clipped to [-1, 1], latents as they are."""
    return np.clip(images, -1, 1) if config.samples_pixels else images


def _read(path: Path) -> np.ndarray:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if not isinstance(arrays, np.lib.npyio.NpzFile):
                raise ConfigError(f"{path} is one array; a reference is an .npz with {' or '.join(_NAMES)}")
            for name in _NAMES:
                if name in arrays.files:
                    return np.asarray(arrays[name])
            raise ConfigError(
                f"{path} holds {', '.join(arrays.files) or 'nothing'}; a reference has {' or '.join(_NAMES)}"
            )
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist; give the reference images as an .npz") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path} is no .npz of reference images ({one_line(error)})") from error
