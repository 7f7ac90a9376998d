"""`dydit bench --all`: every backend that runs a bundle here, and every precision, each with its error.

    bundle, other bundles, exports of the checkpoint in further precisions
      x backends of the device   -> contenders that take turns (`dydit.bench.bench`) -> table, bench.json, bench.png

The first bundle on the default backend is what the others are compared with. Errors are measured against the
checkpoint in PyTorch if it is given, otherwise against an fp32 bundle.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from dydit.bench.bench import REPORT, BenchConfig, bundle_names, bundle_side, checkpoint_side, run_bench
from dydit.bench.turns import Progress
from dydit.bundle.bundle import Bundle
from dydit.bundle.manifest import Manifest, PlanKind, Routing
from dydit.bundle.stored_weights import Precision
from dydit.diffusion.samplers import SamplerConfig
from dydit.errors import DyditError, one_line
from dydit.export.settings import ExportConfig
from dydit.extras import EXTRAS, backend_modules, install_command, missing
from dydit.files import new_folder, require_absent, write_json
from dydit.plot_style import write_picture
from dydit.reports.bench_report import BenchReport, NotRun, Side, SideKind
from dydit.reports.plots import errors_png
from dydit.runtime.backends.registry import BACKENDS, candidates, devices_of

EXPORTED = (Precision.FP32, Precision.FP16, Precision.BF16, Precision.INT8)
"""What a checkpoint is exported in. The other precisions need a calibration."""


def bench_everything(
    bundle: Path,
    versus: Sequence[Path],
    checkpoint: Path | None,
    config: BenchConfig,
    out: Path,
    progress: Progress | None = None,
    exporting: Progress | None = None,
) -> BenchReport:
    """Time bundles on all backends that run here, and a checkpoint in PyTorch and in the precisions that no bundle has;
    write bench.json and bench.png to the new folder `out`.

    `progress(done, total)` counts rounds, `exporting(done, total)` exports, which lie in `out` while they are needed.
    Raises as `run_bench`, `Bundle.open` and `load_checkpoint` do, and `OutputError` if `out` exists or cannot be
    written.
    """
    require_absent(out)
    given = [Bundle.open(path, verify=False) for path in (bundle, *versus)]
    with new_folder(out) as folder:
        exports: list[Bundle] = []
        left_out: list[NotRun] = []
        if checkpoint is not None:
            known = {each.manifest.precision for each in given}
            exports, left_out = _exports(given[0].manifest, checkpoint, known, config, folder / "bundles", exporting)
        bundles = [*given, *exports]
        sides = [
            bundle_side(each, f"{name} on {backend}", backend, optional=True)
            for name, each in zip(bundle_names(bundles), bundles, strict=True)
            for backend in candidates(each, config.device)
        ]
        if checkpoint is not None:
            sides.append(checkpoint_side(checkpoint))
        references = _references(sides, {str(each.path): each.manifest.precision for each in bundles})
        report = run_bench(sides, config, progress=progress, references=references)
        not_run = (*report.not_run, *left_out, *_not_installed(config.device))
        kept = [
            each.model_copy(update={"side": each.side.model_copy(update={"path": str(checkpoint)})})
            if Path(each.side.path).is_relative_to(folder)
            else each
            for each in report.sides
        ]
        report = report.model_copy(update={"sides": tuple(kept), "not_run": not_run})
        shutil.rmtree(folder / "bundles", ignore_errors=True)
        write_json(folder / REPORT, report.to_json())
        write_picture(errors_png, report, folder / "bench.png")
    return report


def _exports(
    manifest: Manifest,
    path: Path,
    known: set[Precision],
    config: BenchConfig,
    folder: Path,
    exporting: Progress | None,
) -> tuple[list[Bundle], list[NotRun]]:
    """Bundles of a checkpoint in further precisions, otherwise as a bundle is; and what cannot be exported."""
    from dydit.checkpoints.checkpoint import load_checkpoint
    from dydit.export.exporter import export

    wanted = [precision for precision in EXPORTED if precision not in known]
    if manifest.routing is Routing.CAPACITY:
        reason = "token slots come from a calibration: export it, and give it with --versus"
        return [], [NotRun(name=precision.value, reason=reason) for precision in wanted]
    checkpoint, run = load_checkpoint(path), config.sampling.over(manifest.sampling.config)
    bundles, left_out = [], []
    for done, precision in enumerate(wanted, start=1):
        try:
            bundles.append(export(checkpoint, folder / precision.value, _settings(manifest, run, precision)))
        except DyditError as error:
            left_out.append(NotRun(name=precision.value, reason=one_line(error)))
        if exporting:
            exporting(done, len(wanted))
    return bundles, left_out


def _settings(manifest: Manifest, run: SamplerConfig, precision: Precision) -> ExportConfig:
    """The settings of an export that is as a bundle is, but in another precision, and for other steps."""
    plan = manifest.plan.kind
    if plan is PlanKind.MEMORY_BUDGET:
        plan = PlanKind.MAX_SUBNETS
    elif plan is PlanKind.DYNAMIC_WIDTH and precision.in_8_bits:
        plan = PlanKind.PER_STEP
    return ExportConfig(
        **run.model_dump(),
        plan=plan,
        max_subnets=len(manifest.plan.segments),
        routing=manifest.routing or Routing.DYNAMIC,
        precision=precision,
        max_batch=manifest.max_batch,
        cfg_channels=manifest.sampling.cfg_channels,
        space=manifest.model.space,
    )


def _references(sides: Sequence[Side], precisions: dict[str, Precision]) -> list[str]:
    """The names of contenders, the best reference first: PyTorch, then fp32 bundles, then the others."""

    def rank(side: Side) -> int:
        return 0 if side.kind is not SideKind.BUNDLE else 1 if precisions[side.path] is Precision.FP32 else 2

    return [side.name for side in sorted(sides, key=rank)]


def _not_installed(device: str) -> list[NotRun]:
    absent = [name for name in BACKENDS if device in devices_of(name) and missing(backend_modules(name))]
    return [NotRun(name=name, reason=f"not installed: {install_command([EXTRAS[name]])}") for name in absent]
