"""The number of tokens that each image sends through the MLP of each block at each step. Tokens are not kept.

A count belongs to the image and the step that are passed with it. Counts of different images can be merged in any
order. This module runs no model; `dydit.calibrate.calibration` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dydit.diffusion.guidance import is_guided
from dydit.errors import CalibrationError


@dataclass(frozen=True)
class TokenCounts:
    """Counts of some images at one guidance scale.

    `images` int64 [n]: the numbers of the images (of their noise), ascending. `counts` int32 [n, S, L, R]: routed
    tokens by image, step (execution order), block and row. R = 2 with guidance (the row with the label, then that of
    the null class), else 1. `tokens`: N, the number of tokens of a row.
    """

    cfg_scale: float
    tokens: int
    images: np.ndarray
    counts: np.ndarray

    def __post_init__(self) -> None:
        if self.counts.ndim != 4 or not self.counts.size or self.images.shape != self.counts.shape[:1]:
            raise CalibrationError("there are no token counts to calibrate on; sample more images")
        if (np.diff(self.images) <= 0).any():
            raise CalibrationError("an image was counted twice, or the images are not in ascending order")
        if self.counts.min() < 0 or self.counts.max() > self.tokens:
            raise CalibrationError(f"a token count is outside 0..{self.tokens}, the tokens of a row")

    @property
    def rows(self) -> int:
        """R, rows of an image."""
        return int(self.counts.shape[3])

    @property
    def per_image(self) -> np.ndarray:
        """Routed tokens of all rows of each image, int64 [n, S, L]."""
        return self.counts.sum(axis=3, dtype=np.int64)

    @property
    def mean(self) -> np.ndarray:
        """Mean routed tokens of a row, float64 [S, L]."""
        return np.asarray(self.counts.mean(axis=(0, 3)))


def merge(parts: Sequence[TokenCounts]) -> TokenCounts:
    """The counts of all parts. Raises `CalibrationError` if there are none, or if they do not belong together."""
    if not parts:
        raise CalibrationError("there are no token counts to calibrate on; sample more images")
    first = parts[0]
    kind = (first.cfg_scale, first.tokens, first.counts.shape[1:])
    if any((each.cfg_scale, each.tokens, each.counts.shape[1:]) != kind for each in parts):
        raise CalibrationError("token counts of different models, runs or guidance scales cannot be merged")
    images = np.concatenate([each.images for each in parts])
    order = np.argsort(images, kind="stable")
    counts = np.concatenate([each.counts for each in parts])[order]
    return TokenCounts(first.cfg_scale, first.tokens, images[order], counts)


class TokenCounter:
    """Counts the tokens of a batch of images: one call of `add` for each of `steps` steps, in any order."""

    def __init__(self, images: Sequence[int], steps: int, depth: int, tokens: int, cfg_scale: float):
        self._images, self._tokens, self._scale = np.asarray(images, np.int64), tokens, cfg_scale
        self._counts = np.full((len(images), steps, depth, 2 if is_guided(cfg_scale) else 1), -1, np.int32)

    def add(self, step: int, tokens: np.ndarray) -> None:
        """Count the decisions of one step, bool [L, R*n, N]: all rows with labels, then those of the null class.

        Raises `CalibrationError` for a step that was counted before, and for another shape.
        """
        images, _, depth, rows = self._counts.shape
        if tokens.shape != (depth, rows * images, self._tokens):
            raise CalibrationError(
                f"token decisions of shape {list(tokens.shape)}; expected {[depth, rows * images, self._tokens]}"
            )
        if (self._counts[:, step] >= 0).any():
            raise CalibrationError(f"step {step} was counted before")
        counts = np.count_nonzero(tokens, axis=2)  # [L, R*n]
        self._counts[:, step] = counts.reshape(depth, rows, images).transpose(2, 0, 1)

    def finish(self) -> TokenCounts:
        """The counts. Raises `CalibrationError`, naming the first missing step, if the counts are incomplete."""
        missing = np.flatnonzero((self._counts < 0).any(axis=(0, 2, 3)))
        if len(missing):
            raise CalibrationError(f"step {missing[0]} was not counted")
        order = np.argsort(self._images, kind="stable")
        return TokenCounts(self._scale, self._tokens, self._images[order], self._counts[order])


def spread_labels(images: int, classes: int) -> list[int]:
    """A class for each of `images` images, evenly over all classes: their numbers of images differ by at most one.

    If there are fewer images than classes, they take every n-th class: label j is floor(j * classes / images).
    """
    if images >= classes:
        return [image % classes for image in range(images)]
    return [image * classes // images for image in range(images)]


def spread_scales(images: int, scales: Sequence[float]) -> list[tuple[float, int]]:
    """The number of images of each guidance scale: equal numbers, with the remainder given to the first scales."""
    return [(scale, images // len(scales) + (k < images % len(scales))) for k, scale in enumerate(scales)]
