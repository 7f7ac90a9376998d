"""The Fréchet distance of two sets of features, or of the normal distributions fitted to them. NumPy alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np


@dataclass(frozen=True, eq=False)
class Normal:
    """A normal distribution of F features: its mean [F] and covariance [F, F], both float64."""

    mean: np.ndarray
    covariance: np.ndarray

    @classmethod
    def fit(cls, features: np.ndarray) -> Self:
        """Fit features [n, F], n at least 2: mean and unbiased covariance."""
        return cls(features.mean(0, dtype=np.float64), np.atleast_2d(np.cov(features, rowvar=False)))

    def distance(self, other: Normal) -> float:
        """Fréchet distance of two normal distributions (Dowson & Landau 1982; the FID of Inception features).

        `|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a^(1/2) S_b S_a^(1/2))^(1/2))`, float64. Symmetric square roots by
        eigendecomposition, so constant features cause no errors.
        """
        root = _symmetric_root(self.covariance)
        cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ other.covariance @ root), 0, None)).sum()
        shift = np.square(self.mean - other.mean).sum()
        return float(shift + np.trace(self.covariance) + np.trace(other.covariance) - 2 * cross)


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance of the normal distributions fitted to features a [n, F] and b [m, F], see `Normal.distance`."""
    return Normal.fit(a).distance(Normal.fit(b))


def _symmetric_root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return np.asarray((vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T)
