"""The digits models, judged: class consistency, Fréchet distance, and what the routers save.

    dydit train --recipe digits --out RUN
    python benchmarks/digits.py --static RUN/static/model.safetensors --dynamic RUN/settle/model.safetensors \
        --json docs/benchmarks/digits.json

Without --static and --dynamic it judges the models that the package ships. Both sample the same labels from the same
noise on onnxruntime, an exact subnetwork for each step, half an hour each on one core. --work keeps what was sampled,
so that a run that was stopped goes on; --only samples one model, beside which another process may sample the other.
Bars: FLOPs ratio within 0.02 of 0.5; class consistency above
95% and no more than 1.5 points below the static model's; Fréchet distance at most 1.15 times the static model's; more
than 20 distinct masks; mean token ratio at most 0.85, with a standard deviation over images above 0.02. Exit code 1
where one is missed.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
from places import workplace

from dydit.bundle.bundle import Bundle
from dydit.bundle.manifest import PlanKind
from dydit.checkpoints.checkpoint import load_checkpoint
from dydit.export.exporter import export
from dydit.export.settings import ExportConfig
from dydit.files import write_json
from dydit.inspection.trace import trace_tokens
from dydit.quickstart.quickstart import ASSETS
from dydit.reports.results import Machine
from dydit.runtime.backends.base import BackendOptions
from dydit.runtime.bulk.run import OutputOptions, sample_to_folder
from dydit.runtime.request import SampleRequest
from dydit.training.evaluate import Dynamics, dynamics, evaluate_digits

CLASSES = 10
MOST_AT_ONCE = 100


def sampled(path: Path, work: Path, samples: int, steps: int, cfg_scale: float, batch: int) -> Bundle:
    """Export a model to `work/bundle` and sample it to `work/latents.npz`, going on with what is there."""
    folder = work / "bundle"
    checkpoint = load_checkpoint(path)
    if not folder.exists():
        export(checkpoint, folder, ExportConfig(steps=steps, plan=PlanKind.PER_STEP, max_batch=MOST_AT_ONCE))
    bundle, start = Bundle.open(folder), time.perf_counter()
    if bundle.manifest.checkpoint_sha256 != checkpoint.sha256 or bundle.manifest.sampling.steps != steps:
        raise SystemExit(f"{work} holds another model or other steps; choose another --work")

    def tick(done: int, total: int) -> None:
        print(f"\r{path.name}: {done}/{total} steps, {time.perf_counter() - start:.0f} s", end="", file=sys.stderr)

    request = SampleRequest(labels=tuple(range(CLASSES)), num=samples, cfg_scale=cfg_scale, batch_size=batch)
    outputs = OutputOptions(latents_out=work / "latents.npz")
    sample_to_folder(bundle, request, work / "samples", outputs, options=BackendOptions(threads=1), progress=tick)
    print(file=sys.stderr)
    return bundle


def judge(work: Path, bundle: Bundle) -> dict[str, float]:
    """Score the images in `work/latents.npz` against the real digits."""
    with np.load(work / "latents.npz") as file:
        metrics = evaluate_digits(file["latents"], file["labels"])
    return {**asdict(metrics), "subnets": len(bundle.manifest.subnets)}


def routing(folder: Path, images: int, cfg_scale: float) -> Dynamics:
    """What the dynamic bundle computed while sampling `images` images, conditional and unconditional rows alike."""
    bundle = Bundle.open(folder)
    trace = trace_tokens(bundle, (np.arange(images) % CLASSES).tolist(), cfg_scale)
    masks = bundle.manifest.step_masks()
    return dynamics(bundle.manifest.model, masks, trace.tokens)


def bars(static: dict[str, float], dynamic: dict[str, float], saved: Dynamics) -> dict[str, bool]:
    """Which of the bars hold."""
    return {
        "FLOPs ratio within 0.02 of 0.5": abs(saved.flops_ratio - 0.5) <= 0.02,
        "class consistency above 95%": dynamic["class_consistency"] > 0.95,
        "at most 1.5 points below static": static["class_consistency"] - dynamic["class_consistency"] <= 0.015,
        "Frechet distance at most 1.15 of static": dynamic["frechet_distance"] <= 1.15 * static["frechet_distance"],
        "more than 20 distinct masks": saved.distinct_masks > 20,
        "mean token ratio at most 0.85": saved.token_ratio <= 0.85,
        "its deviation over images above 0.02": saved.token_ratio_std > 0.02,
    }


def main() -> int:
    """Run, print, and say by the exit code whether the bars hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--static", type=Path, default=ASSETS / "dit.safetensors")
    parser.add_argument("--dynamic", type=Path, default=ASSETS / "dydit.safetensors")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--cfg-scale", type=float, default=1.5)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--work", type=Path, help="folder for bundles and samples, which stays")
    parser.add_argument("--only", choices=["static", "dynamic"], help="sample this model alone, and judge nothing")
    parser.add_argument("--json", type=Path, help="file for the figures")
    given = parser.parse_args()
    settings = (given.samples, given.steps, given.cfg_scale, given.batch)
    with workplace(given.work) as work:
        models = {"dynamic": given.dynamic, "static": given.static}
        chosen = [given.only] if given.only else list(models)
        bundles = {name: sampled(models[name], work / name, *settings) for name in chosen}
        if given.only:
            return 0
        dynamic, static = (judge(work / name, bundles[name]) for name in chosen)
        saved = routing(bundles["dynamic"].path, min(MOST_AT_ONCE, given.samples), given.cfg_scale)
    held = bars(static, dynamic, saved)
    report = {
        "settings": {"samples": given.samples, "steps": given.steps, "cfg_scale": given.cfg_scale},
        "static": static,
        "dynamic": dynamic,
        "routing": asdict(saved),
        "bars": held,
        "machine": Machine.here().to_json(),
    }
    for name, figures in (("static", static), ("dynamic", dynamic), ("routing", asdict(saved))):
        print(name.ljust(9), ", ".join(f"{key} {value:.4g}" for key, value in figures.items() if key != "unit_ratios"))
    for name, holds in held.items():
        print("  holds " if holds else "  MISSED", name)
    if given.json:
        write_json(given.json, report)
    return 0 if all(held.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
