"""The results of a quickstart as five lines, pictures and a report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dydit.bundle.bundle import Bundle
from dydit.bundle.manifest import Manifest
from dydit.files import write_atomic
from dydit.inspection.inspect import Inspection, inspect_bundle
from dydit.inspection.trace import Trace, decided_ratio, executed_ratio
from dydit.reports.bench_report import BUSY, BenchReport, bound_text, busy, repeats_text
from dydit.reports.html_report import ReportContent, write_report
from dydit.reports.inspection_facts import BundleFacts
from dydit.reports.parity_report import ParityReport
from dydit.reports.plots import latency_png, parity_png
from dydit.reports.plots_masks import tokens_png
from dydit.reports.plots_samples import samples_png
from dydit.reports.results import Line, Machine, Result
from dydit.reports.text import decisions_text, exponent, guidance_text
from dydit.words import counted

STATIC = "static DiT"
SHOWN_TIMESTEPS = (980, 750, 500, 250, 50, 0)
SHOWN_ROWS = 6


class Sampled(Result):
    """The sampling run: `batch` images at a time, and wall-clock `seconds` for the whole run with loading."""

    images: int
    batch: int
    cfg_scale: float
    seed: int
    seconds: float
    repeated_steps: int = 0

    @property
    def repeats_text(self) -> str:
        """The number of steps of a batch that ran again because tokens overflowed; empty if none did."""
        if not self.repeated_steps:
            return ""
        return f"; {counted(self.repeated_steps, 'step')} of a batch ran again at full capacity"


@dataclass(frozen=True)
class StageResults:
    """The results of all stages."""

    bundle: Bundle
    sampled: Sampled
    trace: Trace
    parity: ParityReport
    bench: BenchReport


def lines_of(results: StageResults, out: Path) -> tuple[Line, ...]:
    """The place of the results, images per second, speed-up, multiply-adds saved, largest deviation from PyTorch."""
    manifest, bench, sampled = results.bundle.manifest, results.bench, results.sampled
    pair, ours = bench.comparison(STATIC), bench.sides[0]
    executed = executed_ratio(manifest, results.trace.tokens)
    decided = decided_ratio(manifest, results.trace.tokens)
    threads = counted(bench.threads, "thread")
    repeats = f"; {repeats_text(ours)}" if ours.overflows else ""
    return (
        Line(
            label="results",
            value=str(out / "report.html"),
            note="the folder also has samples, pictures, bundles and data",
        ),
        Line(
            label="images per second",
            value=f"{sampled.images / sampled.seconds:.2f}",
            note=f"{_run_text(manifest)}, {guidance_text(sampled.cfg_scale)}, "
            f"batch {min(sampled.batch, sampled.images)}, {threads}{sampled.repeats_text}",
        ),
        Line(
            label="speed-up",
            value=f"{pair.median:.2f}\u00d7",
            note=f"{ours.median_ms:.1f} against {bench.side(STATIC).median_ms:.1f} ms a step for the static DiT; "
            f"{bound_text(pair)}{repeats}{f'; {BUSY}' if busy(bench) else ''}",
        ),
        Line(
            label="multiply-adds saved",
            value=f"{1 - executed:.1%}",
            note="in the blocks, measured over a run, with token routing"
            + (f"; a subnetwork for every mask would save {1 - decided:.1%}" if executed - decided > 0.01 else ""),
        ),
        _deviation(results.parity),
    )


def _run_text(manifest: Manifest) -> str:
    return counted(manifest.sampling.steps, f"{manifest.sampling.sampler.upper()} step")


def _deviation(parity: ParityReport) -> Line:
    """The largest deviation of all images, also of those with a flipped token, which the check itself leaves out."""
    run = parity.check("run")
    jumps = [image.value for image in run.flipped_images]
    known = [value for value in (run.worst, *jumps) if value is not None]
    note = f"largest relative L2 in {counted(parity.steps, 'step')}; {decisions_text(run.flips, run.decisions)}"
    if jumps:
        others = (
            "every image has a token that is routed differently, so no value was compared with the tolerance"
            if run.worst is None
            else f"{exponent(run.worst)} for images whose token decisions all agree"
        )
        note += f"; {others}"
    note += f" (tolerance {exponent(run.tolerance)})" if parity.ok else f"; PARITY FAILS: {parity.summary}"
    value = exponent(max(known)) if known and None not in jumps else "not finite"
    return Line(label="deviation from PyTorch", value=value, note=note)


def token_picture(manifest: Manifest, trace: Trace) -> bytes:
    """The first images of a trace, at timesteps spread over the run. Rows of the null class are not shown."""
    times = np.asarray(manifest.sampling.timesteps)
    steps = sorted({int(np.argmin(np.abs(times - timestep))) for timestep in SHOWN_TIMESTEPS})
    rows = min(SHOWN_ROWS, len(trace.latents))
    labels = [f"class {row % manifest.model.classes.count}" for row in range(rows)]
    tokens = trace.tokens[steps][:, :, :rows]
    return tokens_png(trace.latents[:rows], tokens, times[steps].tolist(), labels, share=trace.token_share)


def write_results(results: StageResults, lines: tuple[Line, ...], images: np.ndarray, out: Path) -> dict[str, Any]:
    """Write every picture and `report.html` into `out`; returns the data for `report.json`.

    `images` f32 [n, C, S, S] in [-1, 1]: those of the sampling run, in order.
    """
    manifest = results.bundle.manifest
    inspection = inspect_bundle(results.bundle.path)
    classes = manifest.model.classes.count
    pictures = {
        **inspection.pictures(),
        "samples.png": samples_png(images, [image % classes for image in range(len(images))]),
        "tokens.png": token_picture(manifest, results.trace),
        "parity.png": parity_png(results.parity),
        "latency.png": latency_png(results.bench),
    }
    for name, data in pictures.items():
        write_atomic(out / name, data)
    write_report(out / "report.html", _content(results, lines, inspection, pictures))
    return {
        "lines": [line.to_json() for line in lines],
        "sampled": results.sampled.to_json(),
        "flops_ratio": {
            "decided": decided_ratio(manifest, results.trace.tokens),
            "executed": executed_ratio(manifest, results.trace.tokens),
            "token_share": results.trace.token_share,
        },
        "parity": results.parity.to_json(),
        "bench": results.bench.to_json(),
        "bundle": inspection.to_json(),
    }


def _content(
    results: StageResults, lines: tuple[Line, ...], inspection: Inspection, pictures: dict[str, bytes]
) -> ReportContent:
    manifest, sampled = results.bundle.manifest, results.sampled
    where, *numbers = lines
    model = manifest.model
    return ReportContent(
        title="A dynamic diffusion transformer on handwritten digits",
        subtitle=(
            f"{model.summary}, fine-tuned to skip what a step "
            f"or a token does not need, then compiled to {counted(len(manifest.subnets), 'static subnetwork')} that "
            "ONNX Runtime executes."
        ),
        headlines=(*numbers, where),
        machine=Machine.here(),
        pictures={name.removesuffix(".png"): data for name, data in pictures.items()},
        samples_note=(
            f"{counted(sampled.images, 'image')} in {sampled.seconds:.1f} s: {_run_text(manifest)}, "
            f"{guidance_text(sampled.cfg_scale)}, seed {sampled.seed}. The images are not selected."
        ),
        parity=results.parity,
        bench=results.bench,
        bundle=inspection.facts if isinstance(inspection.facts, BundleFacts) else None,
        facts=(
            ("Bundle", str(results.bundle.path)),
            ("Checkpoint", f"SHA-256 {manifest.checkpoint_sha256}"),
            ("Exported with", ", ".join(f"{name} {number}" for name, number in sorted(manifest.tools.items()))),
        ),
    )
