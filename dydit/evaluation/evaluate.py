"""Measures samples with Inception features against a reference: FID, sFID, Inception Score, precision and recall.

The definitions are those of the ADM evaluator (Dhariwal & Nichol 2021), with which the published figures of DiT and
DyDiT were computed: features of the 2015 Inception, unbiased covariances, Inception Score of parts of 5000 images in
their order, and precision and recall by the third nearest neighbour.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from pydantic import Field

from dydit import __version__
from dydit.errors import ConfigError
from dydit.evaluation.frechet import Normal
from dydit.evaluation.images import ImageSet, open_images
from dydit.evaluation.inception import WEIGHTS, Features, Inception
from dydit.evaluation.reference import Reference, write_reference
from dydit.evaluation.scores import NEIGHBOURS, inception_score, precision_recall
from dydit.files import require_absent, sha256_of
from dydit.models.config import UserPath
from dydit.validation import Strict
from dydit.words import counted

LEAST_IMAGES = 2049
"""The least images for a covariance of 2048 features of full rank."""
BIASED_BELOW = 10_000
"""With fewer images, the FID is noticeably larger than with many."""


class Metric(StrEnum):
    """What is measured."""

    FID = "fid"
    SFID = "sfid"
    INCEPTION_SCORE = "is"
    PRECISION = "precision"
    RECALL = "recall"


_FRECHET = (Metric.FID, Metric.SFID)
_MANIFOLD = (Metric.PRECISION, Metric.RECALL)


class Progress(Protocol):
    """Shows how far a stage is."""

    def stage(self, title: str, done: int, total: int) -> None:
        """Report that `done` of `total` are done."""


class EvaluateConfig(Strict):
    """How to measure.

    `inception`: the weights. `metrics`: None for all that the reference allows to ask for, which is the Inception Score
    without a reference. `allow_few`: measure FID and sFID of fewer images than the covariance needs.
    """

    inception: UserPath
    metrics: tuple[Metric, ...] | None = Field(default=None, min_length=1)
    batch_size: int = Field(default=32, ge=1)
    device: Literal["cpu", "cuda"] = "cpu"
    allow_few: bool = False


@dataclass(frozen=True)
class Evaluation:
    """Figures and what they were measured on. `notes`: what a reader must know about them."""

    metrics: dict[str, float]
    samples: dict[str, Any]
    reference: dict[str, Any] | None
    inception: dict[str, str]
    settings: dict[str, Any]
    versions: dict[str, str]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The report as it is written to a file."""
        return {**vars(self), "notes": list(self.notes)}


def evaluate(
    samples: Path,
    reference: Path | None,
    config: EvaluateConfig,
    progress: Progress | None = None,
    new_reference: Path | None = None,
) -> Evaluation:
    """Measure the images at `samples`, and write them as a reference to `new_reference` if that is given.

    Raises `ConfigError` for images or a reference that do not fit what is asked for, `CheckpointError` for weights that
    are not the Inception of the FID, `BackendError` if torch-fidelity or the device is missing, and `OutputError` if
    `new_reference` exists or cannot be written.
    """
    images = open_images(samples)
    against = None if reference is None else Reference.open(reference)
    metrics = _chosen(config, against, writing=new_reference is not None)
    notes = _require_enough(metrics, images, against, config.allow_few)
    if new_reference is not None:
        require_absent(new_reference)
    if against is not None and against.images is not None and against.images.shape[1:] != images.shape[1:]:
        notes.append(f"{samples} and {reference} have images of different sizes; all are resized to 299x299 pixels")
    network = Inception.load(config.inception, config.device)
    spatial = Metric.SFID in metrics or new_reference is not None

    def features(of: ImageSet, title: str, spatial: bool) -> Features:
        stage = None if progress is None else lambda done, total: progress.stage(title, done, total)
        return network.features(of, config.batch_size, spatial, stage)

    own = features(images, "samples", spatial)
    other = None
    if against is not None and against.images is not None and _needs_images(metrics, against):
        other = features(against.images, "reference", Metric.SFID in metrics and against.spatial is None)
    values: dict[str, float] = {}
    for metric in metrics:
        if metric in _FRECHET:
            values[metric.value] = _distance(metric, own, against, other)
        elif metric is Metric.INCEPTION_SCORE:
            values[metric.value] = inception_score(network.logits(own.pool))
    if set(_MANIFOLD) & set(metrics):
        assert other is not None
        pools = (torch.from_numpy(each.pool).to(config.device) for each in (own, other))
        both = precision_recall(*pools)
        values |= {metric.value: getattr(both, metric.value) for metric in metrics if metric in _MANIFOLD}
    if new_reference is not None:
        kept = write_reference(new_reference, own, images, config.batch_size)
        if kept < images.shape[0]:
            notes.append(f"{new_reference} has the statistics of all images, and {counted(kept, 'image')} of them")
    return Evaluation(
        metrics={metric.value: values[metric.value] for metric in metrics},
        samples=_described(images),
        reference=None if against is None else _reference_described(against),
        inception={"path": str(config.inception), "sha256": network.sha256},
        settings={"batch_size": config.batch_size, "device": config.device, "neighbours": NEIGHBOURS},
        versions={"dydit": __version__, "torch": torch.__version__, "torch-fidelity": version("torch-fidelity")},
        notes=tuple(notes),
    )


def _chosen(config: EvaluateConfig, reference: Reference | None, writing: bool) -> tuple[Metric, ...]:
    """The metrics to compute, in the order of the report. Raises `ConfigError` if the reference lacks something."""
    asked = config.metrics
    if asked is None:
        asked = tuple(Metric) if reference is not None else () if writing else (Metric.INCEPTION_SCORE,)
    metrics = tuple(metric for metric in Metric if metric in asked)
    if reference is None:
        if needing := [metric.value for metric in metrics if metric is not Metric.INCEPTION_SCORE]:
            raise ConfigError(f"{', '.join(needing)} compare samples with a reference; give --reference")
        return metrics
    if reference.images is None and (needing := [metric.value for metric in metrics if metric in _MANIFOLD]):
        raise ConfigError(
            f"{reference.path} holds no images (arr_0), which {' and '.join(needing)} need; measure the others with "
            "--metrics fid,sfid,is"
        )
    for metric, statistics, names in (
        (Metric.FID, reference.pool, "mu and sigma"),
        (Metric.SFID, reference.spatial, "mu_s and sigma_s"),
    ):
        if metric in metrics and statistics is None and reference.images is None:
            raise ConfigError(f"{reference.path} holds neither {names} nor images (arr_0), which {metric} needs")
    return metrics


def _needs_images(metrics: tuple[Metric, ...], reference: Reference) -> bool:
    return (
        bool(set(_MANIFOLD) & set(metrics))
        or (Metric.FID in metrics and reference.pool is None)
        or (Metric.SFID in metrics and reference.spatial is None)
    )


def _require_enough(
    metrics: tuple[Metric, ...], samples: ImageSet, reference: Reference | None, allow_few: bool
) -> list[str]:
    """Notes about small numbers of images. Raises `ConfigError` if there are too few to measure."""
    notes = []
    distances = [metric for metric in metrics if metric in _FRECHET]
    for images, computed in ((samples, distances), *_reference_images(distances, reference)):
        count = images.shape[0]
        least = NEIGHBOURS + 1 if set(_MANIFOLD) & set(metrics) else 2
        if count < least:
            raise ConfigError(
                f"{images.path}: {counted(count, 'image')} cannot be measured; at least {least} are needed"
            )
        names = " and ".join(computed)
        if computed and count < LEAST_IMAGES and not allow_few:
            raise ConfigError(
                f"{images.path}: {counted(count, 'image')} are too few for {names}: the covariance of 2048 features "
                f"needs at least {LEAST_IMAGES:,}; add --allow-few for a figure that can only be compared with those "
                "of equally many images"
            )
        if computed and count < BIASED_BELOW:
            notes.append(
                f"{images.path} has {counted(count, 'image')}: {names} of fewer than {BIASED_BELOW:,} are biased "
                "upwards; published figures are of 50,000"
            )
    return notes


def _reference_images(distances: list[Metric], reference: Reference | None) -> list[tuple[ImageSet, list[Metric]]]:
    """The images of a reference, and the distances that are computed from them, because there are no statistics."""
    if reference is None or reference.images is None:
        return []
    statistics = {Metric.FID: reference.pool, Metric.SFID: reference.spatial}
    return [(reference.images, [metric for metric in distances if statistics[metric] is None])]


def _distance(metric: Metric, own: Features, reference: Reference | None, other: Features | None) -> float:
    assert reference is not None
    pooled = metric is Metric.FID
    statistics = reference.pool if pooled else reference.spatial
    ours, theirs = (None if each is None else each.pool if pooled else each.spatial for each in (own, other))
    assert ours is not None
    if statistics is None:
        assert theirs is not None
        statistics = Normal.fit(theirs)
    return max(0.0, Normal.fit(ours).distance(statistics))


def _described(images: ImageSet) -> dict[str, Any]:
    count, height, width, _ = images.shape
    sha256 = sha256_of(images.path) if images.path.is_file() else None
    return {"path": str(images.path), "sha256": sha256, "images": count, "height": height, "width": width}


def _reference_described(reference: Reference) -> dict[str, Any]:
    known = {"path": str(reference.path), "statistics": reference.pool is not None}
    if reference.images is not None:
        return {**known, **_described(reference.images)}
    return {**known, "sha256": sha256_of(reference.path), "images": 0}


def missing_weights() -> ConfigError:
    """The error for a call without weights."""
    return ConfigError(
        f"the features need the weights of Inception: fetch {WEIGHTS} from the releases of the project torch-fidelity, "
        "and give its path with --inception"
    )
