"""What samples are compared with: images, statistics of their Inception features, or both.

The file has the format of the ADM evaluator's references: an `.npz` of `mu` [2048], `sigma` [2048, 2048] (FID), `mu_s`
[2023], `sigma_s` [2023, 2023] (sFID), and `arr_0` uint8 [N, H, W, 3] (precision and recall). The statistics may be of
more images than the file holds. Any of the three may be missing.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dydit.errors import ConfigError
from dydit.evaluation.frechet import Normal
from dydit.evaluation.images import ARRAY, ImageSet, open_images
from dydit.evaluation.inception import POOL, SPATIAL, Features
from dydit.runtime.images.image_files import Streamed, write_npz
from dydit.runtime.noise_source import read_arrays

IMAGES = 10_000
"""Most images that are written into a reference, as many as ADM's references hold."""


@dataclass(frozen=True, eq=False)
class Reference:
    """A reference. `pool`, `spatial`: statistics of its features; `images`: for precision and recall."""

    path: Path
    pool: Normal | None
    spatial: Normal | None
    images: ImageSet | None

    @classmethod
    def open(cls, path: Path) -> Reference:
        """Read statistics, and the header of the images. Raises `ConfigError` for anything that does not fit."""
        names = _names(path)
        if path.is_dir() or not names & {"mu", "sigma", "mu_s", "sigma_s"}:
            return cls(path, None, None, open_images(path))
        pool, spatial = (
            _statistics(path, mean, covariance, size) if names & {mean, covariance} else None
            for mean, covariance, size in (("mu", "sigma", POOL), ("mu_s", "sigma_s", SPATIAL))
        )
        return cls(path, pool, spatial, open_images(path) if ARRAY in names else None)


def _names(path: Path) -> set[str]:
    """The names of a file's arrays; none for anything that is not an archive."""
    if not zipfile.is_zipfile(path):
        return set()
    with zipfile.ZipFile(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


def _statistics(path: Path, mean: str, covariance: str, size: int) -> Normal:
    arrays = read_arrays(path, (mean, covariance), "reference")
    for name, shape in ((mean, (size,)), (covariance, (size, size))):
        array = arrays[name]
        if not np.issubdtype(array.dtype, np.floating) or array.shape != shape:
            raise ConfigError(
                f"{path}: {name} is {array.dtype.name} {list(array.shape)}, expected floating point {list(shape)}; it "
                "belongs to features of another network"
            )
        if not np.isfinite(array).all():
            raise ConfigError(f"{path}: {name} holds NaN or infinite values")
    if not np.allclose(arrays[covariance], arrays[covariance].T, rtol=1e-3):
        raise ConfigError(f"{path}: {covariance} is not symmetric, so it is no covariance")
    return Normal(arrays[mean].astype(np.float64), arrays[covariance].astype(np.float64))


def write_reference(path: Path, features: Features, images: ImageSet, batch_size: int) -> int:
    """Write a reference of images and their features; the file must not exist. Returns how many images it holds.

    Of more than 10,000 images it holds evenly spaced ones; the statistics are of all.
    """
    assert features.spatial is not None
    pool, spatial = Normal.fit(features.pool), Normal.fit(features.spatial)
    count, *shape = images.shape
    chosen = np.unique(np.linspace(0, count - 1, min(count, IMAGES)).round().astype(int))
    statistics = {"mu": pool.mean, "sigma": pool.covariance, "mu_s": spatial.mean, "sigma_s": spatial.covariance}
    arrays = {name: Streamed("float64", array.shape, [array]) for name, array in statistics.items()}
    arrays[ARRAY] = Streamed("uint8", (len(chosen), *shape), _chosen(images, chosen, batch_size))
    write_npz(path, arrays, replace=False)
    return len(chosen)


def _chosen(images: ImageSet, chosen: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    first = 0
    for batch in images.batches(batch_size):
        yield batch[chosen[(chosen >= first) & (chosen < first + len(batch))] - first]
        first += len(batch)
