"""The digits model in lower precision: do the images stay?

    python benchmarks/precision.py [--json docs/benchmarks/precision.json] [--picture docs/images/precision.png]

It makes the figures and the picture for lower precision (docs/benchmarks/precision.json).

The shipped model with a subnetwork for each step, on onnxruntime, in fp32 and in the variants of `VARIANTS`: same
noise, labels and 250 DDPM steps with guidance. The ranges of calibrated variants are the largest values of 32 images of
another seed, for each segment or one for all; smoothed variants first move range into the weights, where these images
say that it helps. Measured: for each image the peak signal-to-noise ratio against fp32 (pixels in [-1, 1]); for each
variant class consistency and Fréchet distance; and over a whole run of 20 images the share of token decisions that
differ from fp32. Limits: 30 dB for every image in int8, 35 dB in fp16; in both and in int8-static class consistency at
most a point below fp32 and Fréchet distance at most 1.1 times its; ranges for each segment are better than one for all,
in the median of decibels. Exit code 1 where one is missed.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from dydit.bench.scripts import bundle_bytes, finish, sampled_latents, script_parser
from dydit.bundle.manifest import PlanKind
from dydit.bundle.stored_weights import Precision
from dydit.calibrate.activation_ranges import ActivationRanges, Observations, repeat
from dydit.calibrate.observers import ObservedRun, observe
from dydit.calibrate.precision_search import psnr
from dydit.calibrate.range_methods import Method
from dydit.calibrate.smoothing_search import FoundSmoothing, find_smoothing
from dydit.checkpoints.checkpoint import Checkpoint, load_checkpoint
from dydit.export.exporter import export, planned_steps
from dydit.export.settings import ExportConfig
from dydit.files import write_atomic
from dydit.inspection.trace import trace_tokens
from dydit.parity.comparison import PIXEL_SPAN
from dydit.plot_style import drawing, in_few_colours, png
from dydit.quickstart.quickstart import ASSETS
from dydit.runtime.request import SampleRequest
from dydit.training.evaluate import evaluate_digits

CLASSES, SEED, IMAGES = 10, 1000, 32
FP32 = "fp32"


@dataclass(frozen=True)
class Variant:
    """A precision; for calibrated ones whether each segment has its own ranges, and whether inputs are smoothed.

    `least_psnr`: the limit for every image, in decibels.
    """

    precision: Precision
    own_ranges: bool = True
    smoothed: bool = False
    least_psnr: float | None = None


# Documents and kept results have these names.
VARIANTS = {
    "fp16": Variant(Precision.FP16, least_psnr=35.0),
    "int8": Variant(Precision.INT8, least_psnr=30.0),
    "int8-static": Variant(Precision.INT8_STATIC),
    "int8-static, one range": Variant(Precision.INT8_STATIC, own_ranges=False),
    "int8-static, smoothed": Variant(Precision.INT8_STATIC, smoothed=True),
    "fp8": Variant(Precision.FP8),
    "fp8, smoothed": Variant(Precision.FP8, smoothed=True),
}


@dataclass(frozen=True)
class Activations:
    """What entered the layers of each step's subnetwork: as it was, and divided by the factors of `smoothing`."""

    plain: Observations
    divided: Observations
    smoothing: FoundSmoothing

    def ranges(self, variant: Variant) -> ActivationRanges:
        """The ranges of a calibrated variant."""
        if not variant.own_ranges:
            return repeat(self.plain.together().choose(Method.MINMAX, IMAGES), len(self.plain.histograms))
        if not variant.smoothed:
            return self.plain.choose(Method.MINMAX, IMAGES)
        return self.divided.choose(Method.MINMAX, IMAGES).model_copy(update={"smoothing": self.smoothing.smoothing})


def observed(checkpoint: Checkpoint, config: ExportConfig, cfg_scale: float) -> Activations:
    """What enters the layers, over images that are not among the samples."""
    segments = planned_steps(checkpoint, config)[1].segments
    labels, scales = [index % CLASSES for index in range(IMAGES)], [cfg_scale]
    run = ObservedRun(segments, labels, scales, config.sampling(checkpoint.config), seed=SEED)
    smoothing = find_smoothing(checkpoint, run)
    plain, divided = (observe(checkpoint, run, each) for each in (None, smoothing.smoothing))
    return Activations(plain, divided, smoothing)


def picture(images: dict[str, np.ndarray]) -> bytes:
    """A row of digits for each precision, and below each lower one its difference from fp32, times a hundred."""
    reference = images[FP32][:CLASSES]
    rows = [(FP32, reference)]
    for name in ("int8", "int8-static", "fp8"):
        pixels = images[name][:CLASSES]
        rows += [(name, pixels), (f"{name} - fp32, 100x", 100 * (pixels - reference))]
    with drawing(8, 0.85 * len(rows)) as figure:
        axes = figure.subplots(len(rows), CLASSES)
        for line, (name, pixels) in zip(axes, rows, strict=True):
            for axis, image in zip(line, pixels, strict=True):
                axis.imshow(image[0], cmap="RdBu" if "100x" in name else "gray", vmin=-1, vmax=1)
                axis.set(xticks=[], yticks=[], frame_on=False)
            line[0].set_ylabel(name.replace(" - ", " -\n"), rotation=0, ha="right", va="center")
        return in_few_colours(png(figure))


def main() -> int:
    """Run, print, and tell by the exit code whether the limits hold."""
    parser = script_parser(__doc__, samples=100, steps=250, cfg_scale=1.5)
    parser.add_argument("--picture", type=Path, help="draw the digits side by side into this PNG file")
    options = parser.parse_args()
    checkpoint, cfg_scale = load_checkpoint(ASSETS / "dydit.safetensors"), options.cfg_scale
    plain = ExportConfig(steps=options.steps, plan=PlanKind.PER_STEP, max_batch=50)
    request = SampleRequest(labels=tuple(range(CLASSES)), num=options.samples, cfg_scale=cfg_scale)
    images, figures, tokens = {}, {}, {}
    activations = observed(checkpoint, plain, cfg_scale)
    print(activations.smoothing.text())
    with tempfile.TemporaryDirectory() as folder:
        for name, variant in {FP32: Variant(Precision.FP32), **VARIANTS}.items():
            ranges = activations.ranges(variant) if variant.precision.is_calibrated else None
            config = plain.model_copy(update={"precision": variant.precision, "activations": ranges})
            path = Path(folder) / name.replace(", ", "-").replace(" ", "-")
            bundle = export(checkpoint, path, config)
            images[name], labels = sampled_latents(bundle, path.with_suffix(".samples"), request)
            figures[name] = {**asdict(evaluate_digits(images[name], labels)), "bundle_bytes": bundle_bytes(bundle)}
            tokens[name] = trace_tokens(bundle, list(range(CLASSES)) * 2, cfg_scale).tokens
    limits, reference = {}, figures[FP32]
    for name, variant in VARIANTS.items():
        values = figures[name]
        decibels = psnr(np.clip(images[name], -1, 1), np.clip(images[FP32], -1, 1), PIXEL_SPAN)
        low, middle = np.percentile(decibels, (1, 50))
        values["psnr"] = {"min": float(decibels.min()), "percentile_1": float(low), "median": float(middle)}
        values["tokens_that_differ"] = float((tokens[name] != tokens[FP32]).mean())
        lost = reference["class_consistency"] - values["class_consistency"]
        ratio, least = values["frechet_distance"] / reference["frechet_distance"], values["psnr"]["min"]
        if variant.least_psnr:
            limits[f"{name}: {least:.1f} dB or more, at least {variant.least_psnr:g}"] = least >= variant.least_psnr
        if variant.precision is not Precision.FP8 and variant.own_ranges:
            limits[f"{name}: class consistency {100 * lost:.2f} points below fp32, at most 1"] = lost <= 0.01
            limits[f"{name}: Frechet distance {ratio:.4f} of fp32, at most 1.1"] = ratio <= 1.1
    median = {name: figures[name]["psnr"]["median"] for name in VARIANTS}
    gain = median["int8-static"] - median["int8-static, one range"]
    limits[f"int8-static: ranges of each segment are {gain:.1f} dB better than one for all"] = gain > 0
    for name, values in figures.items():
        print(name, values)
    if options.picture:
        write_atomic(options.picture, picture(images))
    settings = {"samples": options.samples, "steps": options.steps, "cfg_scale": cfg_scale}
    report = {"settings": settings, "migration": activations.smoothing.to_json(), "sets": figures}
    return finish(options, report, limits)


if __name__ == "__main__":
    sys.exit(main())
