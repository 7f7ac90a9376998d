"""The digits model in lower precision: do the pictures stay?

    python benchmarks/precision.py [--json docs/benchmarks/precision.json] [--picture docs/images/precision.png]

The shipped model with a subnetwork for each step, in fp32, fp16 and int8, on onnxruntime: the same noise, labels and
250 DDPM steps with guidance. Of each image the peak signal-to-noise ratio against fp32 (pixels in [-1, 1]), of each set
class consistency and Fréchet distance, and the share of token decisions, over a whole run of 20 images, that are not
those of fp32. Bars: 30 dB for every image in int8 and 35 dB in fp16; class consistency at most a point
below fp32; Fréchet distance at most 1.1 times its. Exit code 1 where one is missed. About fifteen minutes on two cores.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np

from dydit.bundle.bundle import Bundle
from dydit.bundle.manifest import PlanKind
from dydit.bundle.stored import Precision
from dydit.export.exporter import ExportConfig, export
from dydit.files import write_atomic, write_json
from dydit.models.checkpoint import load_checkpoint
from dydit.runtime.bulk import OutputOptions, sample_to_folder
from dydit.runtime.request import SampleRequest
from dydit.training.evaluate import evaluate_digits
from dydit.verify.quickstart import ASSETS
from dydit.verify.results import Machine
from dydit.verify.trace import trace_tokens

CLASSES = 10
LOWER = {Precision.FP16: 35.0, Precision.INT8: 30.0}
PEAK = 2.0  # pixels are in [-1, 1]


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


def psnr(images: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Decibels of each image [n]; equal images count as 200 dB."""
    a, b = (np.clip(each, -1, 1).reshape(len(each), -1).astype(np.float64) for each in (images, reference))
    error = np.maximum(((a - b) ** 2).mean(1), PEAK**2 * 1e-20)
    return np.asarray(10 * np.log10(PEAK**2 / error))


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

    reference = images[Precision.FP32.value][:CLASSES]
    rows = [("fp32", reference)]
    for name, pixels in images.items():
        if name != Precision.FP32.value:
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
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--cfg-scale", type=float, default=1.5)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--picture", type=Path, help="file for the digits side by side")
    given = parser.parse_args()
    checkpoint = load_checkpoint(ASSETS / "dydit.safetensors")
    images, figures, tokens = {}, {}, {}
    with tempfile.TemporaryDirectory() as name:
        for precision in (Precision.FP32, *LOWER):
            config = ExportConfig(steps=given.steps, plan=PlanKind.PER_STEP, precision=precision, max_batch=50)
            bundle = export(checkpoint, Path(name) / precision.value, config)
            size = sum(entry.bytes for entry in bundle.manifest.files.values())
            out = Path(name) / f"{precision.value}-samples"
            images[precision.value], labels = sampled(bundle, out, given.samples, given.cfg_scale)
            figures[precision.value] = {
                **asdict(evaluate_digits(images[precision.value], labels)),
                "bundle_bytes": size,
            }
            tokens[precision.value] = trace_tokens(bundle, list(range(CLASSES)) * 2, given.cfg_scale).tokens
    exact, held = Precision.FP32.value, {}
    for precision, bar in LOWER.items():
        own, reference = figures[precision.value], figures[exact]
        own["psnr"] = summary(psnr(images[precision.value], images[exact]))
        own["tokens_that_differ"] = float((tokens[precision.value] != tokens[exact]).mean())
        lost = reference["class_consistency"] - own["class_consistency"]
        ratio = own["frechet_distance"] / reference["frechet_distance"]
        held[f"{precision}: {own['psnr']['min']:.1f} dB or more, at least {bar:g}"] = own["psnr"]["min"] >= bar
        held[f"{precision}: class consistency {100 * lost:.2f} points below fp32, at most 1"] = lost <= 0.01
        held[f"{precision}: Frechet distance {ratio:.4f} of fp32, at most 1.1"] = ratio <= 1.1
    for name, values in figures.items():
        print(name, values)
    for title, holds in held.items():
        print("  holds " if holds else "  MISSED", title)
    if given.picture:
        write_atomic(given.picture, picture(images))
    if given.json:
        settings = {"samples": given.samples, "steps": given.steps, "cfg_scale": given.cfg_scale}
        write_json(
            given.json, {"settings": settings, "sets": figures, "bars": held, "machine": Machine.here().to_json()}
        )
    return 0 if all(held.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
