"""Sampling as `dydit.runtime.loop.sample` does it, but whole runs at a time on a device."""

from __future__ import annotations

import contextlib
import dataclasses
import time
import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from dydit.bundle.bundle import Bundle
from dydit.bundle.manifest import Manifest
from dydit.diffusion.guidance import is_guided
from dydit.errors import DyditError, one_line
from dydit.runtime.backends.base import Backend
from dydit.runtime.device.execute import CaptureError, Executor, RunCounts
from dydit.runtime.device.inputs import HostInputs, text_sizes, unpack
from dydit.runtime.device.launches import EngineMemory, LaunchPlan
from dydit.runtime.device.memory_layout import LaunchOptions, RunShape
from dydit.runtime.device.operations import EngineId
from dydit.runtime.device.unit_weights import UnitWeights
from dydit.runtime.loop import LatentStore, MemoryStore, Progress, RunStats, require_finite
from dydit.runtime.noise_source import NoiseSource
from dydit.runtime.request import Batch

BATCHES = 256
"""This many batches run through all segments together. More would keep more latents on the device and make the lists of
operations longer; fewer would load the engines that do not stay more often."""
Fit = Callable[[RunShape, LaunchOptions], LaunchOptions]


class DeviceSampler:
    """Runs of one bundle on one device; buffers, engines and graphs stay for the next run.

    `memory`: what each engine needs. `fit`: reduces the options to what fits on the device. `unsettled`: whether a run
    was interrupted. The state of the device is then unknown, and sampler and executor must not be used any more.
    """

    def __init__(
        self,
        executor: Executor,
        bundle: Bundle,
        memory: Mapping[EngineId, EngineMemory],
        options: LaunchOptions,
        fit: Fit = lambda shape, options: options,
    ):
        self.executor, self._bundle, self._memory, self.options, self._fit = executor, bundle, memory, options, fit
        self.unsettled = False

    def serves(self, bundle: Bundle) -> bool:
        """Whether it can go on with another manifest of the same files: the weights lie where that needs them."""
        old, new = self._bundle.manifest, bundle.manifest
        return new is old or not new.dynamic_width or UnitWeights(new).has_places_of(UnitWeights(old))

    def use(self, bundle: Bundle) -> None:
        """Run the steps or texts of another manifest that it serves. Engines, weights and buffers stay.

        Graphs stay if only the texts are others.
        """
        if not _same_steps(bundle.manifest, self._bundle.manifest):
            self.unsettled = True
            self.executor.drop_graphs()
            self._bundle, self.unsettled = bundle, False
        self._bundle = bundle

    def sample(
        self,
        batches: Sequence[Batch],
        noise: NoiseSource,
        store: LatentStore,
        cfg_scale: float,
        progress: Progress | None = None,
    ) -> RunStats:
        """Run every batch to its end; `store` then holds the final latents. Starts from where the store is.

        Latents are stored after every segment; a `MemoryStore` gets only the last ones. Raises
        `BackendError` as the device does, and where latents are not finite.
        """
        start, segments = time.perf_counter(), self._bundle.manifest.plan.segments
        done, total = 0, len(batches) * self._bundle.manifest.sampling.steps

        def count(steps: int) -> None:
            nonlocal done
            done = min(done + steps, total)
            if progress and steps:
                progress(done, total)

        steps = repeated = 0
        self.unsettled = True
        try:
            count(sum(segments[index].count for b in range(len(batches)) for index in range(store.done(b))))
            for first in range(0, len(batches), BATCHES):
                part = range(first, min(first + BATCHES, len(batches)))
                if waiting := [b for b in part if store.done(b) < len(segments)]:
                    counts = self._pass(batches, waiting, noise, store, cfg_scale, count)
                    steps, repeated = steps + counts.steps, repeated + counts.repeated_steps
        except DyditError:  # raised between operations, so the state is known
            self.unsettled = False
            raise
        self.unsettled = False
        return RunStats(sum(len(batch.images) for batch in batches), steps, repeated, time.perf_counter() - start)

    def _pass(
        self,
        batches: Sequence[Batch],
        waiting: Sequence[int],
        noise: NoiseSource,
        store: LatentStore,
        cfg_scale: float,
        count: Callable[[int], None],
    ) -> RunCounts:
        """Run some batches through the segments that are left for them."""
        chosen = [batches[b] for b in waiting]
        sizes = tuple(len(batch.images) for batch in chosen)
        texts, tokens = text_sizes(self._bundle, batches, cfg_scale)  # of all batches: a resumed run repeats its bits
        shape = RunShape(sizes, is_guided(cfg_scale), tuple(store.done(b) for b in waiting), texts, tokens)
        options = dataclasses.replace(self.options, save_segments=not isinstance(store, MemoryStore))
        plan = LaunchPlan(self._bundle.manifest, shape, self._memory, self._fit(shape, options), self.executor.state)
        host = HostInputs(self._bundle, plan.layout, chosen, noise, lambda place: store.load(waiting[place]), cfg_scale)

        def deliver(place: int, segments: int, data: np.ndarray, repeated: int) -> None:
            state = unpack(plan.layout, len(chosen[place].images), data)
            require_finite(state.x, chosen[place], f"{segments} segments")
            store.save(waiting[place], segments, state, repeated)

        return self.executor.run(plan, host.array, deliver, count)


def _same_steps(one: Manifest, other: Manifest) -> bool:
    """Whether two manifests of the same files run the same subnetworks at the same steps."""
    return one is other or all(
        getattr(one, name) == getattr(other, name) for name in ("sampling", "plan", "subnets", "masks")
    )


class WholeRunsBackend(Backend):
    """A backend whose whole runs stay on a device, on a sampler that is made for the first of them."""

    _made_sampler: DeviceSampler | None = None
    _graphs: bool  # whether graphs may be captured

    def sample_run(
        self,
        batches: Sequence[Batch],
        noise: NoiseSource,
        store: LatentStore,
        cfg_scale: float,
        progress: Progress | None = None,
    ) -> RunStats:
        """What `dydit.runtime.loop.sample` does, without returning to the host between steps.

        If a graph cannot be captured, a warning says so and the run starts again without graphs. What an interrupted
        run left on the device is freed before the next one.
        """
        with self.lock:
            self.require_open()
            if self._sampler.unsettled or not self._sampler.serves(self.bundle):
                self._clear_runs()
            sampler = self._sampler
            sampler.use(self.bundle)
            try:
                stats = sampler.sample(batches, noise, store, cfg_scale, progress)
            except CaptureError as error:
                warnings.warn(f"{one_line(error)}; continuing without CUDA graphs", stacklevel=2)
                self._graphs = False  # for a sampler that replaces this one
                sampler.options = dataclasses.replace(sampler.options, graphs=False)
                stats = sampler.sample(batches, noise, store, cfg_scale, progress)
            self._after_run()
            return stats

    @property
    def _sampler(self) -> DeviceSampler:
        if self._made_sampler is None:
            self._made_sampler = self._make_sampler()
        return self._made_sampler

    def _after_run(self) -> None:
        """What follows a run that succeeded."""

    @abstractmethod
    def _make_sampler(self) -> DeviceSampler:
        """A sampler on a newly opened device."""

    def _clear_runs(self) -> bool:
        """Free what whole runs hold on the device; returns whether there was anything."""
        sampler, self._made_sampler = self._made_sampler, None
        if sampler is not None:
            close_whatever_state(sampler.executor)
        return sampler is not None


def close_whatever_state(executor: Executor) -> None:
    """Free what an executor has on its device, even if an interrupt left its records wrong.

    What it does not know of is freed together with the device.
    """
    with contextlib.suppress(Exception):
        executor.close()  # which closes the device in any case
