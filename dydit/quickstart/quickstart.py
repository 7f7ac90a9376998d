"""`dydit quickstart`: from trained weights to pictures and a report, on the CPU, in about a minute.

The package contains two small models of handwritten digits: a DyDiT, and the static DiT that it was fine-tuned from.
Both are exported to bundles. The bundle of the DyDiT samples, is traced, compared with PyTorch, and timed against the
static one. The folder then contains

    bundle/, static-bundle/      samples/ (single images)      samples.png, masks.png, tokens.png, parity.png, ...
    parity.json, bench.json      report.html (all of it, in one file)      report.json (the same as data)

While `.work/` exists the run is not finished, and the same call continues it. `report.json` is written last.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from pydantic import Field

from dydit import __version__ as dydit_version
from dydit.bundle.bundle import Bundle
from dydit.errors import BundleError, CheckpointError
from dydit.files import atomic_file, user_path
from dydit.inspection.trace import Trace, trace_tokens
from dydit.models.config import UserPath
from dydit.quickstart.quickstart_folder import QuickstartFolder
from dydit.quickstart.quickstart_report import STATIC, Sampled, StageResults, lines_of, write_results
from dydit.reports.bench_report import BenchReport, Side, SideKind
from dydit.reports.parity_report import ParityReport
from dydit.reports.results import Line, Result
from dydit.reports.text import aligned
from dydit.runtime.backends.base import BackendOptions
from dydit.runtime.bulk.finished import has_picture, picture_name
from dydit.runtime.bulk.run import sample_to_folder
from dydit.runtime.images.image_files import kept_arrays
from dydit.runtime.images.pixels import picture_format
from dydit.runtime.request import SampleRequest
from dydit.validation import Strict

if TYPE_CHECKING:
    from dydit.checkpoints.checkpoint import Checkpoint

ASSETS = Path(__file__).parent.parent / "assets" / "digits"
STAGES = ("export", "sample", "trace tokens", "parity", "bench", "report")
DYDIT = "DyDiT"

StageProgress = Callable[[str, int, int], None]


class QuickstartConfig(Strict):
    """What to run. The defaults take about a minute on two cores.

    `dydit`, `dit`: checkpoints in place of those in the package. `per_class`: number of images of each class, sampled
    `batch` at a time. `parity_labels`: labels of the images that are compared with PyTorch; every `parity_every`-th
    step is also compared by itself.
    """

    dydit: UserPath | None = None
    dit: UserPath | None = None
    steps: int = Field(default=250, ge=1, le=1000)
    max_subnets: int = Field(default=32, ge=1)
    per_class: int = Field(default=4, ge=1)
    batch: int = Field(default=20, ge=1)
    cfg_scale: float = Field(default=2.0, ge=0, allow_inf_nan=False)
    seed: int = Field(default=0, ge=0)
    threads: int = Field(default=0, ge=0)
    parity_labels: tuple[int, ...] = Field(default=(3, 8), min_length=1)
    parity_every: int = Field(default=25, ge=1)
    bench_steps: int = Field(default=10, ge=1)
    bench_repeats: int = Field(default=5, ge=1)

    @property
    def options(self) -> BackendOptions:
        """The options of backends."""
        return BackendOptions(threads=self.threads)


class QuickstartResult(Result):
    """The result of a quickstart. `ok`: whether parity passed."""

    out: str
    report: str
    ok: bool
    images: int
    seconds: float
    lines: tuple[Line, ...]

    def text(self) -> str:
        """Five lines for a terminal."""
        return aligned([(line.label, line.value, line.note) for line in self.lines])


@dataclass(frozen=True)
class _Job:
    """A running quickstart."""

    folder: QuickstartFolder
    config: QuickstartConfig
    dydit: Checkpoint
    dit: Checkpoint
    progress: StageProgress | None

    def tick(self, stage: str) -> Callable[[int, int], None] | None:
        return partial(self.progress, stage) if self.progress else None


def run_quickstart(
    out: Path,
    config: QuickstartConfig | None = None,
    overwrite: bool = False,
    progress: StageProgress | None = None,
) -> QuickstartResult:
    """Make the folder `out`. `progress(stage, done, total)` is called for each of `STAGES` in turn.

    The folder of a killed quickstart is completed. A finished one is refused, unless `overwrite` is set; a folder that
    contains anything else is always refused. Raises `OutputError` for a refused folder, and `CheckpointError` for a
    checkpoint that does not exist or does not fit.
    """
    from dydit.checkpoints.checkpoint import load_checkpoint

    config = config or QuickstartConfig()
    paths = [_asset(config.dydit, "dydit.safetensors"), _asset(config.dit, "dit.safetensors")]
    folder = QuickstartFolder(user_path(out))
    folder.require_free(overwrite)
    dydit, dit = (load_checkpoint(path) for path in paths)
    if not dydit.config.dynamic or dit.config.dynamic or dydit.config.without_routers() != dit.config:
        raise CheckpointError(f"{paths[0]} and {paths[1]} are not a DyDiT and a static DiT of the same size")
    settings = {
        "version": dydit_version,
        "config": config.model_dump(mode="json"),
        "checkpoints": [dydit.sha256, dit.sha256],
    }
    with folder.open(settings, overwrite):
        return _run(_Job(folder, config, dydit, dit, progress))


def _asset(given: Path | None, name: str) -> Path:
    path = given or ASSETS / name
    if not path.is_file():
        hint = "" if given else "; install dydit again, or train a model: dydit train --recipe digits --out RUN"
        raise CheckpointError(f"{path} does not exist{hint}")
    return path


def _run(job: _Job) -> QuickstartResult:
    start = time.perf_counter()
    bundle, static = _export(job)
    sampled = _sample(job, bundle)
    trace = _trace(job, bundle)
    parity = _parity(job, bundle)
    bench = _bench(job, bundle, static)
    return _report(job, StageResults(bundle, sampled, trace, parity, bench), start)


def _export(job: _Job) -> tuple[Bundle, Bundle]:
    """Both bundles. An existing bundle of the same checkpoint is kept."""
    from dydit.export.exporter import export, stale_reasons
    from dydit.export.settings import ExportConfig

    config = ExportConfig(steps=job.config.steps, max_subnets=job.config.max_subnets, max_batch=job.config.batch)
    bundles = []
    for name, checkpoint in (("bundle", job.dydit), ("static-bundle", job.dit)):
        path = job.folder.out / name
        with contextlib.suppress(BundleError):  # absent or damaged
            bundle = Bundle.open(path)
            if not stale_reasons(bundle.manifest, checkpoint):
                bundles.append(bundle)
                continue
        shutil.rmtree(path, ignore_errors=True)
        bundles.append(export(checkpoint, path, config, job.tick(STAGES[0])))
    return bundles[0], bundles[1]


def _sample(job: _Job, bundle: Bundle) -> Sampled:
    """All images, sampled in one run because it is timed. They are sampled again unless all their pictures exist."""
    config, classes = job.config, bundle.manifest.model.classes.count
    pictures, folder = picture_format(bundle.manifest), job.folder.out / "samples"
    sampled = job.folder.load("sampled.json", Sampled)
    if sampled and pictures and all(has_picture(folder, pictures, image) for image in range(sampled.images)):
        return sampled
    shutil.rmtree(folder, ignore_errors=True)
    request = SampleRequest(
        labels=tuple(range(classes)), num=classes * config.per_class, seed=config.seed, cfg_scale=config.cfg_scale
    )
    done = sample_to_folder(bundle, request, folder, options=config.options, progress=job.tick(STAGES[1]))
    sampled = Sampled(
        images=done.images,
        batch=config.batch,
        cfg_scale=config.cfg_scale,
        seed=config.seed,
        seconds=done.seconds,
        repeated_steps=done.repeated_steps,
    )
    job.folder.save("sampled.json", sampled.to_json())
    return sampled


def _trace(job: _Job, bundle: Bundle) -> Trace:
    """The first image of each class again, with its token decisions."""
    file = job.folder.work / "trace.npz"
    if (saved := kept_arrays(file, "latents", "tokens")) is not None:
        return Trace(*saved)
    labels = range(min(bundle.manifest.model.classes.count, job.config.batch))
    trace = trace_tokens(
        bundle, labels, job.config.cfg_scale, job.config.seed, options=job.config.options, progress=job.tick(STAGES[2])
    )
    with atomic_file(file) as opened:
        np.savez_compressed(opened, latents=trace.latents, tokens=trace.tokens)
    return trace


def _parity(job: _Job, bundle: Bundle) -> ParityReport:
    from dydit.parity.parity import REPORT, ParityConfig, run_parity

    if (known := job.folder.load(REPORT, ParityReport)) is not None:
        return known
    config = ParityConfig(
        threads=job.config.threads,
        labels=job.config.parity_labels,
        seed=job.config.seed,
        cfg_scale=job.config.cfg_scale,
        every=job.config.parity_every,
    )
    with _one_torch_thread():
        return run_parity(bundle, job.dydit, config, job.folder.out, job.tick(STAGES[3]))


@contextlib.contextmanager
def _one_torch_thread() -> Iterator[None]:
    """For two images of a small model more threads gain little, and on a busy machine they wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _bench(job: _Job, bundle: Bundle, static: Bundle) -> BenchReport:
    from dydit.bench.bench import REPORT, BenchConfig, run_bench

    if (known := job.folder.load(REPORT, BenchReport)) is not None:
        return known
    classes = bundle.manifest.model.classes.count
    config = BenchConfig(
        labels=tuple(image % classes for image in range(job.config.batch)),
        seed=job.config.seed,
        cfg_scale=job.config.cfg_scale,
        steps_measured=job.config.bench_steps,
        repeats=job.config.bench_repeats,
        threads=job.config.threads,
    )
    sides = [
        Side(name=DYDIT, kind=SideKind.BUNDLE, path=str(bundle.path), packed=True),
        Side(name=STATIC, kind=SideKind.BUNDLE, path=str(static.path), packed=True),
    ]
    return run_bench(sides, config, job.folder.out, job.tick(STAGES[4]))


def _report(job: _Job, results: StageResults, start: float) -> QuickstartResult:
    out, stage = job.folder.out, STAGES[5]
    if job.progress:
        job.progress(stage, 0, 1)
    lines = lines_of(results, out)
    values = write_results(results, lines, _read_images(out / "samples", results.sampled.images), out)
    result = QuickstartResult(
        out=str(out),
        report=str(out / "report.html"),
        ok=results.parity.ok,
        images=results.sampled.images,
        seconds=round(time.perf_counter() - start, 3),
        lines=lines,
    )
    job.folder.finish({**values, "result": result.to_json()})
    if job.progress:
        job.progress(stage, 1, 1)
    return result


def _read_images(folder: Path, count: int) -> np.ndarray:
    """The first `count` pictures of a sampling run, f32 [n, C, S, S] in [-1, 1]."""
    images = []
    for index in range(count):
        with Image.open(folder / picture_name(index)) as picture:
            pixels = np.asarray(picture, np.float32)
        images.append(pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1) / 127.5 - 1)
    return np.stack(images)
