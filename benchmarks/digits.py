"""The digits models: class consistency, Fréchet distance, and what the routers save.

    dydit train --recipe digits --out RUN
    python benchmarks/digits.py --static RUN/static/model.safetensors --dynamic RUN/settle/model.safetensors \
        --json docs/benchmarks/digits.json

It makes the figures for the digits models (docs/benchmarks/digits.json).

Without --static and --dynamic it evaluates the models that the package ships. Both sample the same labels from the same
noise on onnxruntime, with an exact subnetwork for each step, half an hour each on one core. --work keeps what was
sampled, so that an interrupted run continues; --only samples one model, while another process may sample the other.
Limits: FLOPs ratio within 0.02 of 0.5; class consistency above 95% and no more than 1.5 points below the static
model's; Fréchet distance at most 1.15 times the static model's; more than 20 distinct masks; mean token ratio at most
0.85, with a standard deviation over images above 0.02. Exit code 1 where one is missed.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

from dydit.bench.scripts import finish, kept_bundle, sampled_latents, script_parser, work_folder
from dydit.bundle.bundle import Bundle
from dydit.bundle.manifest import PlanKind
from dydit.export.settings import ExportConfig
from dydit.inspection.trace import trace_tokens
from dydit.quickstart.quickstart import ASSETS
from dydit.runtime.request import SampleRequest
from dydit.training.evaluate import Dynamics, dynamics, evaluate_digits

CLASSES = 10
MOST_AT_ONCE = 100


def sampled(path: Path, work: Path, steps: int, request: SampleRequest) -> tuple[Bundle, dict[str, float]]:
    """Export a model to `work/bundle` and sample it, or continue there; returns its bundle and its figures."""
    config = ExportConfig(steps=steps, plan=PlanKind.PER_STEP, max_batch=MOST_AT_ONCE)
    bundle = kept_bundle(path, work / "bundle", config)
    metrics = evaluate_digits(*sampled_latents(bundle, work / "samples", request, threads=1))
    return bundle, {**asdict(metrics), "subnets": len(bundle.manifest.subnets)}


def limits(static: dict[str, float], dynamic: dict[str, float], routing: Dynamics) -> dict[str, bool]:
    """Which limits hold."""
    return {
        "FLOPs ratio within 0.02 of 0.5": abs(routing.flops_ratio - 0.5) <= 0.02,
        "class consistency above 95%": dynamic["class_consistency"] > 0.95,
        "at most 1.5 points below static": static["class_consistency"] - dynamic["class_consistency"] <= 0.015,
        "Frechet distance at most 1.15 of static": dynamic["frechet_distance"] <= 1.15 * static["frechet_distance"],
        "more than 20 distinct masks": routing.distinct_masks > 20,
        "mean token ratio at most 0.85": routing.token_ratio <= 0.85,
        "its deviation over images above 0.02": routing.token_ratio_std > 0.02,
    }


def main() -> int:
    """Run, print, and tell by the exit code whether the limits hold."""
    parser = script_parser(__doc__, samples=2000, steps=250, cfg_scale=1.5, batch=20)
    parser.add_argument("--static", type=Path, default=ASSETS / "dit.safetensors", help="a static checkpoint")
    parser.add_argument("--dynamic", type=Path, default=ASSETS / "dydit.safetensors", help="a dynamic checkpoint")
    parser.add_argument("--work", type=Path, help="folder that keeps bundles and samples")
    parser.add_argument("--only", choices=["static", "dynamic"], help="sample this model alone, without a verdict")
    options = parser.parse_args()
    samples, steps, cfg_scale = options.samples, options.steps, options.cfg_scale
    classes = tuple(range(CLASSES))
    request = SampleRequest(labels=classes, num=samples, cfg_scale=cfg_scale, batch_size=options.batch)
    with work_folder(options.work) as work:
        models = {"dynamic": options.dynamic, "static": options.static}
        chosen = [options.only] if options.only else list(models)
        results = {name: sampled(models[name], work / name, steps, request) for name in chosen}
        if options.only:
            return 0
        (bundle, dynamic), (_, static) = results["dynamic"], results["static"]
        # Conditional and unconditional rows alike.
        labels = [image % CLASSES for image in range(min(MOST_AT_ONCE, samples))]
        tokens = trace_tokens(bundle, labels, cfg_scale).tokens
        routing = dynamics(bundle.manifest.model, bundle.manifest.step_masks(), tokens)
    figures = {"static": static, "dynamic": dynamic, "routing": asdict(routing)}
    for name, values in figures.items():
        print(name.ljust(9), ", ".join(f"{key} {value:.4g}" for key, value in values.items() if key != "unit_ratios"))
    settings = {"samples": samples, "steps": steps, "cfg_scale": cfg_scale}
    return finish(options, {"settings": settings, **figures}, limits(static, dynamic, routing))


if __name__ == "__main__":
    sys.exit(main())
