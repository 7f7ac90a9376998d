"""Measures subnetworks on this machine: their times, which the planner minimizes, and their memory, for its budget.

Small exported bundles (`dydit.planning.profile_points`) run in a separate process
(`dydit.planning.profile_worker`). Least squares (`dydit.planning.profile_fit`) then fits two models that are linear in
the units of a subnetwork.
"""

from __future__ import annotations

import sys
import tempfile
from itertools import groupby
from pathlib import Path

from pydantic import Field

from dydit.bundle.measurements import Measured
from dydit.checkpoints.checkpoint import Checkpoint
from dydit.child_process import ChildProcess
from dydit.errors import ConfigError, UnsupportedError
from dydit.export.settings import ExportConfig
from dydit.extras import FITS, require
from dydit.planning.profile_fit import fit_residency, fit_times
from dydit.planning.profile_points import profile_points, token_share, write_profile_bundle
from dydit.planning.profile_worker import Findings, ProfileJob
from dydit.reports.results import Machine
from dydit.validation import Strict

WORKER = [sys.executable, "-m", "dydit.planning.profile_worker"]


class ProfileConfig(Strict):
    """How to measure: a `batch` of images with guidance, on `threads` cores (0: all).

    `token_share`: share of the tokens that enter the MLPs, 0..1; by default that of the model. `seconds`: the
    approximate duration of timing. `rounds`: the largest number of rounds.
    """

    backend: str = "onnxruntime"
    batch: int = Field(default=1, ge=1)
    threads: int = Field(default=0, ge=0)
    token_share: float | None = Field(default=None, gt=0, le=1)
    seconds: float = Field(default=5.0, gt=0)
    rounds: int = Field(default=41, ge=1)


def run_profile(
    checkpoint: Checkpoint, export: ExportConfig, config: ProfileConfig, times: bool = True, memory: bool = True
) -> Measured:
    """Measure what `export` would write for a checkpoint: `times` of a step, `memory` of loaded subnetworks.

    Raises `ConfigError` for a batch larger than the export's, and if times do not grow with width; `UnsupportedError`
    for a unit group of one unit, and for an architecture without synthetic models; `BackendError` if SciPy is missing,
    the backend cannot run such bundles, or memory cannot be measured.
    """
    require("measuring costs", FITS)
    model = checkpoint.config
    if config.batch > export.max_batch:
        raise ConfigError(f"cannot measure a batch of {config.batch}: the export allows at most {export.max_batch}")
    groups = model.units.blocks[0].groups
    if any(group.count < 2 for group in groups):
        raise UnsupportedError("a unit group with one unit has only one width, so nothing can be measured")
    share = (config.token_share or token_share(checkpoint)) if model.dynamic else 1.0
    threads = config.threads or Machine.here().cores
    points = profile_points([group.count for group in groups])
    with tempfile.TemporaryDirectory(prefix="dydit-profile-") as folder:
        bundles = []
        for depth, group in groupby(points, key=lambda point: point.depth):
            path = Path(folder) / f"depth-{depth}"
            write_profile_bundle(path, list(group), model, export, share)
            bundles.append(str(path))
        job = ProfileJob(
            bundles=tuple(bundles),
            threads=threads,
            memory=memory,
            timed=tuple(index for index, point in enumerate(points) if times and point.timed),
            **config.model_dump(include={"backend", "batch", "rounds", "seconds"}),
        )
        with ChildProcess(WORKER, "measures", threads) as process:
            findings = Findings.model_validate(process.ask(job.model_dump_json()))
    rows = 2 * config.batch
    residency, fitted = None, None
    if memory:
        residency = fit_residency(
            points,
            model,
            export.precision,
            findings.settled,
            findings.workspace,
            backend=config.backend,
            rows=rows,
        )
    if times:
        timed = [point for point in points if point.timed]
        fitted = fit_times(
            timed,
            [group.name for group in groups],
            findings.ms,
            backend=config.backend,
            rows=rows,
            threads=threads,
            token_share=share,
        )
    return Measured(times=fitted, residency=residency)
