"""Samplers and numbers of steps: speed and Fréchet distance of the digits model, from one bundle of dynamic width.

    python benchmarks/samplers.py --json docs/benchmarks/samplers.json --picture docs/images/samplers.png

The bundle is exported once, for 250 steps of DDPM; every other run gets its masks from the stored routers. All runs
sample the same labels from the same initial noise on onnxruntime. For the speed they take turns with one batch each
(`--repeats` rounds after one that warms up; medians); for the distance each samples `--samples` images. --work keeps
what was sampled, so that an interrupted script continues. Limits: 20 steps of DPM-Solver++ give at least 11 times the
images per second of 250 steps of DDPM, at no more than 1.25 times the Fréchet distance. Exit code 1 where one is
missed.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dydit.bench.scripts import finish, sampled_latents, script_parser, settings_of, work_folder
from dydit.bundle.bundle import Bundle
from dydit.bundle.manifest import PlanKind
from dydit.checkpoints.checkpoint import load_checkpoint
from dydit.diffusion.samplers import Sampler, SamplerChoice
from dydit.export.exporter import export
from dydit.export.settings import ExportConfig
from dydit.files import write_atomic
from dydit.planning.resampling import resampled
from dydit.quickstart.quickstart import ASSETS
from dydit.reports.plots_samplers import samplers_png
from dydit.reports.text import aligned
from dydit.runtime.backends.base import BackendOptions
from dydit.runtime.backends.registry import open_backend
from dydit.runtime.loop import MemoryStore, StepRunner, sample
from dydit.runtime.noise_source import SeededNoise
from dydit.runtime.request import SampleRequest, make_batches
from dydit.runtime.resident import ResidentSubnets
from dydit.training.evaluate import evaluate_digits

CLASSES = 10
RUNS = (
    (Sampler.DDPM, 250),
    (Sampler.DDPM, 100),
    (Sampler.DDIM, 50),
    (Sampler.DDIM, 20),
    (Sampler.DPM_SOLVER, 20),
    (Sampler.DPM_SOLVER, 10),
)
BASELINE, FAST = (Sampler.DDPM, 250), (Sampler.DPM_SOLVER, 20)


@dataclass
class Run:
    """One sampler with a number of steps: its bundle, and seconds of a batch in each round."""

    sampler: Sampler
    steps: int
    bundle: Bundle
    seconds: list[float]

    @property
    def name(self) -> str:
        """Its name in files."""
        return f"{self.sampler.replace('+', 'p')}-{self.steps}"


def time_batch(bundle: Bundle, batch: int, cfg_scale: float, threads: int) -> float:
    """Seconds of sampling one batch, without opening the session."""
    model = bundle.manifest.model
    labels = [index % CLASSES for index in range(batch)]
    noise = SeededNoise(0, (model.in_channels, model.input_size, model.input_size))
    with (
        open_backend("onnxruntime", bundle, BackendOptions(threads=threads)) as backend,
        ResidentSubnets(backend) as each,
    ):
        each.get(0)
        runner = StepRunner(backend, each, sorted(set(labels)), cfg_scale)
        start = time.perf_counter()
        sample(runner, make_batches(labels, range(batch), batch), noise, MemoryStore())
        return time.perf_counter() - start


def figures(run: Run, options: Any, work: Path) -> dict[str, Any]:
    """What is reported of a run."""
    request = SampleRequest(
        labels=tuple(range(CLASSES)), num=options.samples, cfg_scale=options.cfg_scale, batch_size=options.batch
    )
    metrics = evaluate_digits(*sampled_latents(run.bundle, work / run.name, request, options.threads))
    seconds = float(np.median(run.seconds))
    return {
        "sampler": run.sampler.value,
        "steps": run.steps,
        "seconds_of_a_batch": run.seconds,
        "images_per_second": options.batch / seconds,
        "flops_ratio_of_width": run.bundle.manifest.plan.macs / run.bundle.manifest.plan.static_macs,
        **asdict(metrics),
    }


def main() -> int:
    """Run, print, draw, and tell by the exit code whether the limits hold."""
    parser = script_parser(__doc__, samples=500, cfg_scale=1.5, batch=20, repeats=3, threads=2)
    parser.add_argument("--work", type=Path, help="folder that keeps the bundle and samples")
    parser.add_argument("--picture", type=Path, help="write a picture to this file")
    options = parser.parse_args()
    with work_folder(options.work) as work:
        checkpoint, folder = load_checkpoint(ASSETS / "dydit.safetensors"), work / "bundle"
        if not folder.exists():
            export(checkpoint, folder, ExportConfig(plan=PlanKind.DYNAMIC_WIDTH, max_batch=options.batch))
        bundle = Bundle.open(folder)
        if bundle.manifest.checkpoint_sha256 != checkpoint.sha256 or bundle.manifest.max_batch < options.batch:
            raise SystemExit(f"{work} holds another bundle; choose another --work")
        runs = [
            Run(sampler, steps, resampled(bundle, SamplerChoice(sampler=sampler, steps=steps)), [])
            for sampler, steps in RUNS
        ]
        for turn in range(1 + options.repeats):
            for run in runs:
                seconds = time_batch(run.bundle, options.batch, options.cfg_scale, options.threads)
                run.seconds += [seconds] if turn else []
        rows = [figures(run, options, work) for run in runs]
    by_run = {(row["sampler"], row["steps"]): row for row in rows}
    base, fast = by_run[BASELINE], by_run[FAST]
    speed, distance = (fast[key] / base[key] for key in ("images_per_second", "frechet_distance"))
    head = ["sampler", "steps", "images/s", "Fréchet distance", "class consistency"]
    table = [
        [
            row["sampler"],
            str(row["steps"]),
            f"{row['images_per_second']:.2f}",
            f"{row['frechet_distance']:.4f}",
            f"{row['class_consistency']:.1%}",
        ]
        for row in rows
    ]
    print(aligned([head, *table]))
    if options.picture:
        write_atomic(options.picture, samplers_png(rows))
    limits = {
        f"20 steps of DPM-Solver++ at least 11 times as fast as 250 of DDPM ({speed:.2f})": speed >= 11,
        f"its Frechet distance at most 1.25 times ({distance:.3f})": distance <= 1.25,
    }
    return finish(options, {"settings": settings_of(options), "runs": rows}, limits)


if __name__ == "__main__":
    sys.exit(main())
