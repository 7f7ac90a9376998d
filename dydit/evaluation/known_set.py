"""Measures samples against data that dydit knows by name: digits, and other small sets."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dydit import __version__
from dydit.data.opened import open_data
from dydit.data.small_sets import Digits
from dydit.errors import ConfigError
from dydit.evaluation.images import open_images
from dydit.evaluation.small_set import SmallSetMeasure, as_model_images
from dydit.files import sha256_of
from dydit.runtime.noise_source import read_arrays
from dydit.training.evaluate import evaluate_digits

_BATCH = 256
_SEED = 0


@dataclass(frozen=True)
class SmallSetEvaluation:
    """Figures of samples against real images, and what they were measured on."""

    metrics: dict[str, float]
    samples: dict[str, Any]
    reference: str
    versions: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """The report as it is written to a file."""
        return dict(vars(self))


def evaluate_small_set(
    samples: Path, name: str, classifier: Path | None = None, labels: np.ndarray | None = None
) -> SmallSetEvaluation:
    """Measure an `.npz` file as `dydit sample --npz` writes it (`arr_0` images, `arr_1` labels) against the named data.

    Digits are measured on their pixels (`dydit.training.evaluate`), other data with a classifier that is trained on
    them (`dydit.evaluation.small_set`); `classifier`: a file that keeps it. `labels`: int [n] in place of `arr_1`,
    which counts texts if texts condition the model. Raises `ConfigError`.
    """
    data = open_data(name)
    images = open_images(samples)
    channels, height, width = data.shape
    if images.shape[1:3] != (height, width):
        size = "x".join(map(str, images.shape[1:3]))
        raise ConfigError(f"{samples} has images of {size} pixels, but {name} has {height}x{width}")
    if not samples.is_file():
        raise ConfigError(f"{samples} holds no labels; give the samples.npz that `dydit sample --npz` writes")
    labels = read_arrays(samples, ("arr_1",), "samples")["arr_1"] if labels is None else labels
    if labels.shape != (images.shape[0],) or not np.issubdtype(labels.dtype, np.integer):
        raise ConfigError(f"{samples}: arr_1 is {labels.dtype.name} {list(labels.shape)}, expected a label an image")
    own = as_model_images(np.concatenate(list(images.batches(_BATCH))), channels)
    if isinstance(data, Digits):
        if classifier is not None:
            raise ConfigError("digits are measured without a classifier that could be kept; leave out --classifier")
        metrics = asdict(evaluate_digits(own, labels))
    else:
        # As training reads them: some may be mirrored, the same ones in every call.
        generators = [np.random.default_rng([_SEED, index]) for index in range(len(data))]
        real = data.batch(np.arange(len(data)), generators)
        measure = SmallSetMeasure.fit(real.images, real.labels, data.classes, _SEED, classifier)
        metrics = asdict(measure.evaluate(own, labels))
    count = metrics.pop("samples")
    described = {"path": str(samples), "sha256": sha256_of(samples), "images": count}
    return SmallSetEvaluation(metrics, described, name, {"dydit": __version__})
