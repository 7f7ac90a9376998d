"""Classifier-free guidance: which rows a step computes, for every way of running a model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dydit.errors import ConfigError

DEFAULT_SCALE = 4.0
"""The scale of a run that states none: that of DiT's published samples."""


def is_guided(scale: float) -> bool:
    """Whether a scale needs two rows for each image, one with its class and one with the null class."""
    return scale not in (0, 1)


@dataclass(frozen=True)
class Guidance:
    """Guidance with a scale. `null_class`: the label for "no class"; None if the model has no such label.

    With guidance a step computes each image twice, with its class and with the null class, and predicts
    `null + scale * (class - null)`. Two scales need only one row for each image, half the compute: at 1 that with the
    class, at 0 that with the null class. At 0 the null class also gives the parts that guidance does not change (the
    channels beyond the guided ones, and the variance), so labels do not matter. Raises `ConfigError` if the null class
    is needed and the model has none.
    """

    scale: float
    null_class: int | None

    def __post_init__(self) -> None:
        if self.scale != 1 and self.null_class is None:
            raise ConfigError(
                f"guidance {self.scale:g} needs a null class, which this model does not have (it is unconditional, or "
                "was trained without label dropout); use --cfg-scale 1 (guidance_scale=1)"
            )

    @property
    def guided(self) -> bool:
        """Whether a step computes two rows for each image."""
        return is_guided(self.scale)

    def rows(self, labels: np.ndarray) -> np.ndarray:
        """The labels of the rows of a step: int64 [B] -> int64 [B or 2B], those of the images first."""
        if self.scale == 1:
            return labels
        null = np.full_like(labels, self.null_class)
        return np.concatenate([labels, null]) if self.guided else null
