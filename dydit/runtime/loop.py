"""The sampling loop: segment by segment over the batches of a chunk, so that they share each loaded subnetwork.

`StepRunner` makes one step's inputs and runs it, from any latents; `sample` drives it over a run. Between segments,
latents live in a `LatentStore`: in memory here, on disk in `dydit.runtime.bulk.run`.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np

from dydit.bundle.io_spec import CONDITION
from dydit.bundle.manifest import Manifest
from dydit.diffusion.guidance import Guidance
from dydit.diffusion.steps import State, run_steps
from dydit.errors import BackendError
from dydit.runtime.backends.base import Backend, StepResult
from dydit.runtime.noise_source import NoiseSource
from dydit.runtime.request import Batch
from dydit.runtime.resident import ResidentSubnets
from dydit.runtime.text_conditioner import TextConditioner

Progress = Callable[[int, int], None]
T = TypeVar("T")
CONDITIONING_BYTES = 64 << 20
PACKED_FROM_STEPS = 12


class Conditioner:
    """What steps take of their timesteps and labels, computed for many steps at once and kept as long as it is needed.

    A table holds as many whole segments as fit in `budget` bytes for all of the run's labels; of a segment that alone
    does not fit, some steps for the labels of one batch. Which of the two depends on the run alone, so a resumed run
    repeats its numbers bit for bit.
    """

    def __init__(self, backend: Backend, labels: Sequence[int] | np.ndarray, budget: int = CONDITIONING_BYTES):
        self._backend, self._budget = backend, budget
        self._labels = np.unique(np.asarray(labels, np.int64))
        self._spans = dict(self._whole_segments())
        self._segments = {step: s for s in backend.bundle.manifest.plan.segments for step in s.steps}
        self._key: tuple[int, bytes] | None = None
        self._table = np.empty(0, np.float32)

    def rows(self, step: int, labels: np.ndarray) -> np.ndarray:
        """What one step takes, a row for each of `labels`: f32 [len(labels), *condition_shape]."""
        assert np.isin(labels, self._labels).all(), "a label that was not announced"
        if step in self._spans:
            known, (first, last) = self._labels, self._spans[step]
        else:
            known, segment = np.unique(labels), self._segments[step]
            steps = max(1, self._pairs // len(known))
            first = step - (step - segment.first) % steps
            last = min(first + steps, segment.first + segment.count)
        if self._key != (first, known.tobytes()):
            timesteps = np.asarray(self._backend.bundle.manifest.sampling.timesteps[first:last], np.float32)
            self._key, self._table = None, np.empty(0, np.float32)  # two tables would be the most memory of a run
            self._table = self._backend.conditioning(timesteps, known)
            self._key = (first, known.tobytes())
        return self._table[step - first, np.searchsorted(known, labels)]

    def _whole_segments(self) -> Iterator[tuple[int, tuple[int, int]]]:
        """(step, the steps first..last-1 of its table), for the segments that fit, in runs of neighbours."""
        room, first, last = self._pairs // len(self._labels), 0, 0
        runs = []
        for segment in self._backend.bundle.manifest.plan.segments:
            if segment.first + segment.count - first > room:
                runs.append((first, last))
                first = segment.first if segment.count <= room else segment.first + segment.count
            last = segment.first + segment.count
        runs.append((first, last))
        for first, last in runs:
            yield from ((step, (first, last)) for step in range(first, last))

    @property
    def _pairs(self) -> int:
        """How many (step, label) pairs fit in the budget."""
        model = self._backend.bundle.manifest.model
        return self._budget // (4 * math.prod(model.condition_shape))


class StepRunner:
    """Runs any step of a bundle. `labels`: all labels that will be asked for. `cfg_scale`: see `Guidance`.

    `images`: the size of the run's largest batch, a hint for the backend (`Backend.expect`). If `subnets` load with
    `debug`, a step also returns every block's token decisions and residual stream.

    Threads may share a runner, and runners a backend: steps take turns, by the backend's lock.
    """

    def __init__(
        self,
        backend: Backend,
        subnets: ResidentSubnets,
        labels: Sequence[int] | np.ndarray,
        cfg_scale: float,
        images: int | None = None,
    ):
        self._manifest = manifest = backend.bundle.manifest
        self.backend, self.subnets, self.images = backend, subnets, images
        self.guidance = Guidance(cfg_scale, manifest.model.null_class)
        self._conditioner = Conditioner(backend, self._conditioned(self.guidance.rows(np.asarray(labels, np.int64))))
        self._texts = None if manifest.model.text is None else TextConditioner(backend)
        self._coefficients = np.asarray(manifest.sampling.coefficients, np.float32)
        self._multistep, self._noisy = manifest.sampling.multistep, frozenset(manifest.sampling.noisy_steps)
        self._subnet_of = {step: s.subnet for s in manifest.plan.segments for step in s.steps}

    def _conditioned(self, labels: np.ndarray) -> np.ndarray:
        """The labels on which conditions depend: where texts take the place of labels, one for all."""
        return labels if self._manifest.model.text is None else np.zeros_like(labels)

    def feeds(
        self, step: int, state: State[np.ndarray], noise: np.ndarray, labels: np.ndarray
    ) -> dict[str, np.ndarray]:
        """The inputs of a step for a state and noise f32 [B, C, S, S] and labels int64 [B]."""
        with self.backend.lock:
            if self.backend.bundle.manifest is not self._manifest:
                raise BackendError("the backend runs other steps now; make another StepRunner for them")
            rows = self.guidance.rows(labels)
            condition = self._conditioner.rows(step, self._conditioned(rows))
            texts = {} if self._texts is None else self._texts.feeds(rows)
        return {
            "x": state.x,
            "history": state.history_or(np.zeros_like),
            "noise": noise,
            "coefficients": self._coefficients[step],
            "cfg_scale": np.asarray(self.guidance.scale, np.float32),
            CONDITION: condition,
            **texts,
            "gates": self.backend.bundle.step_gates(step),
        }

    def run(self, step: int, state: State[np.ndarray], noise: np.ndarray, labels: np.ndarray) -> StepResult:
        """One step. Where routed tokens found no slot it is repeated with room for all, so the result is complete;
        `overflow` then still tells how many there were. Of a sampler without history, `next_history` is None.
        """
        index = self._subnet_of[step]
        with self.backend.lock:
            if self.images is not None:
                self.backend.expect(self.images)
            feeds = self.feeds(step, state, noise, labels)
            result = self.subnets.step(index, feeds)
            if result.overflow.any():
                complete = self.subnets.step(index, feeds, full_capacity=True)
                if complete.overflow.any():
                    raise BackendError(f"step {step} drops tokens even at full capacity; export the bundle again")
                result = dataclasses.replace(complete, overflow=result.overflow)
            return result if self._multistep else dataclasses.replace(result, next_history=None)

    def steps_of(self, batch: Batch, noise: NoiseSource) -> Callable[[int, State[np.ndarray]], StepResult]:
        """The steps of a batch, for `run_steps`."""

        def step(index: int, state: State[np.ndarray]) -> StepResult:
            drawn = noise.step(batch, index) if index in self._noisy else np.zeros_like(state.x)
            return self.run(index, state, drawn, batch.labels)

        return step


class LatentStore(Protocol):
    """Where the latents of each batch, and the history of a multistep sampler, are between segments."""

    def done(self, batch: int) -> int:
        """How many segments the batch has behind it."""

    def load(self, batch: int) -> State[np.ndarray]:
        """Its state then, f32 [B, C, S, S] each."""

    def save(self, batch: int, segments: int, state: State[np.ndarray], repeated: int) -> None:
        """Keep the state after `segments` segments; the last of them repeated `repeated` steps."""


@dataclass
class MemoryStore:
    """States in memory."""

    states: dict[int, State[np.ndarray]] = field(default_factory=dict)
    segments: dict[int, int] = field(default_factory=dict)

    def done(self, batch: int) -> int:
        return self.segments.get(batch, 0)

    def load(self, batch: int) -> State[np.ndarray]:
        return self.states[batch]

    def save(self, batch: int, segments: int, state: State[np.ndarray], repeated: int) -> None:
        self.states[batch], self.segments[batch] = state, segments


@dataclass(frozen=True)
class RunStats:
    """`images`: of all batches, also of those that were done before. In this call: `steps` of a batch, how many of them
    were repeated at full capacity, and wall `seconds`.
    """

    images: int
    steps: int
    repeated_steps: int
    seconds: float


@runtime_checkable
class WholeRuns(Protocol):
    """A backend that does by itself what `sample` does, because coming back to the host after a step would cost it."""

    def sample_run(
        self,
        batches: Sequence[Batch],
        noise: NoiseSource,
        store: LatentStore,
        cfg_scale: float,
        progress: Progress | None = None,
    ) -> RunStats:
        """Run every batch to its end; as `sample`."""


def sample(
    runner: StepRunner,
    batches: Sequence[Batch],
    noise: NoiseSource,
    store: LatentStore,
    progress: Progress | None = None,
    chunk: int | None = None,
    finished: Callable[[range], None] | None = None,
) -> RunStats:
    """Run every batch to its end; `store` then holds the final latents. Starts from where the store is.

    `progress(done, total)` counts steps of a batch. `chunk`: how many batches come to their end before others begin;
    by default all do at once. `finished(batches)` is called after each chunk (once, by `WholeRuns`). Raises
    `BackendError`, naming the segment, where latents are not finite. Runs that share a backend take turns, each from
    its beginning to its end; so `progress`, `noise`, `store` and `finished` cannot start another run on it, which
    raises `BackendError`.
    """

    def work() -> RunStats:
        backend = runner.backend
        if isinstance(backend, WholeRuns):
            stats = backend.sample_run(batches, noise, store, runner.guidance.scale, progress)
            if finished:
                finished(range(len(batches)))
            return stats
        return _sample_by_steps(runner, batches, noise, store, progress, chunk, finished)

    return as_one_run(runner.backend, work)


def as_one_run(backend: Backend, work: Callable[[], T]) -> T:
    """Do the work of a run, which no other run on the backend may interleave with; returns what it returns."""
    with backend.lock:
        backend.require_open()
        backend.require_no_run()
        backend.sampling = True
        try:
            return work()
        finally:
            backend.sampling = False


def _sample_by_steps(
    runner: StepRunner,
    batches: Sequence[Batch],
    noise: NoiseSource,
    store: LatentStore,
    progress: Progress | None,
    chunk: int | None,
    finished: Callable[[range], None] | None,
) -> RunStats:
    seconds, steps, repeated = 0.0, 0, 0
    segments = runner.backend.bundle.manifest.plan.segments
    total = len(batches) * runner.backend.bundle.manifest.sampling.steps
    if runner.images is None:
        runner.images = max((len(batch.images) for batch in batches), default=1)
    runner.backend.expect(runner.images)
    done = sum(segments[index].count for b in range(len(batches)) for index in range(store.done(b)))
    for first in range(0, len(batches), chunk or max(1, len(batches))):
        members, start = range(first, min(first + (chunk or len(batches)), len(batches))), time.perf_counter()
        for index, segment in enumerate(segments):
            waiting = [b for b in members if store.done(b) == index]
            if not waiting:
                continue
            runner.subnets.get(segment.subnet)
            if index + 1 < len(segments):
                runner.subnets.prefetch(segments[index + 1].subnet)
            elif members.stop < len(batches):
                runner.subnets.prefetch(segments[0].subnet)
            for b in waiting:
                again = 0

                def count(step: int, result: StepResult) -> None:
                    nonlocal steps, done, again
                    again, steps, done = again + bool(result.overflow.any()), steps + 1, done + 1
                    if progress:
                        progress(done, total)

                state = store.load(b) if index else State(noise.initial(batches[b]))
                state = run_steps(runner.steps_of(batches[b], noise), state, segment.steps, count)
                steps_of_segment = f"steps {segment.first} to {segment.steps[-1]}, subnetwork {segment.subnet}"
                require_finite(state.x, batches[b], f"segment {index} ({steps_of_segment})")
                store.save(b, index + 1, state, again)
                repeated += again
        seconds += time.perf_counter() - start
        if finished:
            finished(members)
    return RunStats(sum(len(batch.images) for batch in batches), steps, repeated, seconds)


def chunk_size(manifest: Manifest, batch: int, labels: int, guided: bool, device: str) -> int:
    """How many batches to bring to their end before others begin: as few as cost 2 % more time, to show pictures early.

    `batch`: images of a batch; `labels`: classes of the run, without the null class. Each chunk has two costs:

    - It loads each subnetwork once, in the background. On the CPU this takes as long as one or two steps of an image
      (see `BackendOptions.packed`). On a GPU it is assumed to take as long as a few hundred; none was measured. A plan
      of dynamic width loads nothing.
    - It computes the condition of every step and label once. That takes about one multiply-add for each weight of the
      conditioning graph. The plan says how many a step takes for each row of a batch, with all tokens.

    A backend that does whole runs (`WholeRuns`) has no chunks.
    """
    steps, segments = manifest.sampling.steps, len(manifest.plan.segments)
    image_steps, batch_steps = (100, 24) if device == "cpu" else (20_000, 24)  # for each loading
    loads = 0.0 if manifest.dynamic_width else segments / steps * max(image_steps / batch, batch_steps)
    model, stored = manifest.model, manifest.weights.items()
    conditioning = (entry for name, entry in stored if model.is_conditioning(name) and not model.is_text(name))
    weights = sum(math.prod(entry.shape) for entry in conditioning)
    step = batch * (1 + guided) * manifest.plan.macs / steps
    kinds = labels + guided if model.text is None else 1  # where texts condition the model, labels do not
    conditions = kinds * weights / max(1.0, 0.02 * step)
    return max(1, math.ceil(loads), math.ceil(conditions))


def packing_pays(manifest: Manifest, batches: int) -> bool:
    """Whether a run of so many batches should pack weights (`BackendOptions.packed`): each subnetwork, which is loaded
    once, then runs for enough steps.
    """
    return batches * manifest.sampling.steps / len(manifest.plan.segments) >= PACKED_FROM_STEPS


def require_finite(x: np.ndarray, batch: Batch, passed: str) -> None:
    """Raise `BackendError`, naming an image, if latents f32 [B, C, S, S] are not finite after the steps `passed`."""
    bad = [image for image, latents in zip(batch.images, x, strict=True) if not np.isfinite(latents).all()]
    if bad:
        raise BackendError(
            f"the latents of image {bad[0]} hold NaN or infinite values after {passed}; compare bundle and checkpoint "
            "with `dydit parity`"
        )
