"""The digits model with some layers in 16 bits: do the bundles keep the target that was searched for?

    python benchmarks/sensitivity.py [--json docs/benchmarks/sensitivity.json] [--work FOLDER]

For int8-static and fp8, and for each target in decibels, the search of `dydit calibrate --target-psnr` on the shipped
model (250 DDPM steps, 32 subnetworks, guidance 1.5), in PyTorch; then the bundle that is exported with what it found,
on onnxruntime, samples the images searched on and as many others, which no search has seen, beside bundles that are in
8 bits throughout, and in fp16. Of each the layers that stay in 16 bits, the share of multiply-adds in 8, and decibels
against the fp32 bundle with the same noise. Bars: on the images searched on, the median is within 2 dB of what the
search said, and at least nine in ten images keep the target (attention in fp16 is not computed alike everywhere, so
that a token may be routed otherwise); each search chooses fewer layers in 8 bits for a higher target. Exit code 1 where
one is missed.

Times of the bundles are taken side by side in one run, with --repeats. They are of ONNX Runtime on a CPU, which widens
fp16 products and emulates those of fp8, and say nothing about engines; the bound on speed is arithmetic. --work keeps
what was measured, so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from places import progress, workplace

from dydit.bench.bench import BenchConfig, run_bench
from dydit.bundle.bundle import Bundle
from dydit.bundle.stored_weights import Precision
from dydit.calibrate.activation_ranges import ActivationRanges
from dydit.calibrate.mixed_precision import Sensitivity, Target
from dydit.calibrate.observers import ObservedRun, observe
from dydit.calibrate.precision_search import PIXEL_SPAN, SearchConfig, SearchInputs, psnr, search
from dydit.calibrate.range_methods import Method
from dydit.calibrate.tokens import spread_labels
from dydit.checkpoints.checkpoint import Checkpoint, load_checkpoint
from dydit.export.exporter import export, planned_steps
from dydit.export.settings import ExportConfig
from dydit.files import write_json
from dydit.inspection.trace import trace_tokens
from dydit.quickstart.quickstart import ASSETS
from dydit.reports.bench_report import Side, SideKind
from dydit.reports.results import Machine
from dydit.runtime.backends.base import BackendOptions
from dydit.runtime.backends.registry import open_backend
from dydit.runtime.loop import MemoryStore, StepRunner, sample
from dydit.runtime.noise_source import SeededNoise
from dydit.runtime.request import make_batches
from dydit.runtime.resident import ResidentSubnets

CLASSES, BATCH = 10, 20
RANGES_SEED = 1000
PRECISIONS = (Precision.INT8_STATIC, Precision.FP8)
MEDIAN_WITHIN, SHARE_THAT_KEEPS = 2.0, 0.9


def sampled(bundle: Bundle, images: int, seed: int, cfg_scale: float, threads: int) -> np.ndarray:
    """Pixels f32 [n, 1, 16, 16] of images 0 to n-1 of a seed, classes as the search spreads them."""
    model, labels = bundle.manifest.model, spread_labels(images, CLASSES)
    engine, store = open_backend("onnxruntime", bundle, BackendOptions(threads=threads)), MemoryStore()
    noise = SeededNoise(seed, (model.in_channels, model.input_size, model.input_size))
    batches, tick, pixels = make_batches(labels, range(images), BATCH), progress(bundle.path.name), []
    with ResidentSubnets(engine) as subnets:
        for index, batch in enumerate(batches):
            runner = StepRunner(engine, subnets, batch.labels, cfg_scale)
            alone = make_batches(batch.labels.tolist(), batch.images, len(batch.images))
            sample(runner, alone, noise, store)
            pixels.append(store.load(0))
            tick(index + 1, len(batches))
    return np.concatenate(pixels)


def told(decibels: np.ndarray, target: float | None) -> dict[str, float]:
    """The least and middle decibels, and the share of images that keep a target."""
    values = {"least": float(decibels.min()), "median": float(np.median(decibels))}
    return values if target is None else values | {"share_that_keeps": float((decibels >= target).mean())}


def described(found: Sensitivity, ranges: ActivationRanges) -> dict[str, Any]:
    """What a search found, with the layers that stay by kind and its curve."""
    kept = ranges.fp16_layers
    return {
        **found.model_dump(
            include={"precision", "target_psnr", "layers", "chosen", "held_out", "held_out_holds", "curve"}
        ),
        "stay": int(kept.sum()),
        "stay_by_layer": dict(zip(("qkv", "proj", "fc1", "fc2"), kept.sum(axis=(0, 1)).tolist(), strict=True)),
    }


def main() -> int:
    """Run, print, and say by the exit code whether the bars hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=float, nargs="+", default=[50.0, 55.0], help="decibels")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--max-subnets", type=int, default=32)
    parser.add_argument("--cfg-scale", type=float, default=1.5)
    parser.add_argument("--images", type=int, default=20, help="images searched on, and others to verify on")
    parser.add_argument("--search-steps", type=int, default=4, help="steps of a segment at which losses are measured")
    parser.add_argument("--repeats", type=int, default=7, help="rounds of the times; 0: none are taken")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--work", type=Path, help="folder for what is measured, which stays")
    parser.add_argument("--json", type=Path, help="file for the figures")
    given = parser.parse_args()
    checkpoint = load_checkpoint(ASSETS / "dydit.safetensors")
    plain = ExportConfig(steps=given.steps, max_subnets=given.max_subnets, max_batch=BATCH)
    with workplace(given.work) as work, tempfile.TemporaryDirectory(dir=work) as folder:
        searches, configs = searched(checkpoint, plain, given, work)
        bundles = {name: export(checkpoint, Path(folder) / name, config) for name, config in configs.items()}
        figures: dict[str, dict[str, Any]] = {name: searches.get(name, {}) for name in bundles}
        for seed, what in ((0, "searched_on"), (1, "others")):
            images = {
                name: sampled(bundle, given.images, seed, given.cfg_scale, given.threads)
                for name, bundle in bundles.items()
            }
            for name, pixels in images.items():
                if name != "fp32":
                    decibels = psnr(np.clip(pixels, -1, 1), np.clip(images["fp32"], -1, 1), PIXEL_SPAN)
                    figures[name][what] = told(decibels, figures[name].get("target_psnr"))
        for name, bundle in bundles.items():
            figures[name]["bundle_bytes"] = sum(entry.bytes for entry in bundle.manifest.files.values())
        times = timed(bundles, given) if given.repeats else None
    bars = held(figures, given.targets)
    for name, values in figures.items():
        print(name, {key: value for key, value in values.items() if key != "curve"})
    for title, holds in bars.items():
        print("  holds " if holds else "  MISSED", title)
    if times is not None:
        print(times["summary"])
    if given.json:
        settings = {name: value for name, value in vars(given).items() if name not in ("json", "work")}
        machine = Machine.here().to_json()
        write_json(
            given.json, {"settings": settings, "figures": figures, "bars": bars, "times": times, "machine": machine}
        )
    return 0 if all(bars.values()) else 1


def searched(
    checkpoint: Checkpoint, plain: ExportConfig, given: argparse.Namespace, work: Path
) -> tuple[dict[str, dict[str, Any]], dict[str, ExportConfig]]:
    """What each search found, by the name of its bundle, and how all bundles are exported."""
    plan = planned_steps(checkpoint, plain)[1]
    labels, scales = [index % CLASSES for index in range(32)], [given.cfg_scale]
    run = ObservedRun(plan.segments, labels, scales, given.steps, seed=RANGES_SEED)
    seen = observe(checkpoint, run, progress=progress("activations"))
    ranges = seen.choose(Method.MINMAX, len(labels))
    configs = {"fp32": plain, "fp16": plain.model_copy(update={"precision": Precision.FP16})}
    # Only the order of layers depends on it: tokens that the fp32 bundle routes, over a run of 20 images.
    with tempfile.TemporaryDirectory(dir=work) as folder:
        traced = trace_tokens(export(checkpoint, Path(folder) / "fp32", plain), labels[:BATCH], given.cfg_scale)
    tokens = traced.tokens.mean(axis=(2, 3))
    found: dict[str, dict[str, Any]] = {}
    for precision in PRECISIONS:
        everything = plain.model_copy(update={"precision": precision, "activations": ranges})
        configs[precision.value] = everything
        for target in given.targets:
            name = f"{precision.value}-{target:g}dB"
            config = SearchConfig(
                target=Target(psnr=target), precision=precision, images=given.images, steps=given.search_steps
            )
            inputs = SearchInputs(
                checkpoint=checkpoint,
                exported=plain,
                segments=plan.segments,
                ranges=ranges,
                token_ratio=tokens,
                config=config,
                cfg_scales=scales,
                seed=0,
                work=work / "searches",
            )
            kept, sensitivity = search(inputs, progress(name))
            found[name] = described(sensitivity, kept)
            configs[name] = everything.model_copy(update={"activations": kept})
    return found, configs


def timed(bundles: dict[str, Bundle], given: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds a step of all bundles, in one run."""
    sides = [
        Side(name=name, kind=SideKind.BUNDLE, path=str(bundle.path), backend="onnxruntime")
        for name, bundle in bundles.items()
    ]
    config = BenchConfig(
        labels=tuple(range(4)), cfg_scale=given.cfg_scale, repeats=given.repeats, threads=given.threads
    )
    return run_bench(sides, config, progress=progress("times")).to_json()


def held(figures: dict[str, dict[str, Any]], targets: list[float]) -> dict[str, bool]:
    """The bars, in words, and whether they hold."""
    bars: dict[str, bool] = {}
    for name, values in figures.items():
        if "target_psnr" not in values:
            continue
        own, said = values["searched_on"], values["chosen"]["quality"]["psnr_median"]
        share = own["share_that_keeps"]
        bars[f"{name}: median {own['median']:.1f} dB, the search said {said:.1f}"] = (
            abs(own["median"] - said) <= MEDIAN_WITHIN
        )
        bars[f"{name}: {share:.0%} of images keep {values['target_psnr']:g} dB, at least {SHARE_THAT_KEEPS:.0%}"] = (
            share >= SHARE_THAT_KEEPS
        )
    for precision in PRECISIONS:
        stay = [figures[f"{precision.value}-{target:g}dB"]["stay"] for target in sorted(targets)]
        words = ", ".join(map(str, stay))
        bars[f"{precision.value}: {words} layers stay in 16 bits as targets rise"] = stay == sorted(stay)
    return bars


if __name__ == "__main__":
    sys.exit(main())
