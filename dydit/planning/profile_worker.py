"""The process that a profile measures in: `python -m dydit.planning.profile_worker`. No PyTorch.

It answers one `ProfileJob` with one `Findings`. The process is new, so its memory is that of what it loads.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from pydantic import Field

from dydit.bench.timing import peak_bytes, settled_bytes
from dydit.bundle.bundle import Bundle
from dydit.child_process import serve
from dydit.diffusion.noise import INITIAL_DRAW, image_noise
from dydit.diffusion.steps import State
from dydit.errors import BackendError
from dydit.runtime.backends.base import Arrays, BackendOptions, Subnet
from dydit.runtime.backends.registry import open_backend
from dydit.runtime.loop import StepRunner
from dydit.runtime.resident import ResidentSubnets
from dydit.runtime.text_files import with_texts_for
from dydit.validation import Strict

GUIDANCE = 4.0
FEWEST_ROUNDS = 5
SHORT_MS = 5.0
Step = Callable[[], object]


class ProfileJob(Strict):
    """What to measure on the segments of bundles, which are numbered in order, with `threads` threads.

    `memory`: whether to load all segments in turn and measure memory. `timed`: the segments to time. `seconds`: the
    approximate duration of timing, which has at least 5 rounds and at most `rounds`.
    """

    bundles: tuple[str, ...] = Field(min_length=1)
    backend: str
    batch: int
    threads: int
    memory: bool
    timed: tuple[int, ...]
    rounds: int
    seconds: float


class Findings(Strict):
    """The measurements: memory of each segment, and times of each segment in `timed`.

    `settled`: bytes of the process after the segment's subnetwork was loaded and run, with the earlier subnetworks
    still loaded. `workspace`: the most bytes that a step takes while it runs, or leaves behind. `ms`: milliseconds of
    a step, by round.
    """

    settled: tuple[int, ...] = ()
    workspace: int = 0
    ms: tuple[tuple[float, ...], ...] = ()


class _Bundle:
    """Loads one of the bundles and runs its segments on fixed inputs."""

    def __init__(self, path: str, job: ProfileJob):
        # The parent process has just written it, so it needs no verification.
        bundle = with_texts_for(Bundle.open(path, verify=False), None, 1)
        self._segments, model = bundle.manifest.plan.segments, bundle.manifest.model
        backend = open_backend(job.backend, bundle, BackendOptions(threads=job.threads))
        backend.expect(job.batch)
        self._subnets = ResidentSubnets(backend)
        self._labels = np.zeros(job.batch, np.int64)
        runner = StepRunner(backend, self._subnets, self._labels, GUIDANCE)
        shape = (model.in_channels, model.input_size, model.input_size)
        self._x = image_noise(0, range(job.batch), INITIAL_DRAW, shape)
        self._feeds: list[Arrays] = [
            runner.feeds(s.first, State(self._x), self._x, self._labels) for s in self._segments
        ]

    def steps(self) -> list[Step]:
        """A function for each segment that runs its first step; it loads the subnetwork if it is not loaded."""

        def make(index: int, feeds: Arrays) -> Step:
            def step() -> object:
                subnet: Subnet = self._subnets.get(index)
                return subnet.step(feeds)

            return step

        return [make(s.subnet, feeds) for s, feeds in zip(self._segments, self._feeds, strict=True)]


def profile(job: ProfileJob) -> Findings:
    """Measure memory and times."""
    steps = [step for path in job.bundles for step in _Bundle(path, job).steps()]
    settled, workspace = _memory(steps) if job.memory else ((), 0)
    return Findings(settled=settled, workspace=workspace, ms=_times([steps[index] for index in job.timed], job))


def _memory(steps: list[Step]) -> tuple[tuple[int, ...], int]:
    settled, workspace = [], 0
    for step in steps:
        step()
        step()
        left = _settled()
        _give_back_heap()
        settled.append(_settled())
        workspace = max(workspace, left - settled[-1], _peak_of(step))
    return tuple(settled), workspace


def _settled() -> int:
    size = settled_bytes()
    if size is None:
        raise BackendError("memory cannot be measured on this system: it has no /proc/self/smaps_rollup")
    return size


def _give_back_heap() -> None:
    """Let the C library return freed memory to the system. Otherwise the next loaded subnetwork would reuse it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _peak_of(step: Step) -> int:
    """The most bytes by which the resident size rises while a step runs; 0 if that cannot be measured."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return 0
    before = peak_bytes()
    step()
    return peak_bytes() - before


def _times(steps: list[Step], job: ProfileJob) -> tuple[tuple[float, ...], ...]:
    """Time all steps in rounds. In each round they run once, in random order, so that other load slows all of them.

    A short step runs once more just before it is timed, because in a run most steps follow one on the same subnetwork.
    """
    first = [_timed(step) for step in steps for _ in range(2)][1::2]
    ms: list[list[float]] = [[] for _ in steps]
    order, until = np.random.default_rng(0), time.perf_counter() + job.seconds
    for turn in range(job.rounds):
        if turn >= FEWEST_ROUNDS and time.perf_counter() > until:
            break
        for index in order.permutation(len(steps)):
            if first[index] < SHORT_MS:
                steps[index]()
            ms[index].append(_timed(steps[index]))
    return tuple(map(tuple, ms))


def _timed(step: Step) -> float:
    start = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - start)


def main() -> int:
    """Serve one job."""
    return serve(lambda line: profile(ProfileJob.model_validate_json(line)).model_dump(mode="json"))


if __name__ == "__main__":
    sys.exit(main())
