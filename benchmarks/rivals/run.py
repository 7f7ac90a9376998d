"""Bundles against the other ways to run a DiT: same weights, same noise, one run in which all contenders take turns.

    python benchmarks/rivals/run.py --work DIR [--json docs/benchmarks/rivals.json] [--plot docs/images/rivals.png]
    python benchmarks/rivals/run.py --images 1 --only "dydit per step" --only "pytorch masked" --only "dydit static"
    python benchmarks/rivals/run.py --preset XL/2 --images 1 --steps 3 --repeats 3 --apart

It makes the figures for DiT-S/2 beside PyTorch, diffusers, onnxruntime and OpenVINO (docs/benchmarks/rivals*.json),
and those for one image (docs/benchmarks/cpu_dits2*.json; of plans with --only "dydit dynamic width" and --only "dydit
16 merged").

Contenders are dense or dynamic. Dense are PyTorch, masked (as in the public DyDiT code), static, compiled, and in bf16;
diffusers; onnxruntime and OpenVINO on the graph that `torch.onnx.export` writes, OpenVINO also in 8 bits by NNCF; and
our bundles of the static model, which say what a backend and a precision do by themselves. Dynamic are our bundles of
the dynamic model on the same backends. The default is DiT-S/2 with random weights and routers set to a FLOPs ratio
near 0.5, four images with guidance, 6 of 250 steps.

Limits, for DiT-S/2: with four images, the fastest dynamic contender is 1.5 times as fast as the fastest dense one of
any precision, and reaches 0.9 of what the multiply-adds allow against the static bundle of its backend and precision. A
subnetwork per step in fp32 on onnxruntime reaches 0.92 of that (with one image 0.85), and in int8 is 1.8 times as fast
as in fp32. The best bundle is 5 times as fast as masked PyTorch, or 2.4 times where int8 does not run or with one
image. For DiT-XL/2 with one image: 1.6 times as fast as the fastest dense contender, and 0.9 of what multiply-adds
allow. Contenders whose step deviates by more than 5e-2 do not count as fastest.

Before anything is timed, one step of each contender is compared with PyTorch in fp32. Exit code 1: a limit is missed,
or an fp32 contender computes something else. A contender that this machine cannot run is listed with the reason: bf16
where the CPU has no instructions for it (--emulated runs it all the same), int8 of onnxruntime without VNNI, packages
that are missing. NNCF is not a part of dydit's environment: `pip install nncf`.

With --work the bundles, graphs and rounds of every contender are kept, and an interrupted run continues; DiT-XL/2 takes
21 GB there with seven contenders. Nothing else should run on the machine; the load average is in the report. Compiled
code is cached in --work, too, never elsewhere.
"""

from __future__ import annotations

import contextlib
import os
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from diffusers_dit import save_for_diffusers
from exported import export as export_graph
from exported import made_apart
from openvino_export import quantize

from dydit.bench.bench import BenchConfig, job_of, run_bench, spread_steps
from dydit.bench.scripts import (
    bench_table,
    bound_of,
    compare,
    progress,
    random_checkpoint,
    require_settings,
    script_parser,
    settings_of,
    show_limits,
    static_checkpoint,
    work_folder,
)
from dydit.bench.timing import Latents
from dydit.bundle.bundle import Bundle
from dydit.bundle.manifest import PlanKind, Routing
from dydit.bundle.stored_weights import Precision
from dydit.checkpoints.checkpoint import Checkpoint, load_checkpoint
from dydit.diffusion.guidance import is_guided
from dydit.errors import ConfigError, DeviationError, DyditError, UnavailableError
from dydit.export.exporter import export
from dydit.export.settings import ExportConfig
from dydit.files import write_atomic, write_json
from dydit.models.config import parse_config
from dydit.models.dit.config import preset
from dydit.plot_style import in_few_colours
from dydit.reports.bench_report import BenchReport, NotRun, Reference, Side, SideKind, SideResult
from dydit.reports.plots import ranking_png
from dydit.runtime.backends.instruction_sets import instruction_sets, multiplies

FP32_TOLERANCE = 1e-4  # relative L2 of one step from PyTorch; rounding leaves 1e-6 (measured, DiT-S/2)
LOWER_TOLERANCE = (
    5e-2  # that of `dydit parity` for a step in bf16 and int8: what is less exact does not count as fastest
)
MASKED = "pytorch masked"
FP32, INT8, STATIC = "dydit per step", "dydit int8", "dydit static"
OLDER_LIMITS = {1: (0.85, 2.4, 2.4), 4: (0.92, 2.4, 5)}
"""By the number of images: the share of what multiply-adds allow in fp32, and the speed-up over masked PyTorch, in fp32
and with int8 on onnxruntime."""
FASTEST_LIMITS = {("S/2", 4): 1.5, ("XL/2", 1): 1.6}
"""By model and number of images: the speed-up of the fastest dynamic contender over the fastest dense one."""
SHARE_LIMIT = 0.9


class Files(StrEnum):
    """What a dense contender loads."""

    CHECKPOINT = "static.safetensors"
    GRAPH = "graph"
    QUANTIZED = "quantized"
    DIFFUSERS = "diffusers"


@dataclass(frozen=True)
class Baseline:
    """PyTorch as dydit runs it, or with `script` a file of this folder; on the static or the dynamic model."""

    name: str
    script: str | None = None
    variant: str = ""
    files: Files = Files.CHECKPOINT
    precision: Precision = Precision.FP32
    masked: bool = False
    dense = True


@dataclass(frozen=True)
class Ours:
    """A bundle of the static model, which is `dense`, or of the dynamic one."""

    name: str
    settings: ExportConfig
    backend: str = "onnxruntime"
    dense: bool = False

    @property
    def precision(self) -> Precision:
        """That of its products."""
        return self.settings.precision


def _ours(name: str, precision: Precision = Precision.FP32, backend: str = "onnxruntime", dense: bool = False) -> Ours:
    plan = {} if dense else {"plan": PlanKind.PER_STEP}
    return Ours(name, ExportConfig(precision=precision, **plan), backend, dense)


BASELINES = (
    Baseline(MASKED, masked=True),
    Baseline("pytorch static"),
    Baseline("pytorch static bf16", "pytorch_bf16.py", precision=Precision.BF16),
    Baseline("torch.compile static", "pytorch_compiled.py"),
    Baseline("torch.compile frozen", "pytorch_compiled.py", "frozen"),
    Baseline("torch.compile frozen bf16", "pytorch_compiled.py", "frozen-bf16", precision=Precision.BF16),
    Baseline("diffusers static", "diffusers_dit.py", files=Files.DIFFUSERS),
    Baseline("onnxruntime static", "onnxruntime_export.py", files=Files.GRAPH),
    Baseline("openvino static", "openvino_export.py", "fp32", Files.GRAPH),
    Baseline("openvino static bf16", "openvino_export.py", "bf16", Files.GRAPH, Precision.BF16),
    Baseline("openvino static int8 (NNCF)", "openvino_export.py", "int8", Files.QUANTIZED, Precision.INT8),
)
BUNDLES = (
    _ours(FP32),
    Ours("dydit dynamic width", ExportConfig(plan=PlanKind.DYNAMIC_WIDTH)),
    Ours("dydit 16 merged", ExportConfig(max_subnets=16)),
    _ours(INT8, Precision.INT8),
    _ours("dydit openvino", backend="openvino"),
    Ours("dydit openvino dynamic width", ExportConfig(plan=PlanKind.DYNAMIC_WIDTH), "openvino"),
    _ours("dydit openvino bf16", Precision.BF16, "openvino"),
    Ours(
        "dydit openvino dynamic width bf16",
        ExportConfig(plan=PlanKind.DYNAMIC_WIDTH, precision=Precision.BF16),
        "openvino",
    ),
    _ours("dydit openvino int8", Precision.INT8, "openvino"),
    _ours("dydit pytorch", backend="torch"),
    _ours("dydit pytorch bf16", Precision.BF16, "torch"),
    _ours(STATIC, dense=True),
    _ours("dydit static int8", Precision.INT8, dense=True),
    _ours("dydit static openvino", backend="openvino", dense=True),
    _ours("dydit static openvino bf16", Precision.BF16, "openvino", dense=True),
    _ours("dydit static openvino int8", Precision.INT8, "openvino", dense=True),
    _ours("dydit static pytorch", backend="torch", dense=True),
    _ours("dydit static pytorch bf16", Precision.BF16, "torch", dense=True),
)
ALL = (*BUNDLES, *BASELINES)
NAMES = [each.name for each in ALL]
DENSE = [each.name for each in ALL if each.dense]
DYNAMIC = [each.name for each in ALL if not each.dense]
STATICS = [each.name for each in BUNDLES if each.dense]


class Preparation:
    """Makes what contenders load, in `folder`, or finds it there; `not_run`: those for which that is impossible."""

    def __init__(self, folder: Path, options: Namespace):
        self.folder, self.options = folder, options
        self.not_run: list[NotRun] = []
        path = folder / "dynamic.safetensors"
        if options.checkpoint:
            self.dynamic = load_checkpoint(options.checkpoint)
        elif path.exists():
            self.dynamic = load_checkpoint(path)
        else:
            self.dynamic = random_checkpoint(path, preset(options.preset), options.flops_ratio)
        if not self.dynamic.config.dynamic:
            raise ConfigError(f"{options.checkpoint} has no routers; give a dynamic model")
        path = folder / Files.CHECKPOINT
        self.static = load_checkpoint(path) if path.exists() else static_checkpoint(path, self.dynamic)
        self.run_of = self._bundle("run", self.static, ExportConfig())
        self.config = self._config()

    def sides(self) -> list[Side]:
        """The chosen contenders that can be prepared."""
        chosen = [each for each in ALL if each.name in (self.options.only or NAMES)]
        sides = []
        for each in chosen:
            try:
                self._require_precision(each.precision)
                side = self._ours(each) if isinstance(each, Ours) else self._baseline(each)
                sides.append(side.model_copy(update={"optional": True}))
            except UnavailableError as error:
                self.not_run.append(NotRun(name=each.name, reason=str(error)))
        return sides

    def _config(self) -> BenchConfig:
        options, model = self.options, self.dynamic.config
        settings = {
            "labels": tuple(label % model.num_classes for label in range(options.images)),
            "steps_measured": options.steps,
            "repeats": options.repeats,
            "threads": options.threads,
            "latents": Latents.RUN if options.checkpoint else Latents.NOISE,  # runs of random weights lead nowhere
            "cfg_scale": model.guidance_scale(None),
            "apart": options.apart,
        }
        return parse_config(BenchConfig, settings)

    def _require_precision(self, precision: Precision) -> None:
        if precision is Precision.BF16 and not (multiplies(precision.dtype) or self.options.emulated):
            here = ", ".join(instruction_sets()) or "none that are known"
            raise UnavailableError(
                f"this CPU has no instructions for bf16 (it has {here}); --emulated runs it nonetheless"
            )

    def _bundle(self, name: str, checkpoint: Checkpoint, settings: ExportConfig) -> Bundle:
        path, room = self.folder / name, {"max_batch": max(self.options.images, settings.max_batch)}
        if not path.exists():
            export(checkpoint, path, settings.model_copy(update=room))
        return Bundle.open(path)

    def _ours(self, ours: Ours) -> Side:
        settings, checkpoint = ours.settings, self.static if ours.dense else self.dynamic
        if not ours.dense:
            settings = settings.model_copy(update={"routing": Routing(self.options.routing)})
        bundle = self._bundle(f"{'static' if ours.dense else settings.plan}-{ours.precision}", checkpoint, settings)
        packed = not self.options.unpacked and ours.backend != "openvino"
        where = {"kind": SideKind.BUNDLE, "path": str(bundle.path), "backend": ours.backend, "packed": packed}
        return Side(name=ours.name, **where, reference=self._reference(not ours.dense, ours.precision))

    def _baseline(self, baseline: Baseline) -> Side:
        reference = self._reference(baseline.masked, baseline.precision)
        if baseline.script is None:
            kind = SideKind.TORCH_MASKED if baseline.masked else SideKind.TORCH_STATIC
            checkpoint = self.dynamic if baseline.masked else self.static
            return Side(name=baseline.name, kind=kind, path=str(checkpoint.path), reference=reference)
        return Side(
            name=baseline.name,
            kind=SideKind.SCRIPT,
            path=str(Path(__file__).with_name(baseline.script)),
            checkpoint=str(self._files(baseline.files)),
            variant=baseline.variant,
            reference=reference,
        )

    def _reference(self, masked: bool, precision: Precision) -> Reference:
        kind = SideKind.TORCH_MASKED if masked else SideKind.TORCH_STATIC
        tolerance = FP32_TOLERANCE if precision is Precision.FP32 else None
        return Reference(kind=kind, checkpoint=str(self.dynamic.path), bar=tolerance)

    def _files(self, files: Files) -> Path:
        folder, static = self.folder / files, self.static.path
        if files is Files.CHECKPOINT:
            return static
        if files is Files.DIFFUSERS:
            return made_apart(folder, save_for_diffusers, static)
        graph = made_apart(self.folder / Files.GRAPH, export_graph, static, self._rows)
        if files is Files.GRAPH:
            return graph
        side = Side(name="calibration", kind=SideKind.SCRIPT, path="", checkpoint=str(graph), variant="fp32")
        manifest = self.run_of.manifest
        steps = spread_steps(manifest.sampling.steps, self.config.steps_measured)
        job = job_of(side, self.config, manifest.model, manifest.sampling, steps)
        return made_apart(folder, quantize, job.model_dump_json())

    @property
    def _rows(self) -> int:
        """Rows of a step's batch."""
        return self.options.images * (2 if is_guided(self.config.cfg_scale or 1) else 1)


def is_exact(side: SideResult) -> bool:
    """Whether a contender is exact enough to count as fastest."""
    return side.relative_l2 is None or side.relative_l2 <= LOWER_TOLERANCE


def fastest(report: BenchReport, dense: bool) -> SideResult | None:
    """The fastest dense or dynamic contender of any precision, of those that are exact enough."""
    sides = [side for side in report.sides if (side.side.name in DENSE) is dense and is_exact(side)]
    return min(sides, key=lambda side: side.median_ms, default=None)


def verdict(report: BenchReport) -> str:
    """The fastest dynamic contender against the fastest dense one, and those that are too inexact to count."""
    ours, theirs = fastest(report, False), fastest(report, True)
    pair = compare(report, ours.side.name, theirs.side.name) if ours and theirs else None
    lines = []
    if pair:
        others = f"times as fast as {pair.other}, the fastest dense one ({pair.min:.2f} to {pair.max:.2f})"
        lines.append(f"{pair.side}, the fastest dynamic one, is {pair.median:.2f} {others}")
    for side in report.sides:
        if not is_exact(side):
            lines.append(f"{side.side.name} deviates by more than {LOWER_TOLERANCE} and does not count as fastest")
    return "\n".join(lines)


def limits(report: BenchReport, model: str) -> dict[str, bool]:
    """Which limits hold for a model, of those whose contenders ran."""
    held, ours, theirs = {}, fastest(report, False), fastest(report, True)
    least = FASTEST_LIMITS.get((model, report.batch))
    if least and ours and theirs and (pair := compare(report, ours.side.name, theirs.side.name)):
        text = f"{pair.side} {pair.median:.2f} times as fast as {pair.other}, the fastest dense one, at least {least}"
        held[text] = pair.median >= least
        if bound := bound_of(report, ours.side.name, STATICS):
            text = f"{pair.side} reaches {bound.achieved:.3f} of what multiply-adds allow against {bound.other}"
            held[f"{text}, at least {SHARE_LIMIT}"] = bound.achieved >= SHARE_LIMIT
    if model != "S/2" or report.batch not in OLDER_LIMITS:
        return held
    of_bound, in_fp32, in_int8 = OLDER_LIMITS[report.batch]
    over_masked = in_fp32 if any(each.name == INT8 for each in report.not_run) else in_int8
    pair = compare(report, FP32, STATIC)
    if pair and pair.achieved is not None:
        text = f"{pair.achieved:.3f} of what multiply-adds allow, fp32 against static, at least {of_bound}"
        held[text] = pair.achieved >= of_bound
    if report.batch == 4 and (pair := compare(report, INT8, FP32)):
        held[f"int8 {pair.median:.2f} times as fast as fp32, at least 1.8"] = pair.median >= 1.8
    if ours and (pair := compare(report, ours.side.name, MASKED)):
        text = f"{pair.side} {pair.median:.2f} times as fast as {MASKED}, at least {over_masked}"
        held[text] = pair.median >= over_masked
    return held


@contextlib.contextmanager
def caches_in(folder: Path) -> Iterator[None]:
    """What contenders compile is cached in a folder, which is empty at first: so all of them start cold."""
    names = {"DYDIT_OPENVINO_CACHE": folder / "openvino", "TORCHINDUCTOR_CACHE_DIR": folder / "inductor"}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update({name: str(path) for name, path in names.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def measure(options: Namespace) -> BenchReport:
    """Prepare and time all contenders."""
    with work_folder(options.work) as folder:
        require_settings(folder, {name: str(value) for name, value in settings_of(options).items()})
        prepared = Preparation(folder, options)
        sides = prepared.sides()
        with caches_in(folder):
            report = run_bench(
                sides,
                prepared.config,
                progress=progress("round"),
                run_of=prepared.run_of,
                kept=folder / "rounds",
            )
        return report.model_copy(update={"not_run": (*prepared.not_run, *report.not_run)})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print and write."""
    parser = script_parser(
        __doc__,
        {"steps": "sampling steps of a round", "images": "images in a batch, of labels 0, 1, 2, ..."},
        images=4,
        steps=6,
        repeats=5,
        threads=2,
        preset="S/2",
        flops_ratio=0.5,
    )
    parser.add_argument("--plot", type=Path, help="draw milliseconds per step into this PNG file")
    parser.add_argument("--only", action="append", choices=NAMES, help="a contender to run; may be repeated  [all]")
    parser.add_argument("--work", type=Path, help="keep what is made and measured here, and continue")
    parser.add_argument("--emulated", action="store_true", help="run bf16 on a CPU without bf16, too")
    parser.add_argument("--apart", action="store_true", help="one contender in memory at a time, for large models")
    parser.add_argument("--unpacked", action="store_true", help="do not pack the weights of bundles")
    parser.add_argument("--routing", default="dynamic", choices=[each.value for each in Routing])
    parser.add_argument("--checkpoint", type=Path, help="a dynamic model to time in place of random weights")
    options = parser.parse_args(arguments)
    try:
        report = measure(options)
        model = str(options.checkpoint or f"DiT-{options.preset}, random weights")
        ours, theirs = fastest(report, False), fastest(report, True)
        print(bench_table(report, model, DENSE, STATICS, theirs), verdict(report), sep="\n\n")
        code = show_limits(limits(report, "" if options.checkpoint else options.preset))
        if options.json:
            write_json(options.json, report.to_json())
        if options.plot:
            pair = compare(report, ours.side.name, theirs.side.name) if ours and theirs else None
            picture = ranking_png(report, pair, {"dense": DENSE, "dynamic": DYNAMIC})
            write_atomic(options.plot, in_few_colours(picture))
    except DyditError as error:
        print(error, file=sys.stderr)
        return 1 if isinstance(error, DeviationError) else 2
    return code


if __name__ == "__main__":
    sys.exit(main())
