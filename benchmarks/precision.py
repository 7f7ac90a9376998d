"""The digits model in lower precision: do the pictures stay?

    python benchmarks/precision.py [--json docs/benchmarks/precision.json] [--picture docs/images/precision.png]

The shipped model with a subnetwork for each step, on onnxruntime, in fp32 and in the forms of `FORMS`: the same noise,
labels and 250 DDPM steps with guidance. Ranges of the calibrated forms are those of 32 images of another seed, by their
largest values, of each segment its own or one for all; migrated forms first move range into weights, where these images
say that it helps. Of each image the peak signal-to-noise ratio against fp32 (pixels in [-1, 1]), of each set class
consistency and Frechet distance, and the share of token decisions, over a whole run of 20 images, that are not those of
fp32. Bars: 30 dB for every image in int8, 35 dB in fp16; in these and int8-static class consistency at most a point
below fp32 and Frechet distance at most 1.1 times its; and ranges of its own for each segment are better than one for
all, in the median of decibels. Exit code 1 where one is missed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from dydit.bundle.bundle import Bundle
from dydit.bundle.manifest import PlanKind
from dydit.bundle.stored_weights import Precision
from dydit.calibrate.activation_ranges import ActivationRanges, Observations, repeat
from dydit.calibrate.observers import ObservedRun, observe
from dydit.calibrate.precision_search import PIXEL_SPAN, psnr
from dydit.calibrate.range_methods import Method
from dydit.calibrate.smoothing_search import FoundSmoothing, find_smoothing
from dydit.checkpoints.checkpoint import Checkpoint, load_checkpoint
from dydit.diffusion.schedule import Schedule
from dydit.export.exporter import export
from dydit.export.settings import ExportConfig
from dydit.files import write_atomic, write_json
from dydit.inspection.trace import trace_tokens
from dydit.planning.costs import macs_costs
from dydit.planning.masks import freeze_masks
from dydit.planning.plan import per_step_plan
from dydit.quickstart.quickstart import ASSETS
from dydit.reports.results import Machine
from dydit.runtime.bulk.run import OutputOptions, sample_to_folder
from dydit.runtime.request import SampleRequest
from dydit.training.evaluate import evaluate_digits

CLASSES, SEED = 10, 1000
FP32 = "fp32"


@dataclass(frozen=True)
class Form:
    """A precision; of calibrated ones whether each segment has its own ranges, and whether inputs are migrated; the
    least decibels of an image.
    """

    precision: Precision
    own_ranges: bool = True
    migrated: bool = False
    bar: float | None = None


FORMS = {
    "fp16": Form(Precision.FP16, bar=35.0),
    "int8": Form(Precision.INT8, bar=30.0),
    "int8-static": Form(Precision.INT8_STATIC),
    "int8-static, one range": Form(Precision.INT8_STATIC, own_ranges=False),
    "int8-static, migrated": Form(Precision.INT8_STATIC, migrated=True),
    "fp8": Form(Precision.FP8),
    "fp8, migrated": Form(Precision.FP8, migrated=True),
}


def sampled(bundle: Bundle, out: Path, samples: int, cfg_scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Pixels f32 [n, 1, 16, 16] and labels [n] of a bundle's images."""

    def tick(done: int, total: int) -> None:
        print(f"\r{bundle.path.name}: {done}/{total} steps", end="", file=sys.stderr)

    request = SampleRequest(labels=tuple(range(CLASSES)), num=samples, cfg_scale=cfg_scale)
    file = out.with_suffix(".npz")
    sample_to_folder(bundle, request, out, OutputOptions(latents_out=file), progress=tick)
    print(file=sys.stderr)
    with np.load(file) as arrays:
        return arrays["latents"], arrays["labels"]


@dataclass(frozen=True)
class Watched:
    """What entered the layers of each step's subnetwork, as it was, and divided by what `found` says."""

    plain: Observations
    divided: Observations
    found: FoundSmoothing

    def ranges(self, form: Form) -> ActivationRanges:
        """The ranges of a calibrated form."""
        seen = self.divided if form.migrated else self.plain
        if not form.own_ranges:
            return repeat(seen.together().choose(Method.MINMAX, 32), len(seen.histograms))
        chosen = seen.choose(Method.MINMAX, 32)
        return chosen.model_copy(update={"smoothing": self.found.smoothing}) if form.migrated else chosen


def watched(checkpoint: Checkpoint, steps: int, cfg_scale: float) -> Watched:
    """What enters layers, over images that are not among the samples."""
    masks = freeze_masks(checkpoint.width_routers(), Schedule.respaced(steps).timesteps[::-1])
    plan = per_step_plan(masks, macs_costs(checkpoint.config))
    run = ObservedRun(plan.segments, [index % CLASSES for index in range(32)], [cfg_scale], steps, seed=SEED)
    found = find_smoothing(checkpoint, run)
    plain, divided = (observe(checkpoint, run, each) for each in (None, found.smoothing))
    return Watched(plain, divided, found)


def summary(decibels: np.ndarray) -> dict[str, float]:
    """The least, a low and the middle value."""
    return {
        "min": float(decibels.min()),
        "percentile_1": float(np.percentile(decibels, 1)),
        "median": float(np.median(decibels)),
    }


def picture(images: dict[str, np.ndarray]) -> bytes:
    """A row of digits for each precision, and below each lower one a hundred times what it differs by."""
    import io

    from matplotlib.figure import Figure

    reference = images[FP32][:CLASSES]
    rows = [(FP32, reference)]
    for name, pixels in images.items():
        if name in ("int8", "int8-static", "fp8"):
            rows += [(name, pixels[:CLASSES]), (f"{name} - fp32, 100x", 100 * (pixels[:CLASSES] - reference))]
    figure = Figure(figsize=(8, 0.85 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), CLASSES)
    for line, (name, pixels) in zip(axes, rows, strict=True):
        colours = "gray" if "100x" not in name else "RdBu"
        for axis, image in zip(line, pixels, strict=True):
            axis.imshow(image[0], cmap=colours, vmin=-1, vmax=1)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(name.replace(" - ", " -\n"), rotation=0, ha="right", va="center")
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    return data.getvalue()


def main() -> int:
    """Run, print, and say by the exit code whether the bars hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--cfg-scale", type=float, default=1.5)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--picture", type=Path, help="file for the digits side by side")
    given = parser.parse_args()
    checkpoint = load_checkpoint(ASSETS / "dydit.safetensors")
    images, figures, tokens = {}, {}, {}
    seen = watched(checkpoint, given.steps, given.cfg_scale)
    print(seen.found.text())
    with tempfile.TemporaryDirectory() as folder:
        for name, form in {FP32: Form(Precision.FP32), **FORMS}.items():
            config = ExportConfig(
                steps=given.steps,
                plan=PlanKind.PER_STEP,
                precision=form.precision,
                activations=seen.ranges(form) if form.precision.is_calibrated else None,
                max_batch=50,
            )
            place = Path(folder) / name.replace(", ", "-").replace(" ", "-")
            bundle = export(checkpoint, place, config)
            size = sum(entry.bytes for entry in bundle.manifest.files.values())
            images[name], labels = sampled(bundle, place.with_suffix(".samples"), given.samples, given.cfg_scale)
            figures[name] = {**asdict(evaluate_digits(images[name], labels)), "bundle_bytes": size}
            tokens[name] = trace_tokens(bundle, list(range(CLASSES)) * 2, given.cfg_scale).tokens
    held, reference = {}, figures[FP32]
    for name, form in FORMS.items():
        own = figures[name]
        own["psnr"] = summary(psnr(np.clip(images[name], -1, 1), np.clip(images[FP32], -1, 1), PIXEL_SPAN))
        own["tokens_that_differ"] = float((tokens[name] != tokens[FP32]).mean())
        lost = reference["class_consistency"] - own["class_consistency"]
        ratio = own["frechet_distance"] / reference["frechet_distance"]
        if form.bar:
            held[f"{name}: {own['psnr']['min']:.1f} dB or more, at least {form.bar:g}"] = own["psnr"]["min"] >= form.bar
        if form.precision is not Precision.FP8 and form.own_ranges:
            held[f"{name}: class consistency {100 * lost:.2f} points below fp32, at most 1"] = lost <= 0.01
            held[f"{name}: Frechet distance {ratio:.4f} of fp32, at most 1.1"] = ratio <= 1.1
    median = {name: figures[name]["psnr"]["median"] for name in FORMS}
    gain = median["int8-static"] - median["int8-static, one range"]
    held[f"int8-static: ranges of each segment are {gain:.1f} dB better than one for all"] = gain > 0
    for name, values in figures.items():
        print(name, values)
    for title, holds in held.items():
        print("  holds " if holds else "  MISSED", title)
    if given.picture:
        write_atomic(given.picture, picture(images))
    if given.json:
        settings = {"samples": given.samples, "steps": given.steps, "cfg_scale": given.cfg_scale}
        found = {"migration": seen.found.to_json(), "sets": figures, "bars": held}
        write_json(given.json, {"settings": settings, **found, "machine": Machine.here().to_json()})
    return 0 if all(held.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
