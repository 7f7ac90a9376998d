"""Classifier-free guidance: which rows a step computes. Every way of running a model asks here."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dydit.errors import ConfigError


def is_guided(scale: float) -> bool:
    """Whether a scale needs two rows an image, one with its class and one with none."""
    return scale not in (0, 1)


@dataclass(frozen=True)
class Guidance:
    """Guidance at a scale, of a model whose label `null_class` stands for no class (None: it has none).

    With guidance a step computes each image twice, with its class and with none, and predicts
    `none + scale * (class - none)`. Two scales need one row an image, half the compute. At 1 that is the row with the
    class. At 0 it is the row with none: also for what guidance leaves alone (channels beyond the guided ones, the
    variance), so that labels do not matter. Raises `ConfigError` where rows with no class are needed and the model
    has none.
    """

    scale: float
    null_class: int | None

    def __post_init__(self) -> None:
        if self.scale != 1 and self.null_class is None:
            raise ConfigError(
                f"guidance {self.scale:g} needs a row for no class, which this model lacks (it was trained without "
                "label dropout); use --cfg-scale 1 (guidance_scale=1)"
            )

    @property
    def guided(self) -> bool:
        """Whether a step computes two rows an image."""
        return is_guided(self.scale)

    def rows(self, labels: np.ndarray) -> np.ndarray:
        """The classes of a step's rows for images of `labels`: int64 [B] -> int64 [B or 2B], those of images first."""
        if self.scale == 1:
            return labels
        null = np.full_like(labels, self.null_class)
        return np.concatenate([labels, null]) if self.guided else null
