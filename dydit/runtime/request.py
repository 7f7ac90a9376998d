"""The request of a sampling run: which images, from which noise, in which batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import Field, model_validator

from dydit.bundle.manifest import Manifest
from dydit.errors import ConfigError
from dydit.models.config import TEXTS_NEEDED, ModelConfig, UserPath
from dydit.validation import Strict

UINT64 = 1 << 64


class SampleRequest(Strict):
    """Images of `labels`, repeated in turn until there are `num` (by default one for each label).

    An unconditional model needs no labels, and a model that texts condition samples all of its texts by default. Image
    i of the run draws its noise from (seed, first_image + i), so a run can be split over machines. `cfg_scale` 1
    disables guidance and halves the compute; None: the default of the model. `noise_from`: an `.npz` file (see
    `dydit.runtime.noise_source`) with the noise, and with the labels if `labels` is empty.
    """

    labels: tuple[int, ...] = ()
    num: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0, lt=UINT64)
    cfg_scale: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    first_image: int = Field(default=0, ge=0, lt=UINT64)
    batch_size: int | None = Field(default=None, ge=1)
    noise_from: UserPath | None = None

    @model_validator(mode="after")
    def _consistent(self) -> SampleRequest:
        if self.first_image + self.images > UINT64:
            raise ValueError("image indices must be at most 2^64-1")
        return self

    @property
    def images(self) -> int:
        """The number of images (0 if neither `num` nor `labels` tells)."""
        return self.num or len(self.labels)

    def labels_for(self, model: ModelConfig) -> tuple[int, ...]:
        """The labels that repeat. Raises `ConfigError` if there are none and the model is conditional."""
        if not self.labels and model.text is not None:
            if not model.classes.count:
                raise ConfigError(TEXTS_NEEDED)
            return tuple(range(model.classes.count))
        if not self.labels and not model.classes.unconditional:
            raise ConfigError("give at least one label (--labels 0-9), or a noise file that holds labels")
        return self.labels or (0,)


@dataclass(frozen=True)
class Batch:
    """Images that run together. `first`: position of the first in the run; `images`: indices that key their noise."""

    first: int
    images: tuple[int, ...]
    labels: np.ndarray  # int64 [B]

    @property
    def places(self) -> slice:
        """Where its images are among all images of the run."""
        return slice(self.first, self.first + len(self.images))


def check_labels(labels: Sequence[int], manifest: Manifest) -> None:
    """Raise `ConfigError` for a label that the model does not take: it is no class, and not the one for "no class"."""
    for label in labels:
        check_label(label, manifest.model)


def check_label(label: int, model: ModelConfig, where: str = "") -> None:
    """`check_labels` for one label. `where`: a beginning of the message."""
    classes = model.classes
    if not classes.rows:
        raise ConfigError(TEXTS_NEEDED)
    if model.text is not None and not 0 <= label < classes.rows:
        raise ConfigError(f"{where}text {label} is outside 0..{classes.rows - 1}, the texts of this run")
    if classes.unconditional and label:
        raise ConfigError(f"{where}label {label}: this model is unconditional and takes label 0 only")
    if not 0 <= label < classes.rows:
        null = "" if classes.null is None else f", or {classes.null} for no class"
        raise ConfigError(f"{where}label {label} is outside 0..{classes.count - 1}, the classes of this model{null}")


def check_batch_size(size: int | None, manifest: Manifest, images: int) -> int:
    """The batch size to use: the requested one, else the largest that the bundle allows and the images fill."""
    if size is None:
        return min(manifest.max_batch, images)
    if not 1 <= size <= manifest.max_batch:
        raise ConfigError(
            f"batch size {size} is outside 1..{manifest.max_batch}, for which the bundle was exported; "
            "larger ones need `dydit export --max-batch`"
        )
    return size


def make_batches(labels: Sequence[int], images: Sequence[int], size: int) -> list[Batch]:
    """Cut a run into batches of `size`, in order; the last may be smaller. `labels` and `images` are one per image."""
    assert len(labels) == len(images)
    return [
        Batch(first, tuple(images[first : first + size]), np.asarray(labels[first : first + size], np.int64))
        for first in range(0, len(images), size)
    ]
