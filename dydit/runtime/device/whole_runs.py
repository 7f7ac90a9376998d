"""Sampling as `dydit.runtime.loop.sample` does it, but whole runs at a time on a device."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from dydit.bundle.bundle import Bundle
from dydit.diffusion.guidance import is_guided
from dydit.errors import BackendError, DyditError
from dydit.runtime.device.execute import Executor, RunCounts
from dydit.runtime.device.inputs import HostInputs
from dydit.runtime.device.launches import EngineMemory, LaunchPlan
from dydit.runtime.device.memory_layout import LaunchOptions, RunShape
from dydit.runtime.device.operations import EngineId
from dydit.runtime.loop import LatentStore, MemoryStore, Progress, RunStats
from dydit.runtime.noise_source import NoiseSource
from dydit.runtime.request import Batch

BATCHES = 256
"""This many batches run through all segments together; more would only make the lists of operations longer."""
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
        self._executor, self._bundle, self._memory, self.options, self._fit = executor, bundle, memory, options, fit
        self.unsettled = False

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
        self.unsettled = True
        try:
            stats = self._sample(batches, noise, store, cfg_scale, progress)
        except DyditError:  # raised between operations, so the state is known
            self.unsettled = False
            raise
        self.unsettled = False
        return stats

    def _sample(
        self,
        batches: Sequence[Batch],
        noise: NoiseSource,
        store: LatentStore,
        cfg_scale: float,
        progress: Progress | None,
    ) -> RunStats:
        start, segments = time.perf_counter(), self._bundle.manifest.plan.segments
        counted = _Counted(progress, len(batches) * self._bundle.manifest.sampling.steps)
        counted.add(sum(segments[index].count for b in range(len(batches)) for index in range(store.done(b))))
        counts = RunCounts()
        for first in range(0, len(batches), BATCHES):
            part = range(first, min(first + BATCHES, len(batches)))
            waiting = [b for b in part if store.done(b) < len(segments)]
            if waiting:
                done = self._pass(batches, waiting, noise, store, cfg_scale, counted)
                counts.steps += done.steps
                counts.repeated_steps += done.repeated_steps
        images = sum(len(batch.images) for batch in batches)
        return RunStats(images, counts.steps, counts.repeated_steps, time.perf_counter() - start)

    def _pass(
        self,
        batches: Sequence[Batch],
        waiting: Sequence[int],
        noise: NoiseSource,
        store: LatentStore,
        cfg_scale: float,
        counted: _Counted,
    ) -> RunCounts:
        """Run some batches through the segments that are left for them."""
        chosen, model = [batches[b] for b in waiting], self._bundle.manifest.model
        sizes = tuple(len(batch.images) for batch in chosen)
        shape = RunShape(sizes, is_guided(cfg_scale), tuple(store.done(b) for b in waiting))
        options = dataclasses.replace(self.options, save_segments=not isinstance(store, MemoryStore))
        plan = LaunchPlan(self._bundle.manifest, shape, self._memory, self._fit(shape, options), self._executor.state)
        host = HostInputs(self._bundle, plan.layout, chosen, noise, lambda place: store.load(waiting[place]), cfg_scale)

        def deliver(place: int, segments: int, data: np.ndarray, repeated: int) -> None:
            size = (len(chosen[place].images), model.in_channels, model.input_size, model.input_size)
            latents = data.view(np.float32).reshape(size)
            _require_finite(latents, chosen[place], segments)
            store.save(waiting[place], segments, latents, repeated)

        return self._executor.run(plan, host, deliver, counted.add)


class _Counted:
    """Progress of a run, from steps as they are launched."""

    def __init__(self, progress: Progress | None, total: int):
        self._progress, self._total, self.done = progress, total, 0

    def add(self, steps: int) -> None:
        """Count steps that were launched."""
        self.done = min(self.done + steps, self._total)
        if self._progress and steps:
            self._progress(self.done, self._total)


def close_whatever_state(executor: Executor) -> None:
    """Free what an executor has on its device, even if an interrupt left its records wrong.

    What cannot be freed is freed together with the device.
    """
    with contextlib.suppress(Exception):
        executor.close()


def _require_finite(latents: np.ndarray, batch: Batch, segments: int) -> None:
    bad = [image for image, x in zip(batch.images, latents, strict=True) if not np.isfinite(x).all()]
    if bad:
        raise BackendError(
            f"the latents of image {bad[0]} hold NaN or infinite values after {segments} segments; compare bundle and "
            "checkpoint with `dydit parity`"
        )
