"""Bundles against the other ways to run a DiT: same weights, same noise, one run in which all contenders take turns.

    python benchmarks/rivals/run.py [--json docs/benchmarks/rivals.json] [--plot docs/images/rivals.png]
    python benchmarks/rivals/run.py --images 1 --only "dydit per step" --only "pytorch masked" --only "dydit static"

It makes the figures for DiT-S/2 beside PyTorch, diffusers and onnxruntime (docs/benchmarks/rivals*.json), and those for
one image (docs/benchmarks/cpu_dits2*.json; of plans with --only "dydit sliding" and --only "dydit 16 merged").

Our bundles run on onnxruntime. The baselines are PyTorch, masked (as in the public DyDiT code), static and compiled;
diffusers; and onnxruntime on the graph that `torch.onnx.export` writes. The default is DiT-S/2 with random weights and
routers set to a FLOPs ratio near 0.5, four images with guidance, 25 of 250 steps. Limits, for that alone: the fp32
bundle reaches 0.92 of what the multiply-adds allow against the static bundle, int8 is 1.8 times as fast as fp32, and
the best bundle 5 times as fast as masked PyTorch. With one image: 0.85 of what the multiply-adds allow, and 2.4 times
as fast as masked PyTorch. Before anything is timed, one step of each contender is compared with PyTorch. Exit code 1:
a limit is missed, or an fp32 contender computes something else. A contender that this machine cannot run is listed with
the reason. Nothing else should run on the machine; the load average is in the report.
"""

from __future__ import annotations

import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dydit.bench.bench import BenchConfig, run_bench
from dydit.bench.scripts import (
    bench_table,
    compare,
    progress,
    random_checkpoint,
    script_parser,
    show_limits,
    static_checkpoint,
)
from dydit.bench.timing import Latents
from dydit.bundle.bundle import Bundle
from dydit.bundle.manifest import PlanKind, Routing
from dydit.bundle.stored_weights import Precision
from dydit.checkpoints.checkpoint import Checkpoint, load_checkpoint
from dydit.errors import ConfigError, DeviationError, DyditError
from dydit.export.exporter import export
from dydit.export.settings import ExportConfig
from dydit.files import write_atomic, write_json
from dydit.models.config import parse_config
from dydit.models.dit.config import preset
from dydit.reports.bench_report import BenchReport, Comparison, Reference, Side, SideKind
from dydit.reports.plots import ranking_png

FP32_TOLERANCE = 1e-4  # relative L2 of one step from PyTorch; rounding leaves 1e-6 (measured, DiT-S/2)
MASKED = "pytorch masked"
FP32, INT8, STATIC = "dydit per step", "dydit int8", "dydit static"
LIMITS = {1: (0.85, 2.4), 4: (0.92, 5)}
"""By the number of images: the share of what multiply-adds allow, and the speed-up over masked PyTorch."""


@dataclass(frozen=True)
class Baseline:
    """PyTorch as dydit runs it, or with `script` a file of this folder; on the static or the dynamic model."""

    name: str
    kind: SideKind
    script: str | None = None
    dynamic: bool = False


@dataclass(frozen=True)
class Ours:
    """A bundle of the static or the dynamic model."""

    name: str
    settings: ExportConfig
    dynamic: bool = True

    @property
    def tolerance(self) -> float | None:
        """Largest relative L2 from PyTorch; None: it is reported without a verdict."""
        return FP32_TOLERANCE if self.settings.precision is Precision.FP32 else None


BASELINES = (
    Baseline(MASKED, SideKind.TORCH_MASKED, dynamic=True),
    Baseline("pytorch static", SideKind.TORCH_STATIC),
    Baseline("torch.compile static", SideKind.SCRIPT, "pytorch_compiled.py"),
    Baseline("diffusers static", SideKind.SCRIPT, "diffusers_dit.py"),
    Baseline("onnxruntime static", SideKind.SCRIPT, "onnxruntime_export.py"),
)
# The plot draws the bound of the first dynamic one.
BUNDLES = (
    Ours(FP32, ExportConfig(plan=PlanKind.PER_STEP)),
    Ours("dydit sliding", ExportConfig(plan=PlanKind.DYNAMIC_WIDTH)),
    Ours("dydit 16 merged", ExportConfig(max_subnets=16)),
    Ours(INT8, ExportConfig(plan=PlanKind.PER_STEP, precision=Precision.INT8)),
    Ours(STATIC, ExportConfig(), dynamic=False),
)
NAMES = [each.name for each in (*BUNDLES, *BASELINES)]


def prepare(dynamic: Checkpoint, folder: Path, options: Namespace) -> tuple[list[Side], Bundle]:
    """The contenders, their bundles exported into `folder`; and a bundle that defines the run."""
    static, names = static_checkpoint(folder / "static.safetensors", dynamic), options.only or NAMES
    room = {"max_batch": max(options.images, ExportConfig().max_batch)}
    run_of = export(static, folder / "run", ExportConfig().model_copy(update=room))

    def reference(of_dynamic: bool, tolerance: float | None) -> Reference:
        kind = SideKind.TORCH_MASKED if of_dynamic else SideKind.TORCH_STATIC
        return Reference(kind=kind, checkpoint=str(dynamic.path), bar=tolerance)

    sides = []
    for ours in (each for each in BUNDLES if each.name in names):
        path, expected = folder / ours.name.replace(" ", "-"), reference(ours.dynamic, ours.tolerance)
        chosen = room | ({"routing": Routing(options.routing)} if ours.dynamic else {})
        export(dynamic if ours.dynamic else static, path, ours.settings.model_copy(update=chosen))
        packed = not options.unpacked
        sides.append(Side(name=ours.name, kind=SideKind.BUNDLE, path=str(path), packed=packed, reference=expected))
    for other in (each for each in BASELINES if each.name in names):
        checkpoint = str((dynamic if other.dynamic else static).path)
        expected = reference(other.dynamic, FP32_TOLERANCE)
        path = str(Path(__file__).with_name(other.script)) if other.script else checkpoint
        sides.append(Side(name=other.name, kind=other.kind, path=path, checkpoint=checkpoint, reference=expected))
    return sides, run_of


def bound(report: BenchReport) -> Comparison | None:
    """Our first dynamic bundle against the static one: one backend, one precision, so multiply-adds set a bound."""
    pairs = (compare(report, ours.name, STATIC) for ours in BUNDLES if ours.dynamic)
    return next((pair for pair in pairs if pair and pair.allowed is not None), None)


def limits(report: BenchReport) -> dict[str, bool]:
    """Which limits hold for DiT-S/2 and one or four images, of those whose contenders ran."""
    held, (of_bound, over_masked) = {}, LIMITS[report.batch]
    pair = compare(report, FP32, STATIC)
    if pair and pair.achieved is not None:
        text = f"{pair.achieved:.3f} of what multiply-adds allow, fp32 against static, at least {of_bound}"
        held[text] = pair.achieved >= of_bound
    if report.batch == 4 and (pair := compare(report, INT8, FP32)):
        held[f"int8 {pair.median:.2f} times as fast as fp32, at least 1.8"] = pair.median >= 1.8
    ours = [pair for each in BUNDLES if each.dynamic and (pair := compare(report, each.name, MASKED))]
    if ours:
        best = max(ours, key=lambda pair: pair.median)
        held[f"{best.side} {best.median:.2f} times as fast as {MASKED}, at least {over_masked}"] = (
            best.median >= over_masked
        )
    return held


def measure(options: Namespace) -> BenchReport:
    """Prepare and time all contenders."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.checkpoint:
            checkpoint = load_checkpoint(options.checkpoint)
        else:
            checkpoint = random_checkpoint(folder / "dynamic.safetensors", preset(options.preset), options.flops_ratio)
        if not checkpoint.config.dynamic:
            raise ConfigError(f"{options.checkpoint} has no routers; give a dynamic model")
        settings = {
            "labels": tuple(label % checkpoint.config.num_classes for label in range(options.images)),
            "steps_measured": options.steps,
            "repeats": options.repeats,
            "threads": options.threads,
            "latents": Latents.RUN if options.checkpoint else Latents.NOISE,  # runs of random weights lead nowhere
        }
        sides, run_of = prepare(checkpoint, folder, options)
        return run_bench(sides, parse_config(BenchConfig, settings), progress=progress("round"), run_of=run_of)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print and write."""
    parser = script_parser(
        __doc__,
        {"steps": "sampling steps of a round", "images": "images in a batch, of labels 0, 1, 2, ..."},
        images=4,
        steps=25,
        repeats=7,
        threads=2,
        preset="S/2",
        flops_ratio=0.5,
    )
    parser.add_argument("--plot", type=Path, help="draw milliseconds per step into this PNG file")
    parser.add_argument("--only", action="append", choices=NAMES, help="a contender to run; may be repeated  [all]")
    parser.add_argument("--unpacked", action="store_true", help="do not pack the weights of bundles")
    parser.add_argument("--routing", default="dynamic", choices=[each.value for each in Routing])
    parser.add_argument("--checkpoint", type=Path, help="a dynamic model to time in place of random weights")
    options = parser.parse_args(arguments)
    try:
        report = measure(options)
        model = str(options.checkpoint or f"DiT-{options.preset}, random weights")
        print(bench_table(report, model, MASKED, STATIC))
        judged = options.checkpoint is None and options.preset == "S/2" and options.images in LIMITS
        code = show_limits(limits(report)) if judged else 0
        if options.json:
            write_json(options.json, report.to_json())
        if options.plot:
            write_atomic(options.plot, ranking_png(report, bound(report)))
    except DyditError as error:
        print(error, file=sys.stderr)
        return 1 if isinstance(error, DeviationError) else 2
    return code


if __name__ == "__main__":
    sys.exit(main())
