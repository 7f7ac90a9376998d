"""Timing one contender of a benchmark in its own process (`dydit.bench.bench_worker`). Bundles need no PyTorch.

A *round* is a set of sampling steps spread over the whole run, because subnetworks differ in cost. Each step is timed
by itself: the step with guidance, its repetition if tokens overflow, and its share of the conditioning of several
steps, but not loading and drawing noise. As many subnetworks stay loaded as in sampling, so that the memory is that of
sampling. A subnetwork that has to be loaded again is run once before it is timed, except in the first round, which only
warms up: it is what a user waits for.
"""

from __future__ import annotations

import dataclasses
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path

import numpy as np
from pydantic import Field

from dydit.bundle.bundle import Bundle
from dydit.diffusion.coefficients import SamplingRun, step_coefficients
from dydit.diffusion.noise import INITIAL_DRAW, image_noise, step_draw
from dydit.diffusion.process import Process
from dydit.diffusion.samplers import Sampler, SamplerConfig
from dydit.diffusion.steps import State, StateOnly, run_steps
from dydit.models.config import ModelConfig, UserPath
from dydit.models.macs import flops_ratio, static_macs
from dydit.planning.executed import computed_ratio, layers_in_16_bits
from dydit.planning.resampling import with_run
from dydit.reports.bench_report import Side
from dydit.runtime.backends.base import Arrays, Backend, BackendOptions, StepResult, Subnet
from dydit.runtime.backends.registry import open_backend
from dydit.runtime.loop import StepRunner
from dydit.runtime.resident import ResidentSubnets, host_residency
from dydit.runtime.text_files import with_texts_for
from dydit.validation import Strict
from dydit.words import counted


class Latents(StrEnum):
    """What the steps of a round start from. Times depend on it, because token routing does."""

    RUN = "run"  # the latents after the step before, by DDIM over the measured timesteps: a real run of few steps
    NOISE = "noise"  # new normal noise, for random weights, whose runs do not lead to images


class Job(Strict):
    """What a worker has to time. `steps`: execution indices of a `run`; `process`: of the model; `sizes`: those of the
    static model. `batches`: how many batches of the run do a step before any does the next; they share what is loaded.
    """

    side: Side
    sizes: ModelConfig
    steps: tuple[int, ...]
    run: SamplerConfig
    process: Process
    labels: tuple[int, ...]
    seed: int
    cfg_scale: float
    cfg_channels: int
    threads: int
    device: str
    latents: Latents
    batches: int = 1
    texts: UserPath | None = None


class Round(Strict):
    """One round: milliseconds of each step, and the number of steps that ran again at full capacity."""

    ms: tuple[float, ...]
    overflows: int = 0


class Decided(Strict):
    """The routing decisions of a round, per step, and the mean multiply-adds computed in the blocks for an image."""

    token_share: tuple[float, ...]
    flops_ratio: tuple[float, ...]
    macs: float


class Loaded(Strict):
    """The time of loading, and the precision of matrix products, if it is known."""

    seconds: float
    subnets: int = Field(description="number of subnetworks, or 1 for a PyTorch model")
    precision: str | None = None


def chained_run(process: Process, run: SamplerConfig, steps: Sequence[int], learn_sigma: bool) -> SamplingRun:
    """A deterministic run (DDIM, or Euler for a flow) that visits only `steps` of a run."""
    times = run.times(process)[list(steps)]
    sampler = SamplerConfig(sampler=Sampler.EULER if process.flow else Sampler.DDIM)
    return SamplingRun(times.astype(np.float32), step_coefficients(process, sampler, times, learn_sigma))


class Measured(ABC):
    """A contender that times rounds and counts the routing decisions of their steps.

    By default the whole step is timed, and the model computes all heads, groups and tokens. `last`: the latents after
    the latest round, f32 [B, C, S, S].
    """

    def __init__(self, job: Job, config: ModelConfig):
        self.job, self.config = job, config
        run = chained_run(job.process, job.run, job.steps, config.learn_sigma)
        self.timesteps, self.coefficients = run.times, run.coefficients.astype(np.float32)
        shape = (config.in_channels, config.input_size, config.input_size)
        images = range(len(job.labels))
        self.labels = np.asarray(job.labels, np.int64)
        self.initial = image_noise(job.seed, images, INITIAL_DRAW, shape)
        self.noise = [image_noise(job.seed, images, step_draw(step), shape) for step in job.steps]
        self.last = self.initial

    @abstractmethod
    def load(self) -> Loaded:
        """Load everything that the steps of a round need; called once."""

    @abstractmethod
    def step(self, k: int, x: np.ndarray) -> np.ndarray:
        """The k-th measured step with guidance and the sampler's update: the latents after it from the latents x before
        it, both f32 [B, C, S, S]. Its noise is `noise[k]`, its row of coefficients `coefficients[k]`.
        """

    def check(self, k: int | None = None) -> np.ndarray:
        """The model's part of the k-th measured step (by default the middle one) from the initial noise:
        x_prev - c_x*x, f32 [B, C, S, S].
        """
        k = len(self.job.steps) // 2 if k is None else k
        return self.step(k, self.initial) - self.coefficients[k][0] * self.initial

    def round(self) -> Round:
        """Time one round."""
        times = []

        def timed(k: int, x: np.ndarray) -> np.ndarray:
            start = time.perf_counter()
            after = self.step(k, x)
            times.append(1e3 * (time.perf_counter() - start))
            return after

        self.over_round(timed)
        return Round(ms=tuple(times))

    def decided(self) -> Decided:
        """Repeat a round without timing it, and count the decisions of its steps."""
        steps = len(self.job.steps)
        masks = np.ones((steps, self.config.units.size), bool)
        return self._count(masks, np.ones((steps, self.config.depth)), np.ones(steps))

    def over_round(self, step: Callable[[int, np.ndarray], np.ndarray]) -> None:
        """Call `step(k, x) -> x_prev` for each measured step k with the latents x that it starts from."""

        def latents(k: int, state: State[np.ndarray]) -> StateOnly[np.ndarray]:
            after = step(k, state.x)
            return StateOnly(State(after if self.job.latents is Latents.RUN else self.noise[k]))

        self.last = run_steps(latents, State(self.initial), range(len(self.job.steps))).x

    def _count(self, masks: np.ndarray, tokens: np.ndarray, computed: np.ndarray) -> Decided:
        """The decisions of K steps from `masks` bool [K, U], the share of routed tokens [K, L], and the share of the
        static model's multiply-adds that were computed [K]."""
        ratio = np.asarray(flops_ratio(self.config, self.config.units.counts(masks), tokens))
        return Decided(
            token_share=tuple(tokens.mean(axis=1).tolist()),
            flops_ratio=tuple(ratio.tolist()),
            macs=float(computed.mean()) * static_macs(self.config),
        )


class _Timed(Backend):
    """A backend that measures conditioning. `shares`: seconds by timestep, of a call divided by the steps it serves.

    `text_seconds`: of the text graph, which runs once for all steps. `spent`: of all of these calls.
    """

    def __init__(self, inner: Backend):
        super().__init__(inner.bundle, inner.options)
        self.inner, self.name = inner, inner.name
        self.shares: dict[float, float] = {}
        self.text_seconds = self.spent = 0.0

    def _conditioning(self, feeds: Arrays) -> np.ndarray:
        start = time.perf_counter()
        table = self.inner.conditioning(feeds["timesteps"], feeds["labels"])
        seconds = time.perf_counter() - start
        self.spent += seconds
        self.shares.update(dict.fromkeys(feeds["timesteps"].tolist(), seconds / len(table)))
        return table

    def _text_values(self, feeds: Arrays) -> dict[str, np.ndarray]:
        start = time.perf_counter()
        values = self.inner._text_values(feeds)
        self.text_seconds = time.perf_counter() - start
        self.spent += self.text_seconds
        return values

    def subnet(self, index: int, full_capacity: bool = False, debug: bool = False) -> Subnet:
        return self.inner.subnet(index, full_capacity, debug)

    def expect(self, images: int) -> None:
        self.inner.expect(images)


class MeasuredBundle(Measured):
    """A bundle on a backend, run as the sampling loop runs it."""

    def __init__(self, job: Job):
        # The benchmark has verified the files before it started the workers.
        opened = with_run(Bundle.open(job.side.path, verify=False), job.run)
        self.bundle = with_texts_for(opened, job.texts, max(job.labels) + 1)
        super().__init__(job, self.bundle.manifest.model)
        options = BackendOptions(threads=job.threads, device=job.device, packed=job.side.packed)
        self.backend = _Timed(open_backend(job.side.backend, self.bundle, options))
        self.backend.expect(len(job.labels))
        plan = self.bundle.manifest.plan
        self._subnet_of_step = {step: segment.subnet for segment in plan.segments for step in segment.steps}
        self.subnet_of = [self._subnet_of_step[step] for step in job.steps]
        self.needed = sorted(set(self.subnet_of))
        limit = host_residency(self.backend.inner)
        self.keep_all = limit is None
        self._rounds = 0
        self.subnets = ResidentSubnets(self.backend, limit)

    def load(self) -> Loaded:
        start = time.perf_counter()
        self.backend.conditioning(np.asarray([0], np.float32), self.labels[:1])
        loaded = self.needed if self.keep_all else self.subnet_of[:1]
        for index in loaded:
            self.subnets.get(index)
        manifest = self.bundle.manifest
        precision, fp16_layers = manifest.precision.value, layers_in_16_bits(manifest)[1]
        precision += f" with {counted(fp16_layers, 'layer')} in 16 bits" if fp16_layers else ""
        return Loaded(seconds=time.perf_counter() - start, subnets=len(loaded), precision=precision)

    def _feeds(self, runner: StepRunner, k: int, x: np.ndarray) -> dict[str, np.ndarray]:
        feeds = runner.feeds(self.job.steps[k], State(x), self.noise[k], self.labels)
        return {**feeds, "coefficients": self.coefficients[k]}

    def _step(self, index: int, feeds: dict[str, np.ndarray]) -> StepResult:
        result = self.subnets.get(index).step(feeds)
        if result.overflow.any():
            return dataclasses.replace(self.subnets.full(index).step(feeds), overflow=result.overflow)
        return result

    def step(self, k: int, x: np.ndarray) -> np.ndarray:
        runner = StepRunner(self.backend, self.subnets, self.labels, self.job.cfg_scale)
        return self._step(self.subnet_of[k], self._feeds(runner, k, x)).x_prev

    def round(self) -> Round:
        runner = StepRunner(self.backend, self.subnets, self.labels, self.job.cfg_scale)
        sampling = self.bundle.manifest.sampling
        times: list[float] = []
        overflows = 0

        def step(k: int, x: np.ndarray) -> np.ndarray:
            nonlocal overflows
            start, before = time.perf_counter(), self.backend.spent
            feeds = self._feeds(runner, k, x)
            # Conditioning and texts are computed for many steps at once, most of which are not measured.
            prepared = time.perf_counter() - start - (self.backend.spent - before)
            prepared += self.backend.shares[sampling.timesteps[self.job.steps[k]]]
            prepared += self.backend.text_seconds / sampling.steps
            ms, result = self._timed_step(k, feeds)
            times.append(ms + 1e3 * prepared)
            overflows += bool(result.overflow.any())
            return result.x_prev

        self.over_round(step)
        self._rounds += 1
        return Round(ms=tuple(times), overflows=overflows)

    def _timed_step(self, k: int, feeds: dict[str, np.ndarray]) -> tuple[float, StepResult]:
        """Milliseconds of the k-th measured step where it stands in a run, and its result.

        Measured steps lie apart. So the units of the step before it are arranged first, with dynamic width; and what a
        run loads in the background meanwhile, the next subnetwork of a plan that is not kept, is loaded here, too. The
        other batches of the run that share a step have neither. The first round, in which everything is new, is plain.
        """
        step, index, following = self.job.steps[k], self.subnet_of[k], None
        if self._rounds:
            before, after = (self._subnet_of_step.get(other) for other in (step - 1, step + 1))
            if not self.keep_all:
                self.subnets.get(index)
                following = None if after == index else after
            if before is not None and (self.bundle.manifest.dynamic_width or (before == index and not self.keep_all)):
                self._step(before, feeds)
        start = time.perf_counter()
        if following is not None:
            self.subnets.prefetch(following)
        result = self._step(index, feeds)
        if following is not None:
            self.subnets.get(following)
        first, others = time.perf_counter() - start, self.job.batches - 1
        if not others or not self._rounds:
            return 1e3 * first, result
        start = time.perf_counter()
        self._step(index, feeds)
        return 1e3 * (first + others * (time.perf_counter() - start)) / (1 + others), result

    def decided(self) -> Decided:
        tokens, repeated = [], []
        with ResidentSubnets(self.backend, 2, debug=True) as subnets:
            runner = StepRunner(self.backend, subnets, self.labels, self.job.cfg_scale)

            def step(k: int, x: np.ndarray) -> np.ndarray:
                feeds = self._feeds(runner, k, x)
                result = subnets.get(self.subnet_of[k]).step(feeds)
                repeated.append(bool(result.overflow.any()))
                if repeated[-1]:
                    result = subnets.full(self.subnet_of[k]).step(feeds)
                assert result.tokens is not None
                tokens.append(result.tokens.mean(axis=(1, 2)))
                return result.x_prev

            self.over_round(step)
        steps, routed = list(self.job.steps), np.stack(tokens)
        computed = computed_ratio(self.bundle.manifest, steps, routed, np.array(repeated))
        return self._count(self.bundle.masks[steps], routed, computed)


def settled_bytes() -> int | None:
    """Proportional set size of this process now, with each page counted once; None if the system does not report it."""
    rollup = Path("/proc/self/smaps_rollup")
    if not rollup.is_file():
        return None
    line = next(line for line in rollup.read_text().splitlines() if line.startswith("Pss:"))
    return int(line.split()[1]) * 1024


def peak_bytes() -> int:
    """Largest resident size of this process so far. A page of a file counts once for each session that maps it."""
    status = Path("/proc/self/status")
    if status.is_file():  # unlike ru_maxrss, this does not include the process that forked this one
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource
    import sys

    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024
