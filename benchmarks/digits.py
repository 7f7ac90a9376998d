"""The digits models, judged: class consistency, Fréchet distance, and what the routers save.

    dydit train --recipe digits --out RUN
    python benchmarks/digits.py --static RUN/static/model.safetensors --dynamic RUN/settle/model.safetensors \
        --json docs/benchmarks/digits.json

Without --static and --dynamic it judges the models that the package ships. Both sample the same labels from the same
noise on onnxruntime, an exact subnetwork for each step. Bars: FLOPs ratio within 0.02 of 0.5; class consistency above
95% and no more than 1.5 points below the static model's; Fréchet distance at most 1.15 times the static model's; more
than 20 distinct masks; mean token ratio at most 0.85, with a standard deviation over images above 0.02. Exit code 1
where one is missed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

from dydit.bundle.bundle import Bundle
from dydit.bundle.manifest import PlanKind
from dydit.export.exporter import ExportConfig, export
from dydit.files import write_json
from dydit.models.checkpoint import load_checkpoint
from dydit.runtime.pipeline import DyDiTPipeline
from dydit.training.evaluate import Dynamics, dynamics, evaluate_digits
from dydit.verify.quickstart import ASSETS
from dydit.verify.results import Machine
from dydit.verify.trace import trace_tokens

CLASSES = 10


def judge(path: Path, folder: Path, samples: int, steps: int, cfg_scale: float, batch: int) -> dict[str, float]:
    """Export one model into `folder`, sample, and score the images against the real digits."""
    bundle = export(load_checkpoint(path), folder, ExportConfig(steps=steps, plan=PlanKind.PER_STEP, max_batch=batch))
    labels = np.arange(samples) % CLASSES
    start = time.perf_counter()

    def tick(done: int, total: int) -> None:
        print(f"\r{path.name}: {done}/{total} steps, {time.perf_counter() - start:.0f} s", end="", file=sys.stderr)

    with DyDiTPipeline.from_bundle(folder) as pipe:
        images = pipe(labels.tolist(), guidance_scale=cfg_scale, output_type="latent", progress=tick).latents
    print(file=sys.stderr)
    return {**asdict(evaluate_digits(images, labels)), "subnets": len(bundle.manifest.subnets)}


def routing(folder: Path, images: int, cfg_scale: float) -> Dynamics:
    """What the dynamic bundle computed while sampling `images` images, conditional and unconditional rows alike."""
    bundle = Bundle.open(folder)
    trace = trace_tokens(bundle, (np.arange(images) % CLASSES).tolist(), cfg_scale)
    masks = bundle.manifest.step_masks()
    return dynamics(bundle.manifest.model, masks[:, :, 0], masks[:, :, 1], trace.tokens)


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
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--json", type=Path, help="file for the figures")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        settings = (given.samples, given.steps, given.cfg_scale, given.batch)
        dynamic = judge(given.dynamic, Path(work) / "dynamic", *settings)
        saved = routing(Path(work) / "dynamic", min(given.batch, given.samples), given.cfg_scale)
        static = judge(given.static, Path(work) / "static", *settings)
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
        print(name.ljust(9), ", ".join(f"{key} {value:.4g}" for key, value in figures.items()))
    for name, holds in held.items():
        print("  holds " if holds else "  MISSED", name)
    if given.json:
        write_json(given.json, report)
    return 0 if all(held.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
