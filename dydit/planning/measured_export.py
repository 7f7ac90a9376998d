"""Chooses the default plan, and exports with plans that are based on measurements on this machine."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from functools import partial
from pathlib import Path

from dydit.bundle.bundle import Bundle
from dydit.bundle.manifest import PlanKind, Routing
from dydit.bundle.measurements import Measured
from dydit.bundle.stored_weights import Precision
from dydit.checkpoints.checkpoint import Checkpoint
from dydit.errors import BackendError, UnsupportedError
from dydit.export.exporter import export
from dydit.export.settings import ExportConfig
from dydit.planning.profile import ProfileConfig, run_profile

StageProgress = Callable[[str, int, int], None]


class Cost(StrEnum):
    """What the plan of an export minimizes."""

    MACS = "macs"
    MEASURED = "measured"


def default_plan(routing: Routing, precision: Precision) -> PlanKind:
    """The plan of a dynamic model if the user chooses none.

    With dynamic routing: dynamic width, which was within 4 % of the fastest plan in our measurements, has one copy of
    the weights and loads nothing while it runs; for int8, which has no dynamic width, a subnetwork per step. Otherwise
    merged subnetworks: each is one engine to build, and each segment has token slots or scales to calibrate.
    """
    if routing is not Routing.DYNAMIC or precision.is_calibrated:
        return PlanKind.MAX_SUBNETS
    return PlanKind.PER_STEP if precision is Precision.INT8 else PlanKind.DYNAMIC_WIDTH


def export_measured(
    checkpoint: Checkpoint, out: Path, config: ExportConfig, cost: Cost, batch: int, progress: StageProgress
) -> tuple[Bundle, list[str]]:
    """Measure what the plan needs, on this machine with `batch` images at a time, then export to the new folder `out`.

    `progress(stage, done, total)` reports the stages "measure" and "export". Returns the bundle, and a note if memory
    could not be measured for a memory budget. Raises what `run_profile` and `export` raise.
    """
    measured: Measured | None = None
    notes: list[str] = []
    if cost is Cost.MEASURED or config.memory_budget is not None:
        progress("measure", 0, 1)
        measured, notes = _measure(checkpoint, config, cost, batch)
        progress("measure", 1, 1)
    return export(checkpoint, out, config, partial(progress, "export"), measured), notes


def _measure(checkpoint: Checkpoint, config: ExportConfig, cost: Cost, batch: int) -> tuple[Measured | None, list[str]]:
    times, memory = cost is Cost.MEASURED, config.memory_budget is not None
    note = "The memory budget was compared with the size of the weights, not with measured memory"
    if memory and config.calibration is not None:
        return None, [f"{note}, because the calibration did the same"]
    try:
        if not times and config.precision is Precision.BF16:
            raise BackendError("onnxruntime on the CPU does not run bf16")
        return run_profile(checkpoint, config, ProfileConfig(batch=batch), times, memory), []
    except (BackendError, UnsupportedError) as error:
        if times and isinstance(error, UnsupportedError):
            raise UnsupportedError(f"{error}; use --cost macs") from error
        if times:
            raise
        return None, [f"{note}: {error}"]
