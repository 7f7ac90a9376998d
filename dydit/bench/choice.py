"""Which backend runs a bundle fastest on this machine: a short trial of a few steps of the run to come.

    packages, device, engines -> candidates -> a kept choice, or a trial -> the fastest that agrees with the default

In a trial, each candidate runs in a process of its own (`dydit.bench.contender`). They take turns on a few steps,
spread over the run, with its batch, guidance, threads and device; the first round is not counted. The result is kept
for the next run (`dydit.bench.choice_cache`).

- A run that is too short to be worth a trial takes the default, ONNX Runtime. Whether it is too short is estimated from
  its multiply-adds, and then from the first steps of the default.
- A candidate that takes twice the time of the fastest is dropped after its first counted round.
- A candidate is dropped if its steps differ from those of the default by more than `dydit parity` allows.

Precision is that of the bundle and never part of the choice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime

import numpy as np

from dydit.bench.bench import BenchConfig, job_of, spread_steps
from dydit.bench.choice_cache import ChoiceCache, KeptChoice
from dydit.bench.contender import Contender, started
from dydit.bench.timing import Job
from dydit.bundle.bundle import Bundle
from dydit.diffusion.guidance import is_guided
from dydit.errors import DyditError, one_line
from dydit.parity.comparison import relative_l2
from dydit.parity.tolerances import tolerances
from dydit.reports.bench_report import Side, SideKind
from dydit.reports.text import exponent
from dydit.runtime.backends.base import BackendOptions
from dydit.runtime.backends.cores import thread_count
from dydit.runtime.backends.registry import BACKENDS, candidates, devices_of, open_backend
from dydit.runtime.loop import packing_pays

DEFAULT = BACKENDS[0]
STEPS = 4
"""Sampling steps of a round."""
ROUNDS = 3
"""Counted rounds."""
SLOW = 2.0
"""A candidate that takes so many times the fastest one's time is not timed further."""
MARGIN = 0.95
"""The share of the default's time that another backend has to stay below: a difference below noise changes nothing."""
WORTH = 10
"""A run has to take so many times the time of a trial."""
SHORTEST = 60.0
"""Seconds. A shorter run, by its multiply-adds, is not worth a trial."""
RATE = 2e10
"""Multiply-adds a second of a core, of which `SHORTEST` is estimated: fp32 with AVX2, at half of its peak."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Workload:
    """The run to come. `labels`: of its largest batch, one for each image; `batches`: how many this process samples.

    `cfg_scale`, `seed`: as in `SampleRequest`. `options`: of the backend to choose.
    """

    labels: Sequence[int]
    batches: int = 1
    cfg_scale: float = 1.0
    seed: int = 0
    options: BackendOptions = field(default_factory=BackendOptions)


@dataclass(frozen=True)
class Choice:
    """The backend to use.

    `ms`: milliseconds a step of those that were timed, empty without a trial. `day`: when an earlier run measured it,
    ISO 8601; None: now. `is_kept`: whether the next run finds it. `because`: why the default was not taken, where
    nothing was timed. `deviating`: how far the steps of a dropped backend are from those of the default, by name, in
    words; `failed`: why a backend does not run, by name.
    """

    backend: str
    ms: Mapping[str, float] = field(default_factory=dict)
    day: str | None = None
    is_kept: bool = False
    because: str = ""
    deviating: Mapping[str, str] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)

    @property
    def line(self) -> str:
        """The choice in one line; empty where the default was taken without a trial."""
        if not self.ms:
            return f"backend: {self.backend}, because {self.because}" if self.because else ""
        others = ", ".join(f"{name} {_ms(value)}" for name, value in self.ms.items() if name != self.backend)
        when = f"as measured on {self.day}" if self.day else "measured now" + ", kept for the next run" * self.is_kept
        return (
            f"backend: {self.backend}, {_ms(self.ms[self.backend])} ms a step{f' ({others})' if others else ''}; {when}"
        )


def fastest_backend(
    bundle: Bundle, work: Workload, cache: ChoiceCache | None = None, progress: Progress | None = None
) -> Choice:
    """The backend that is fastest here for a run of a bundle; the default where that is not worth a trial.

    `cache`: by default that of this user. `progress(done, total)` counts rounds of a trial. A candidate that does not
    run is left out. If none runs, the choice is the first of them, which says why when it is opened.
    """
    names = candidates(bundle, work.options.device)
    if len(names) < 2 or is_short(bundle, work):
        return _first_that_opens(bundle, names, work.options)
    cache = cache or ChoiceCache.of_user()
    guided, threads = is_guided(work.cfg_scale), thread_count(work.options.threads)
    subject = cache.subject(
        bundle.manifest, names, work.options.device, threads, len(work.labels), guided, work.batches == 1
    )
    if (kept := cache.read(subject)) is not None:
        return Choice(kept.backend, kept.ms, kept.day)
    trial = Trial(bundle, names, work, progress)
    trial.run()
    if not trial.ms:
        return _first_that_opens(bundle, names, work.options)
    backend, ms = fastest(trial.ms), dict(trial.ms)
    day = datetime.now(UTC).date().isoformat()
    is_kept = cache.write(KeptChoice(of=subject, backend=backend, ms=ms, day=day))
    return Choice(backend, ms, None, is_kept, deviating=trial.deviating, failed=trial.failed)


def is_short(bundle: Bundle, work: Workload) -> bool:
    """Whether the multiply-adds of a run take too little time to be worth a trial."""
    rows = len(work.labels) * work.batches * (1 + is_guided(work.cfg_scale))
    return bundle.manifest.plan.macs * rows < SHORTEST * RATE * thread_count(work.options.threads)


def fastest(ms: Mapping[str, float]) -> str:
    """The backend with the least time; the first one, if it is nearly as fast."""
    first, best = next(iter(ms)), min(ms, key=lambda name: ms[name])
    return best if ms[best] < MARGIN * ms[first] else first


def _first_that_opens(bundle: Bundle, names: Sequence[str], options: BackendOptions) -> Choice:
    """The first backend that takes the bundle, and why it is not the default."""
    failed = {}
    if DEFAULT not in names:
        known = options.device in devices_of(DEFAULT)
        failed[DEFAULT] = f"{DEFAULT} " + ("is not installed" if known else f"does not run on {options.device}")
    for name in names:
        try:
            open_backend(name, bundle, options).close()
        except DyditError as error:
            failed[name] = one_line(error)
        else:
            return Choice(name, because=next(iter(failed.values()), "").partition(";")[0], failed=failed)
    return Choice(names[0] if names else DEFAULT)


class Trial:
    """Times the candidates of a run. `ms`: medians by name, in the order of the candidates; empty if not worth it."""

    def __init__(self, bundle: Bundle, names: Sequence[str], work: Workload, progress: Progress | None = None):
        self._bundle, self._names, self._work = bundle, names, work
        self._progress = progress or (lambda done, total: None)
        self.ms: dict[str, float] = {}
        self.deviating: dict[str, str] = {}
        self.failed: dict[str, str] = {}

    def run(self) -> None:
        """Start the candidates, compare them, and time them in turns."""
        jobs, began = {name: self._job(name) for name in self._names}, time.perf_counter()
        with ExitStack() as stack:
            running: dict[str, Contender] = {}
            for name, job in jobs.items():
                self._progress(len(running), len(jobs) + ROUNDS)
                contender = self._start(job, stack)
                if contender is None:
                    continue
                running[name] = contender
                if len(running) == 1 and not self._pays(_mean_ms(contender), time.perf_counter() - began):
                    return
                if not self._agrees(name, running):
                    del running[name]
            self.ms = self._timed(running)

    def _job(self, name: str) -> Job:
        work, manifest = self._work, self._bundle.manifest
        # Texts are random ones: values do not decide the time, and texts of a run need not be in a file.
        labels = tuple(work.labels) if manifest.model.text is None else tuple(range(len(work.labels)))
        threads = thread_count(work.options.threads)
        config = BenchConfig(
            labels=labels, seed=work.seed, cfg_scale=work.cfg_scale, threads=threads, device=work.options.device
        )
        packed = work.options.packed or packing_pays(manifest, work.batches)
        side = Side(name=name, kind=SideKind.BUNDLE, path=str(self._bundle.path), backend=name, packed=packed)
        steps = spread_steps(manifest.sampling.steps, STEPS)
        job = job_of(side, config, manifest.model, manifest.sampling, steps)
        return job.model_copy(update={"batches": work.batches})

    def _start(self, job: Job, stack: ExitStack) -> Contender | None:
        """A loaded process, after a round that is not counted; None if the backend does not run here."""
        own = stack.enter_context(ExitStack())  # closed earlier where the backend does not run
        try:
            contender = own.enter_context(started(job))
            contender.round()
        except DyditError as error:
            own.close()
            self.failed[job.side.name] = one_line(error)
            return None
        return contender

    def _pays(self, step_ms: float, spent: float) -> bool:
        """Whether the run is long enough. `spent`: seconds that the first candidate took to load and to warm up."""
        sampling = self._bundle.manifest.sampling
        step, rounds = step_ms / 1e3, ROUNDS * min(STEPS, sampling.steps)
        return step * sampling.steps * self._work.batches > WORTH * len(self._names) * (spent + rounds * step)

    def _agrees(self, name: str, running: Mapping[str, Contender]) -> bool:
        """Whether the steps of a candidate are those of the first one.

        Of the images and two steps, the median is judged: where a token's logit is near 0, rounding routes it
        differently in an image, and a backend that computes something else does so in all images.
        """
        reference = next(iter(running))
        if name == reference:
            return True
        limit = tolerances(self._bundle.manifest.precision)["step"].limit
        checks = (0, len(running[name].job.steps) // 2)
        try:
            pairs = [(running[name].check(k), running[reference].check(k)) for k in checks]
        except DyditError as error:
            self.failed[name] = one_line(error)
            return False
        value = float(np.median([relative_l2(ours, theirs) for ours, theirs in pairs]))
        if value > limit:
            difference = exponent(value) if np.isfinite(value) else "values that are not finite"
            self.deviating[name] = (
                f"{name} is not used, because its steps differ from those of {reference} by {difference} (relative L2; "
                f"at most {exponent(limit)} is expected)"
            )
        return value <= limit

    def _timed(self, running: Mapping[str, Contender]) -> dict[str, float]:
        """The median milliseconds a step of each candidate."""
        rounds: dict[str, list[float]] = {name: [] for name in running}
        racing = dict(running)
        for turn in range(ROUNDS):
            for name, contender in list(racing.items()):
                try:
                    rounds[name].append(_mean_ms(contender))
                except DyditError as error:
                    self.failed[name] = one_line(error)
                    del racing[name], rounds[name]
            self._progress(len(self._names) + turn + 1, len(self._names) + ROUNDS)
            best = min((np.median(rounds[name]) for name in racing), default=0.0)
            racing = {name: contender for name, contender in racing.items() if np.median(rounds[name]) <= SLOW * best}
        return {name: float(np.median(values)) for name, values in rounds.items()}


def _mean_ms(contender: Contender) -> float:
    return float(np.mean(contender.round().ms))


def _ms(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"
