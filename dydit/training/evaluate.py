"""How good the samples of a digits model are, and how dynamic the model is. NumPy and scikit-learn; no PyTorch.

Two measures of quality, both on 64 pixel features (`digits_pixels`): whether a classifier trained on the real digits
recognizes the requested class, and how far the distribution of the samples is from that of the real digits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from dydit.data.small_sets import Digits, digits_pixels
from dydit.errors import ConfigError
from dydit.extras import require
from dydit.models.config import ModelConfig
from dydit.models.macs import flops_ratio


@dataclass(frozen=True)
class DigitsMetrics:
    """Quality of a sample set."""

    class_consistency: float  # share of images that are classified as their label, 0..1
    frechet_distance: float  # to the 1,797 real digits, pixels in 0..1
    samples: int


@dataclass(frozen=True)
class Dynamics:
    """How a model routed a sample set; ratios in 0..1."""

    flops_ratio: float  # mean over steps and images of F_dyn/F_static
    distinct_masks: int  # different width masks among the steps
    unit_ratios: dict[str, float]  # share of units that were on, by unit group: heads, groups
    token_ratio: float  # share of tokens that entered an MLP
    token_ratio_std: float  # standard deviation over images of each image's own share


def evaluate_digits(images: np.ndarray, labels: np.ndarray) -> DigitsMetrics:
    """Quality of generated digits, float32 [n, 1, 16, 16] in [-1, 1], sampled for `labels`, int [n].

    Raises `ConfigError` for shapes that do not fit, fewer than 65 images (the covariance needs them), or values that
    are not finite.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    if labels.shape != (len(images),):
        raise ConfigError(f"{len(images)} images need {len(images)} labels; got shape {list(labels.shape)}")
    if len(images) <= 64:
        raise ConfigError(f"the Fréchet distance of 64 features needs at least 65 images; got {len(images)}")
    if not np.isfinite(images).all():
        raise ConfigError("the images hold values that are not finite")
    features = digits_pixels(images)
    predicted = _classifier().predict(features)
    return DigitsMetrics(
        class_consistency=float((predicted == labels).mean()),
        frechet_distance=frechet_distance(features, digits_pixels(Digits().images)),
        samples=len(images),
    )


@lru_cache(maxsize=1)
def _classifier() -> Any:
    """A support vector classifier (RBF kernel) trained on all real digits' features."""
    require("evaluating digits", ["sklearn"])
    from sklearn.svm import SVC

    data = Digits()
    return SVC(C=10.0, gamma="scale").fit(digits_pixels(data.images), data.labels)


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance of the normals fitted to features a [n, F] and b [m, F] (Dowson & Landau 1982; as in the FID).

    `|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a^(1/2) S_b S_a^(1/2))^(1/2))`, unbiased covariances, float64. Symmetric
    square roots by eigendecomposition, so constant features cause no errors.
    """
    mean_a, mean_b = a.mean(0), b.mean(0)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = _symmetric_root(cov_a)
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ cov_b @ root), 0, None)).sum()
    return float(np.square(mean_a - mean_b).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def _symmetric_root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return np.asarray((vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T)


def dynamics(config: ModelConfig, masks: np.ndarray, tokens: np.ndarray) -> Dynamics:
    """Summarize the decisions of a run: masks of units bool [S, U], tokens bool [S, L, n, N].

    Raises `ConfigError` for shapes that do not fit the model.
    """
    axis, steps = config.units, len(masks)
    fits = masks.shape == (steps, axis.size) and tokens.ndim == 4
    if not fits or (*tokens.shape[:2], tokens.shape[3]) != (steps, config.depth, config.tokens):
        raise ConfigError(
            f"decisions must be [S, {axis.size}] and [S, {config.depth}, n, {config.tokens}]; got "
            f"{list(masks.shape)} and {list(tokens.shape)}"
        )
    shares = tokens.mean(3).transpose(0, 2, 1)  # [S, n, L]
    ratio = flops_ratio(config, axis.counts(masks)[:, None], shares)
    return Dynamics(
        flops_ratio=float(ratio.mean()),
        distinct_masks=len(np.unique(masks, axis=0)),
        unit_ratios=axis.shares(masks),
        token_ratio=float(tokens.mean()),
        token_ratio_std=float(tokens.mean((0, 1, 3)).std()),
    )
