"""Whole runs of a pipeline, with all that a caller waits for: a static model, and a dynamic one in several plans.

    python benchmarks/whole_runs.py --work DIR [--json docs/benchmarks/whole_runs.json]
    python benchmarks/whole_runs.py STATIC_BUNDLE BUNDLE... [--cfg-scale 1.5]

A step of a benchmark says nothing of what lies around it: opening a bundle, loading subnetworks, conditioning. Here
each contender is a process with a `DyDiTPipeline` on ONNX Runtime. They take turns; a call samples one batch of
latents, the same in every call. The first call counts from the start of its process. Ratios are to the first bundle,
medians of those within a round.

The default is DiT-S/2 with random weights and routers set to a FLOPs ratio near 0.5, four images with guidance, 50 DDPM
steps. Nothing else should run on the machine.
"""

from __future__ import annotations

import os
import sys
import time
from argparse import Namespace
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from dydit.bench.scripts import (
    finish,
    kept_bundle,
    markdown_table,
    progress,
    random_checkpoint,
    script_parser,
    settings_of,
    static_checkpoint,
    work_folder,
)
from dydit.bench.timing import peak_bytes
from dydit.bundle.bundle import Bundle
from dydit.bundle.manifest import PlanKind
from dydit.child_process import ChildProcess, serve
from dydit.errors import DyditError
from dydit.export.settings import ExportConfig
from dydit.models.dit.config import preset
from dydit.runtime.pipeline import DyDiTPipeline

PLANS: Mapping[str, Mapping[str, Any]] = {
    "dynamic width": {"plan": PlanKind.DYNAMIC_WIDTH},
    "16 merged subnetworks": {"max_subnets": 16},
    "a subnetwork per step": {"plan": PlanKind.PER_STEP},
}
WORKER = "--worker"


def work(folder: str, images: int, cfg_scale: float) -> int:
    """A contender's process: each line is a call."""
    pipe = DyDiTPipeline.from_bundle(folder)
    labels = [index % pipe.backend.bundle.manifest.model.classes.count for index in range(images)]

    def call(_: str) -> dict[str, float]:
        start = time.perf_counter()
        pipe(class_labels=labels, guidance_scale=cfg_scale, seed=0, output_type="latent")
        return {"seconds": time.perf_counter() - start, "peak_bytes": peak_bytes()}

    return serve(call)


def default_bundles(folder: Path, options: Namespace) -> dict[str, Bundle]:
    """The static model of random weights, and the plans of the dynamic one."""
    dynamic, static = folder / "dynamic.safetensors", folder / "static.safetensors"
    if not static.exists():
        static_checkpoint(static, random_checkpoint(dynamic, preset(options.preset), options.flops_ratio))
    bundles = {"static": kept_bundle(static, folder / "static", ExportConfig(steps=options.steps))}
    for number, (name, plan) in enumerate(PLANS.items()):
        bundles[name] = kept_bundle(dynamic, folder / f"plan-{number}", ExportConfig(steps=options.steps, **plan))
    return bundles


def measure(bundles: Mapping[str, Bundle], options: Namespace) -> dict[str, dict[str, Any]]:
    """Seconds of every call, and the peak memory of each contender's process."""
    show, total = progress("call"), len(bundles) * (1 + options.repeats)
    found: dict[str, dict[str, Any]] = {}
    running: dict[str, ChildProcess] = {}
    with ExitStack() as stack:
        for name, bundle in bundles.items():
            words = [sys.executable, __file__, WORKER, str(bundle.path), str(options.images), str(options.cfg_scale)]
            start = time.perf_counter()
            running[name] = stack.enter_context(ChildProcess(words, f"samples {name}"))
            running[name].ask("first")
            found[name] = {
                "first_seconds": time.perf_counter() - start,
                "seconds": [],
                "plan": bundle.manifest.plan.kind,
            }
            show(len(running), total)
        for turn in range(options.repeats):
            for place, (name, process) in enumerate(running.items(), start=1):
                answer = process.ask("again")
                found[name]["seconds"].append(answer["seconds"])
                found[name]["peak_bytes"] = answer["peak_bytes"]
                show(len(running) * (1 + turn) + place, total)
    return found


def compared(found: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """By name: how many times as fast as the first contender, in the first call and in the later ones."""
    base, *others = found
    ratios: dict[str, dict[str, float]] = {}
    for name in others:
        each = np.divide(found[base]["seconds"], found[name]["seconds"])
        first = found[base]["first_seconds"] / found[name]["first_seconds"]
        ratios[name] = {"first": first, "median": float(np.median(each)), "min": each.min(), "max": each.max()}
    return ratios


def table(found: Mapping[str, Mapping[str, Any]], ratios: Mapping[str, Mapping[str, float]]) -> str:
    """The figures in Markdown."""
    rows = []
    for name, each in found.items():
        seconds, over = np.asarray(each["seconds"]), ratios.get(name)
        rows.append(
            [
                name,
                f"{each['first_seconds']:.1f} s",
                "1" if over is None else f"{over['first']:.2f}",
                f"{np.median(seconds):.1f} s ({seconds.min():.1f} to {seconds.max():.1f})",
                "1" if over is None else f"{over['median']:.2f} ({over['min']:.2f} to {over['max']:.2f})",
                f"{each['peak_bytes'] / 1e6:,.0f} MB",
            ]
        )
    return markdown_table(["", "first call", "faster by", "later calls", "faster by", "peak memory"], rows)


def main(arguments: list[str] | None = None) -> int:
    """The command line, and that of a contender's process."""
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == [WORKER]:
        return work(words[1], int(words[2]), float(words[3]))
    parser = script_parser(__doc__, preset="S/2", flops_ratio=0.5, images=4, cfg_scale=4.0, steps=50, repeats=3)
    parser.add_argument("bundles", type=Path, nargs="*", help="bundles to run instead; the first is what others exceed")
    parser.add_argument("--work", type=Path, help="folder to keep models in")
    options = parser.parse_args(words)
    if len(options.bundles) == 1 or len({path.name for path in options.bundles}) < len(options.bundles):
        parser.error("give two bundles or more, in folders of different names, or none")
    try:
        with work_folder(options.work) as folder:
            bundles = {path.name: Bundle.open(path.absolute()) for path in options.bundles}
            found = measure(bundles or default_bundles(folder, options), options)
    except DyditError as error:
        print(error, file=sys.stderr)
        return 2
    ratios = compared(found)
    print(table(found, ratios))
    settings = settings_of(options) | {"bundles": [str(path) for path in options.bundles]}
    report = {"settings": settings, "calls": found, "faster_than_first": ratios, "load_average": os.getloadavg()[0]}
    return finish(options, report, {})


if __name__ == "__main__":
    sys.exit(main())
