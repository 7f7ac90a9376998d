"""Contenders of a benchmark that take turns: each is tried first, then all do one round after another.

    jobs -> what the references compute -> each contender starts, warms up, is compared -> rounds -> facts

What a reference computes is known before the first contender starts, so that no two large models are in memory.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dydit.bench.contender import Contender, Facts, Record, started, warmed
from dydit.bench.timing import Job
from dydit.errors import BackendError, DeviationError, UnavailableError, one_line
from dydit.parity.comparison import relative_l2
from dydit.reports.bench_report import NotRun, Side, SideKind
from dydit.reports.results import measured
from dydit.reports.text import exponent

SETTLE_SECONDS = 0.05  # pause for the threads of the contender before
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Schedule:
    """Rounds of a process that do not count, rounds that count, and whether each of these has a process of its own."""

    warmup: int
    repeats: int
    apart: bool = False


def take_turns(
    jobs: Sequence[Job], schedule: Schedule, kept: Path | None, with_arrays: bool, progress: Progress
) -> tuple[list[Running], list[NotRun], float]:
    """Do all rounds. Returns the contenders that run here, the others, and the load average after the rounds."""
    expected, most = _expected(jobs), len(jobs) * (1 + schedule.repeats)
    with ExitStack() as stack:
        running, not_run = _start(jobs, expected, schedule, kept, stack, lambda done: progress(done, most))
        done, total = len(jobs), len(jobs) + len(running) * schedule.repeats
        for number in range(schedule.repeats):
            is_last = number == schedule.repeats - 1
            for each in running:
                done += 1
                each.take(number, facts=is_last and schedule.apart, with_arrays=with_arrays)
                progress(done, total)
        load_after = os.getloadavg()[0]
        if not schedule.apart:  # only now, so that all rounds have the same work before them
            for each in running:
                each.take(schedule.repeats - 1, facts=True, with_arrays=with_arrays)
    return running, not_run, load_after


@dataclass
class Running:
    """A contender that runs here. `warmup`: rounds of a new process that do not count. `staying`: its process; None if
    each round has a new one.
    """

    job: Job
    record: Record
    warmup: int
    deviation: float | None
    staying: Contender | None
    facts: Facts | None = None

    def process(self) -> AbstractContextManager[Contender]:
        """Its process, which stays, or else ends with the block."""
        return warmed(self.job, self.record, self.warmup) if self.staying is None else nullcontext(self.staying)

    def take(self, number: int, facts: bool, with_arrays: bool) -> None:
        """Time round `number`, unless it is kept; with `facts`, ask for these afterwards."""
        is_kept = number < len(self.record.counted)
        if is_kept and not facts:
            return
        with self.process() as contender:
            if not is_kept:
                time.sleep(SETTLE_SECONDS)
                self.record.add(contender.round())
            if facts:
                self.facts = Facts.of(contender, with_arrays)


def _expected(jobs: Sequence[Job]) -> dict[tuple[SideKind, str], np.ndarray]:
    """What the references of all contenders compute, by kind and checkpoint; each has a process for this step."""
    expected: dict[tuple[SideKind, str], np.ndarray] = {}
    for job in jobs:
        reference = job.side.reference
        if reference is not None and (reference.kind, reference.checkpoint) not in expected:
            side = Side(name=f"reference, {reference.kind}", kind=reference.kind, path=reference.checkpoint)
            with started(job.model_copy(update={"side": side})) as process:
                expected[reference.kind, reference.checkpoint] = process.check()
    return expected


def _start(
    jobs: Sequence[Job],
    expected: Mapping[tuple[SideKind, str], np.ndarray],
    schedule: Schedule,
    kept: Path | None,
    stack: ExitStack,
    show: Callable[[int], None],
) -> tuple[list[Running], list[NotRun]]:
    """The contenders that run here, and the others. Unless they run apart, their processes stay until `stack` ends.

    Each does its first rounds by itself, as its users see it. `show(done)` is called after each.
    """
    running: list[Running] = []
    not_run: list[NotRun] = []
    for done, job in enumerate(jobs, start=1):
        side, record = job.side, Record(job.side.name, kept)
        own = stack.enter_context(ExitStack())  # closed earlier where the process is not to stay
        try:
            contender = own.enter_context(warmed(job, record, schedule.warmup))
            deviation = deviation_of(contender, expected)
        except BackendError as error:
            own.close()
            if isinstance(error, DeviationError) or not (side.optional or isinstance(error, UnavailableError)):
                raise
            not_run.append(NotRun(name=side.name, reason=one_line(error).removeprefix(f"{side.name}: ")))
        else:
            if schedule.apart:
                own.close()
            staying = None if schedule.apart else contender
            running.append(Running(job, record, schedule.warmup, deviation, staying))
        show(done)
    if not running:
        raise UnavailableError(
            f"no configuration runs on this machine: {'; '.join(f'{each.name}: {each.reason}' for each in not_run)}"
        )
    return running, not_run


def deviation_of(contender: Contender, expected: Mapping[tuple[SideKind, str], np.ndarray]) -> float | None:
    """The relative L2 of a contender from its reference, for the worst image. `expected`: of `_expected`."""
    side = contender.job.side
    reference = side.reference
    if reference is None:
        return None
    value = float(relative_l2(contender.check(), expected[reference.kind, reference.checkpoint]).max())
    if measured(value) is None or (reference.bar is not None and value > reference.bar):
        expected_value = "a finite number" if reference.bar is None else f"at most {exponent(reference.bar)}"
        actual = exponent(value) if np.isfinite(value) else "not finite"
        raise DeviationError(
            f"{side.name} does not compute what PyTorch ({reference.kind}) computes: the relative L2 of one step is "
            f"{actual}, expected {expected_value}; nothing was timed"
        )
    return value
