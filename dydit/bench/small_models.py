"""What scripts measure of a model that was trained on a small set: its samples, its routing, and the time of a step."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np

from dydit.bench.bench import BenchConfig, bundle_side, run_bench
from dydit.bench.scripts import Progress
from dydit.bundle.bundle import Bundle
from dydit.evaluation.known_set import evaluate_small_set
from dydit.reports.bench_report import BenchReport
from dydit.runtime.backends.base import BackendOptions
from dydit.runtime.bulk.run import OutputOptions, sample_to_folder
from dydit.runtime.request import SampleRequest
from dydit.training.evaluate import dynamics

STATIC, DYNAMIC = "static", "dynamic"
"""Names of the two models of a comparison."""


@dataclass(frozen=True)
class Measures:
    """How models are measured: `samples` images, `batch` at a time, of all classes or texts in turn."""

    samples: int
    batch: int
    cfg_scale: float
    seed: int = 0
    threads: int = 0
    repeats: int = 7

    @classmethod
    def of(cls, options: Namespace) -> Self:
        """Those of a script's command line."""
        return cls(**{field.name: getattr(options, field.name) for field in fields(cls)})

    @property
    def options(self) -> BackendOptions:
        """The options of backends."""
        return BackendOptions(threads=self.threads)

    def labels(self, bundle: Bundle, images: int) -> tuple[int, ...]:
        """The labels of `images` images: all classes, or texts, in turn."""
        return tuple(image % bundle.manifest.model.classes.count for image in range(images))

    def request(self, bundle: Bundle) -> SampleRequest:
        """The sampling run that quality is measured on."""
        labels = self.labels(bundle, self.samples)
        return SampleRequest(labels=labels, cfg_scale=self.cfg_scale, batch_size=self.batch, seed=self.seed)


def quality(
    bundle: Bundle,
    folder: Path,
    measures: Measures,
    data: str,
    classifier: Path | None = None,
    classes: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Class consistency and Fréchet distance of samples, in `folder`, to the images of `data`; continues there.

    `classes`: the class of each text, for a model that texts condition. `classifier`: a file that keeps the classifier.
    """
    outputs, request = OutputOptions(npz=True), measures.request(bundle)
    sample_to_folder(bundle, request, folder, outputs, options=measures.options, progress=progress)
    labels = None if classes is None else np.asarray(classes)[list(request.labels)]
    return evaluate_small_set(folder / "samples.npz", data, classifier, labels).metrics


def routing_figures(bundle: Bundle, tokens: np.ndarray) -> dict[str, Any]:
    """What the routers decided in a run (`dydit.training.evaluate.Dynamics`). `tokens`: bool [steps, L, rows, N]."""
    return asdict(dynamics(bundle.manifest.model, bundle.manifest.step_masks(), tokens))


def latency(
    bundle: Bundle, static: Bundle, measures: Measures, texts: Path | None = None, progress: Progress | None = None
) -> BenchReport:
    """A step of the sides `dynamic` and `static`, taking turns. `texts`: a file of at least `batch` texts."""
    named = {DYNAMIC: bundle, STATIC: static}
    sides = [bundle_side(each, name, "onnxruntime") for name, each in named.items()]
    config = BenchConfig(
        labels=measures.labels(bundle, measures.batch),
        cfg_scale=measures.cfg_scale,
        repeats=measures.repeats,
        threads=measures.threads,
        seed=measures.seed,
        texts=texts,
    )
    return run_bench(sides, config, progress=progress)


def latency_figures(report: BenchReport) -> dict[str, Any]:
    """Milliseconds of a step of both sides, the speed-up, and the one that multiply-adds allow; and what each needs.

    That is: bytes in memory and on disk, and seconds to the first images.
    """
    pair = report.comparison(STATIC)
    return {
        "ms": report.side(DYNAMIC).median_ms,
        "static_ms": report.side(STATIC).median_ms,
        "speed_up": pair.median,
        "allowed": pair.allowed,
        "reached": pair.achieved,
        "needs": {
            side.side.name: {name: getattr(side, name) for name in ("peak_bytes", "disk_bytes", "first_seconds")}
            for side in report.sides
        },
    }
