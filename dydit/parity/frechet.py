"""The Fréchet distance of small sets of images to reference images, on features that need no network.

The features of an image are its coordinates on the first principal components of the reference. The distance is that of
the normal distributions fitted to both sets (`dydit.evaluation.frechet`). It tells whether one set of images is farther
from the reference than another set. It is not an FID, and distances to different references cannot be compared.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from dydit.errors import ConfigError, one_line
from dydit.evaluation.frechet import frechet_distance
from dydit.files import sha256_of
from dydit.models.config import ModelConfig

COMPONENTS = 16
LEAST_IMAGES = 4 * COMPONENTS
"""The smallest set of images from which the covariance of the components can be estimated."""
_NAMES = ("images", "latents")


@dataclass(frozen=True, eq=False)
class FrechetReference:
    """Reference images: their mean [F], principal components [F, K], features [n, K], and the SHA-256 of their file."""

    sha256: str
    mean: np.ndarray
    components: np.ndarray
    features: np.ndarray

    @classmethod
    def read(cls, path: Path, config: ModelConfig) -> Self:
        """Read an `.npz` file that holds `images`, or `latents` as `dydit sample --latents-out` writes them: floating
        point [n, C, S, S] of the model's shape, pixels in [-1, 1]. Raises `ConfigError` if the file does not fit.
        """
        images = _read(path)
        shape = (config.in_channels, config.input_size, config.input_size)
        if not np.issubdtype(images.dtype, np.floating) or images.shape[1:] != shape:
            raise ConfigError(
                f"{path}: the reference images are {images.dtype.name} of shape {list(images.shape)}, expected "
                f"floating point of shape [images, {', '.join(map(str, shape))}], like the images of the model"
            )
        if len(images) < LEAST_IMAGES:
            raise ConfigError(f"{path}: {len(images)} reference images are too few; at least {LEAST_IMAGES} are needed")
        if not np.isfinite(images).all():
            raise ConfigError(f"{path}: the reference images contain NaN or infinite values")
        flat = pictures(images, config).reshape(len(images), -1).astype(np.float64)
        mean = flat.mean(axis=0)
        if not flat.std(axis=0).any():
            raise ConfigError(f"{path}: all reference images are equal, so no distance to them can be computed")
        values, vectors = np.linalg.eigh(np.cov(flat, rowvar=False).reshape(flat.shape[1], -1))
        components = vectors[:, np.argsort(-values, kind="stable")[:COMPONENTS]]
        return cls(sha256_of(path), mean, components, (flat - mean) @ components)

    def distance(self, images: np.ndarray) -> float:
        """The distance of at least `LEAST_IMAGES` images [n, C, S, S], as `pictures` returns them, to the reference."""
        flat = images.reshape(len(images), -1).astype(np.float64)
        return max(0.0, frechet_distance((flat - self.mean) @ self.components, self.features))


def pictures(images: np.ndarray, config: ModelConfig) -> np.ndarray:
    """A model's samples [n, C, S, S] as they are compared: pixels clipped to [-1, 1], latents unchanged."""
    return np.clip(images, -1, 1) if config.samples_pixels else images


def _read(path: Path) -> np.ndarray:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if not isinstance(arrays, np.lib.npyio.NpzFile):
                raise ConfigError(f"{path} contains a single array; expected an .npz file with {' or '.join(_NAMES)}")
            for name in _NAMES:
                if name in arrays.files:
                    return np.asarray(arrays[name])
            raise ConfigError(
                f"{path} contains {', '.join(arrays.files) or 'no arrays'}; expected {' or '.join(_NAMES)}"
            )
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist; expected an .npz file of reference images") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path} is not an .npz file of reference images ({one_line(error)})") from error
