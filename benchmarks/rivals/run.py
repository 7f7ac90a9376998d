"""dydit against what else one could run: the same weights, the same noise, one run in which all sides take turns.

    python benchmarks/rivals/run.py [--json docs/benchmarks/rivals.json] [--plot docs/benchmarks/rivals.png]

The rivals are the other files of this folder: PyTorch (masked as in the public DyDiT code, static, and compiled),
diffusers, and onnxruntime on what `torch.onnx.export` writes. Ours are the bundles of `BUNDLES`, on onnxruntime. By
default DiT-S/2 with random weights and routers set to a FLOPs ratio near 0.5; four images with guidance, 25 of 250
steps. Bars, for that alone: the fp32 bundle reaches 0.92 of what multiply-adds allow against the static bundle, int8 is
1.8 times as fast as fp32, and the best bundle 5 times as fast as masked PyTorch. Before anything is timed, a step of
each side is compared with the reference model. Exit code 1 says that a bar is missed, or that an fp32 side computes
something else. What this machine cannot run is listed with the reason.
Run it on a machine that does nothing else; the load average is in the report.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dydit.bench.bench import BenchConfig, compare_sides, run_bench
from dydit.bench.timing import Latents
from dydit.bundle.bundle import Bundle
from dydit.bundle.manifest import PlanKind
from dydit.bundle.stored_weights import Precision
from dydit.checkpoints.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from dydit.checkpoints.fit import expected_shapes
from dydit.errors import ConfigError, DeviationError, DyditError
from dydit.export.exporter import export
from dydit.export.settings import ExportConfig
from dydit.files import write_atomic, write_json
from dydit.models.config import parse_config
from dydit.models.dit.config import preset
from dydit.models.synthetic import synthetic_model
from dydit.reports.bench_report import BenchReport, Comparison, Reference, Side, SideKind, repeats_text
from dydit.reports.plots import ranking_png
from dydit.reports.text import aligned, exponent

FP32_BAR = 1e-4  # relative L2 of one step from the reference; rounding leaves 1e-6 (measured, DiT-S/2)
MASKED, EXPORTED = "pytorch masked", "onnxruntime static"
FP32, INT8, STATIC = "dydit per step", "dydit int8", "dydit static"


@dataclass(frozen=True)
class Rival:
    """A script of this folder, which runs the static model or the dynamic one."""

    name: str
    script: str
    dynamic: bool = False


@dataclass(frozen=True)
class Ours:
    """A bundle of the static model or the dynamic one; its weights packed, as `dydit sample` does in long runs."""

    name: str
    settings: ExportConfig
    dynamic: bool = True

    @property
    def bar(self) -> float | None:
        """How far it may be from the reference; None: that is shown, and not judged."""
        return FP32_BAR if self.settings.precision is Precision.FP32 else None


RIVALS = (
    Rival(MASKED, "pytorch_masked.py", dynamic=True),
    Rival("pytorch static", "pytorch_static.py"),
    Rival("torch.compile static", "torch_compiled.py"),
    Rival("diffusers static", "diffusers_dit.py"),
    Rival(EXPORTED, "onnxruntime_export.py"),
)
# The first dynamic one is what the plot's bound is drawn for.
BUNDLES = (
    Ours(FP32, ExportConfig(plan=PlanKind.PER_STEP)),
    Ours("dydit sliding", ExportConfig(plan=PlanKind.SLIDING)),
    Ours(INT8, ExportConfig(plan=PlanKind.PER_STEP, precision=Precision.INT8)),
    Ours(STATIC, ExportConfig(), dynamic=False),
)
NAMES = [side.name for side in (*BUNDLES, *RIVALS)]


def random_checkpoint(name: str, flops_ratio: float, folder: Path) -> Path:
    """Write a dynamic model of a preset's sizes with random weights."""
    config, path = preset(name), folder / "dynamic.safetensors"
    save_checkpoint(path, synthetic_model(config, seed=0, flops_ratio=flops_ratio), config)
    return path


def static_form(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """The same weights without the routers, as a checkpoint in `folder`."""
    config, path = checkpoint.config.without_routers(), folder / "static.safetensors"
    save_checkpoint(path, {name: checkpoint.state[name] for name in expected_shapes(config)}, config)
    return load_checkpoint(path)


def prepare(dynamic: Checkpoint, folder: Path, names: Sequence[str], images: int) -> tuple[list[Side], Bundle]:
    """The sides of those names, with their bundles exported into `folder`; and a bundle that says what a run is."""
    static = static_form(dynamic, folder)
    room = {"max_batch": max(images, ExportConfig().max_batch)}
    run_of = export(static, folder / "run", ExportConfig().model_copy(update=room))

    checked = {
        True: Reference(kind=SideKind.TORCH_MASKED, checkpoint=str(dynamic.path), bar=FP32_BAR),
        False: Reference(kind=SideKind.TORCH_STATIC, checkpoint=str(dynamic.path), bar=FP32_BAR),
    }
    sides = []
    for ours in (each for each in BUNDLES if each.name in names):
        path = folder / ours.name.replace(" ", "-")
        export(dynamic if ours.dynamic else static, path, ours.settings.model_copy(update=room))
        reference = checked[ours.dynamic].model_copy(update={"bar": ours.bar})
        sides.append(Side(name=ours.name, kind=SideKind.BUNDLE, path=str(path), packed=True, reference=reference))
    for rival in (each for each in RIVALS if each.name in names):
        path = Path(__file__).with_name(rival.script)
        loads, reference = str((dynamic if rival.dynamic else static).path), checked[rival.dynamic]
        side = Side(name=rival.name, kind=SideKind.SCRIPT, path=str(path), checkpoint=loads, reference=reference)
        sides.append(side)
    return sides, run_of


def against(report: BenchReport, name: str, other: str) -> Comparison | None:
    """A side against another one, where both ran."""
    sides = {side.side.name: side for side in report.sides}
    return compare_sides(sides[name], sides[other]) if name in sides and other in sides else None


def bound(report: BenchReport) -> Comparison | None:
    """What the plot draws the multiply-adds' bound from: our first dynamic bundle against the static one, of which
    multiply-adds set a bound as both run on one backend in one precision."""
    pairs = (against(report, ours.name, STATIC) for ours in BUNDLES if ours.dynamic)
    return next((pair for pair in pairs if pair and pair.allowed is not None), None)


def table(report: BenchReport, model: str) -> str:
    """The sides, slowest first, for a terminal."""
    head = ("side", "ms/step", "min", "max", "GMACs", "img/s*", "peak MB", "load s", "speed-up", "of bound", "rel. L2")
    rows: list[Sequence[str]] = [head]
    for side in sorted(report.sides, key=lambda side: -side.median_ms):
        masked, static = (against(report, side.side.name, other) for other in (MASKED, STATIC))
        rows.append(
            (
                side.side.name,
                *(f"{ms:.1f}" for ms in (side.median_ms, side.min_ms, side.max_ms)),
                f"{side.macs / 1e9:.3g}",
                f"{side.images_per_second:.3g}",
                f"{side.peak_bytes / 1e6:.0f}",
                f"{side.load_seconds:.1f}",
                f"{masked.median:.2f}" if masked else "-",
                f"{static.achieved:.2f}" if static and static.achieved and side.side.name != STATIC else "-",
                "-" if side.relative_l2 is None else exponent(side.relative_l2),
            )
        )
    guidance = "no guidance" if report.cfg_scale == 1 else f"guidance {report.cfg_scale:g}"
    lines = [
        f"{model}, batch {report.batch}, {guidance}, threads: {report.threads}",
        f"{report.machine.cpu}, load average {report.load_average[0]:.1f}, then {report.load_average[1]:.1f}",
        f"steps measured: {len(report.steps_measured)} of {report.steps}, {report.repeats} times after {report.warmup}",
        "",
        aligned(rows, right=range(1, len(head))),
        *(f"{each.name}: not run: {each.reason}" for each in report.not_run),
        "",
        f"* of all {report.steps} steps, extrapolated from those measured; loading apart",
        "load s: for the steps measured; with what a rival does once before: compiling, exporting, converting",
        f"speed-up: times as fast as {MASKED}, the median over rounds",
        f"of bound: how much of what its fewer multiply-adds allow against {STATIC} a side achieves",
        *(f"{side.side.name}: {repeats_text(side)}" for side in report.sides if side.overflows),
        "rel. L2: of the model's part of one step, from the reference, PyTorch masked or static",
    ]
    return "\n".join(lines)


def verdicts(report: BenchReport) -> dict[str, bool]:
    """Which bars hold: those of DiT-S/2, four images, where the sides that they are about ran."""
    held = {}
    pair = against(report, FP32, STATIC)
    if pair and pair.achieved is not None:
        held[f"{pair.achieved:.3f} of what multiply-adds allow, fp32 against static, at least 0.92"] = (
            pair.achieved >= 0.92
        )
    if pair := against(report, INT8, FP32):
        held[f"int8 {pair.median:.2f} times as fast as fp32, at least 1.8"] = pair.median >= 1.8
    ours = [pair for each in BUNDLES if each.dynamic and (pair := against(report, each.name, MASKED))]
    if ours:
        best = max(ours, key=lambda pair: pair.median)
        held[f"{best.side} {best.median:.2f} times as fast as {MASKED}, at least 5"] = best.median >= 5
    return held


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the raw report here")
    parser.add_argument("--plot", type=Path, help="draw milliseconds a step here, as a PNG")
    parser.add_argument("--only", action="append", choices=NAMES, help="a side to run, of all; may be repeated")
    parser.add_argument("--images", type=int, default=4, help="in a batch, of labels 0, 1, 2, ...")
    parser.add_argument("--steps", type=int, default=25, help="sampling steps of a round")
    parser.add_argument("--repeats", type=int, default=7, help="rounds that count")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--preset", default="S/2", help="sizes of the model")
    parser.add_argument("--flops-ratio", type=float, default=0.5)
    parser.add_argument("--checkpoint", type=Path, help="a DyDiT of yours, in place of random weights")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace) -> BenchReport:
    """Prepare and time all sides."""
    with tempfile.TemporaryDirectory() as name:
        path = options.checkpoint or random_checkpoint(options.preset, options.flops_ratio, Path(name))
        checkpoint = load_checkpoint(path)
        if not checkpoint.config.dynamic:
            raise ConfigError(f"{path} has no routers; give a dynamic model")
        settings = {
            "labels": tuple(label % checkpoint.config.num_classes for label in range(options.images)),
            "steps_measured": options.steps,
            "repeats": options.repeats,
            "threads": options.threads,
            "latents": Latents.RUN if options.checkpoint else Latents.NOISE,  # runs of random weights lead nowhere
        }
        config = parse_config(BenchConfig, settings)
        sides, run_of = prepare(checkpoint, Path(name), options.only or NAMES, options.images)

        def tick(done: int, total: int) -> None:
            print(f"\rround {done}/{total}", end="", file=sys.stderr, flush=True)

        report = run_bench(sides, config, progress=tick, run_of=run_of)
        print("\r", end="", file=sys.stderr)
        return report


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print and write."""
    options = parse(arguments)
    try:
        report = measure(options)
        print(table(report, str(options.checkpoint or f"DiT-{options.preset}, random weights")))
        judged = options.checkpoint is None and (options.preset, options.images) == ("S/2", 4)
        held = verdicts(report) if judged else {}
        for title, holds in held.items():
            print("  holds " if holds else "  MISSED", title)
        if options.json:
            write_json(options.json, report.to_json())
        if options.plot:
            write_atomic(options.plot, ranking_png(report, bound(report)))
    except DyditError as error:
        print(error, file=sys.stderr)
        return 1 if isinstance(error, DeviationError) else 2
    return 0 if all(held.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
