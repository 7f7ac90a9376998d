"""The digits model with some layers in 16 bits: do the bundles keep the quality that was searched for?

    python benchmarks/sensitivity.py [--json docs/benchmarks/sensitivity.json] [--work DIR]

It makes the figures for layers that stay in 16 bits (docs/benchmarks/sensitivity.json).

For int8-static and fp8 and for each target in decibels it runs the search of `dydit calibrate --target-psnr` on the
shipped model (250 DDPM steps, 32 subnetworks, guidance 1.5), in PyTorch. The bundle exported with its result samples on
onnxruntime the images that were searched on and as many others, which no search has seen, beside bundles that are in 8
bits throughout, and in fp16. Reported: the layers that stay in 16 bits, the share of multiply-adds in 8, and decibels
against the fp32 bundle with the same noise. Limits: on the images searched on, the median is within 2 dB of what the
search predicted, and at least nine in ten images keep the target (attention in fp16 is not computed alike everywhere,
so that a token may be routed otherwise); each search chooses fewer layers in 8 bits for a higher target. Exit code 1
where one is missed.

The bundles are timed in one run, --repeats rounds, taking turns. Those are times of ONNX Runtime on a CPU, which widens
fp16 products and emulates those of fp8; they say nothing about engines. --work keeps what was measured, so that an
interrupted run continues.
"""

from __future__ import annotations

import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np

from dydit.bench.bench import BenchConfig, run_bench
from dydit.bench.scripts import bundle_bytes, finish, progress, sampled_latents, script_parser, settings_of, work_folder
from dydit.bundle.bundle import Bundle
from dydit.bundle.stored_weights import Precision
from dydit.calibrate.activation_ranges import ActivationRanges
from dydit.calibrate.mixed_precision import Sensitivity, Target
from dydit.calibrate.observers import ObservedRun, observe
from dydit.calibrate.precision_search import SearchConfig, SearchInputs, psnr, search
from dydit.calibrate.range_methods import Method
from dydit.calibrate.tokens import spread_labels
from dydit.checkpoints.checkpoint import Checkpoint, load_checkpoint
from dydit.export.exporter import export, planned_steps
from dydit.export.settings import ExportConfig
from dydit.inspection.trace import trace_tokens
from dydit.parity.comparison import PIXEL_SPAN
from dydit.quickstart.quickstart import ASSETS
from dydit.reports.bench_report import Side, SideKind
from dydit.runtime.request import SampleRequest

CLASSES, BATCH = 10, 20
RANGES_SEED, RANGES_IMAGES = 1000, 32
PRECISIONS = (Precision.INT8_STATIC, Precision.FP8)
MEDIAN_WITHIN, SHARE_THAT_KEEPS = 2.0, 0.9
Figures = dict[str, dict[str, Any]]


def sampled(bundle: Bundle, images: int, seed: int, options: Namespace) -> np.ndarray:
    """Pixels f32 [n, 1, 16, 16] of images 0 to n-1 of a seed, clipped to [-1, 1], with the labels of the search."""
    labels = tuple(spread_labels(images, CLASSES))
    request = SampleRequest(labels=labels, seed=seed, cfg_scale=options.cfg_scale, batch_size=BATCH)
    folder = bundle.path.with_name(f"{bundle.path.name}-seed{seed}-samples")
    return np.clip(sampled_latents(bundle, folder, request, options.threads)[0], -1, 1)


def quality(decibels: np.ndarray, target: float | None) -> dict[str, float]:
    """The least and the median decibels, and the share of images that keep a target."""
    values = {"least": float(decibels.min()), "median": float(np.median(decibels))}
    return values if target is None else values | {"share_that_keeps": float((decibels >= target).mean())}


def described(sensitivity: Sensitivity, ranges: ActivationRanges) -> dict[str, Any]:
    """The result of a search, with the number of layers that stay in 16 bits, in all and by kind."""
    fields = {"precision", "target_psnr", "layers", "chosen", "held_out", "held_out_holds", "curve"}
    by_kind = ranges.fp16_layers.sum(axis=(0, 1)).tolist()
    return {
        **sensitivity.model_dump(include=fields),
        "stay": sum(by_kind),
        "stay_by_layer": dict(zip(("qkv", "proj", "fc1", "fc2"), by_kind, strict=True)),
    }


def searched(
    checkpoint: Checkpoint, plain: ExportConfig, options: Namespace, work: Path
) -> tuple[Figures, dict[str, ExportConfig]]:
    """The result of each search, by the name of its bundle, and the export settings of all bundles."""
    segments = planned_steps(checkpoint, plain)[1].segments
    labels, scales = [index % CLASSES for index in range(RANGES_IMAGES)], [options.cfg_scale]
    run = ObservedRun(segments, labels, scales, plain.sampling(checkpoint.config), seed=RANGES_SEED)
    ranges = observe(checkpoint, run, progress=progress("activations")).choose(Method.MINMAX, RANGES_IMAGES)
    configs = {"fp32": plain, "fp16": plain.model_copy(update={"precision": Precision.FP16})}
    # Tokens that the fp32 bundle routes over a run of 20 images; only the order of the layers depends on them.
    with tempfile.TemporaryDirectory(dir=work) as folder:
        traced = trace_tokens(export(checkpoint, Path(folder) / "fp32", plain), labels[:BATCH], options.cfg_scale)
    token_ratio = traced.tokens.mean(axis=(2, 3))
    results: Figures = {}
    for precision in PRECISIONS:
        in_8_bits = plain.model_copy(update={"precision": precision, "activations": ranges})
        configs[precision.value] = in_8_bits
        for target in options.targets:
            name = f"{precision.value}-{target:g}dB"
            inputs = SearchInputs(
                checkpoint=checkpoint,
                exported=plain,
                segments=segments,
                ranges=ranges,
                token_ratio=token_ratio,
                config=SearchConfig(
                    target=Target(psnr=target), precision=precision, images=options.images, steps=options.search_steps
                ),
                cfg_scales=scales,
                seed=0,
                work=work / "searches",
            )
            chosen, sensitivity = search(inputs, progress(name))
            results[name] = described(sensitivity, chosen)
            configs[name] = in_8_bits.model_copy(update={"activations": chosen})
    return results, configs


def timed(bundles: dict[str, Bundle], options: Namespace) -> dict[str, Any]:
    """Milliseconds per step of all bundles, in one run."""
    sides = [Side(name=name, kind=SideKind.BUNDLE, path=str(bundle.path)) for name, bundle in bundles.items()]
    config = BenchConfig(
        labels=tuple(range(4)), cfg_scale=options.cfg_scale, repeats=options.repeats, threads=options.threads
    )
    return run_bench(sides, config, progress=progress("times")).to_json()


def limits(figures: Figures, targets: list[float]) -> dict[str, bool]:
    """Which limits hold."""
    held: dict[str, bool] = {}
    for name, values in figures.items():
        if "target_psnr" not in values:
            continue
        measured, predicted = values["searched_on"], values["chosen"]["quality"]["psnr_median"]
        median, share = measured["median"], measured["share_that_keeps"]
        text = f"{name}: median {median:.1f} dB, the search predicted {predicted:.1f}"
        held[text] = abs(median - predicted) <= MEDIAN_WITHIN
        text = f"{name}: {share:.0%} of images keep {values['target_psnr']:g} dB, at least {SHARE_THAT_KEEPS:.0%}"
        held[text] = share >= SHARE_THAT_KEEPS
    for precision in PRECISIONS:
        stay = [figures[f"{precision.value}-{target:g}dB"]["stay"] for target in sorted(targets)]
        text = f"{precision.value}: {', '.join(map(str, stay))} layers stay in 16 bits as targets rise"
        held[text] = stay == sorted(stay)
    return held


def main() -> int:
    """Run, print, and tell by the exit code whether the limits hold."""
    parser = script_parser(
        __doc__,
        {
            "images": "images to search on; as many others verify",
            "search_steps": "steps of a segment at which losses are measured",
            "repeats": "rounds of timing; 0 times nothing",
        },
        steps=250,
        max_subnets=32,
        cfg_scale=1.5,
        images=20,
        search_steps=4,
        repeats=7,
        threads=0,
    )
    parser.add_argument("--targets", type=float, nargs="+", default=[50.0, 55.0], help="decibels  [50 55]")
    parser.add_argument("--work", type=Path, help="folder that keeps what was measured")
    options = parser.parse_args()
    checkpoint = load_checkpoint(ASSETS / "dydit.safetensors")
    plain = ExportConfig(steps=options.steps, max_subnets=options.max_subnets, max_batch=BATCH)
    with work_folder(options.work) as work, tempfile.TemporaryDirectory(dir=work) as folder:
        results, configs = searched(checkpoint, plain, options, work)
        bundles = {name: export(checkpoint, Path(folder) / name, config) for name, config in configs.items()}
        figures = {name: {**results.get(name, {})} for name in bundles}
        for seed, what in ((0, "searched_on"), (1, "others")):
            expected = sampled(bundles["fp32"], options.images, seed, options)
            for name in (each for each in bundles if each != "fp32"):
                decibels = psnr(sampled(bundles[name], options.images, seed, options), expected, PIXEL_SPAN)
                figures[name][what] = quality(decibels, figures[name].get("target_psnr"))
        for name, bundle in bundles.items():
            figures[name]["bundle_bytes"] = bundle_bytes(bundle)
        times = timed(bundles, options) if options.repeats else None
    for name, values in figures.items():
        print(name, {key: value for key, value in values.items() if key != "curve"})
    if times is not None:
        print(times["summary"])
    report = {"settings": settings_of(options), "figures": figures, "times": times}
    return finish(options, report, limits(figures, options.targets))


if __name__ == "__main__":
    sys.exit(main())
