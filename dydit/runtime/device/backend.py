"""A backend on a `Device`: single steps for parity and the generic loop, and whole runs that stay on the device."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import numpy as np

from dydit.bundle.bundle import Bundle
from dydit.bundle.io_spec import (
    BATCH,
    LABELS,
    ROWS,
    STEPS,
    TEXT_BIAS,
    TEXT_TOKENS,
    TEXT_VALUES,
    TEXTS,
    conditioning_outputs,
    subnet_outputs,
    text_outputs,
)
from dydit.bundle.manifest import Routing
from dydit.bundle.vae_entry import vae_outputs
from dydit.errors import BackendError
from dydit.runtime.backends.base import Arrays, Backend, BackendOptions, StepResult, Subnet
from dydit.runtime.device.execute import Device, Executor, WorkspaceError
from dydit.runtime.device.launches import EngineMemory
from dydit.runtime.device.memory_fit import fit_resident
from dydit.runtime.device.memory_layout import LaunchOptions, RunShape
from dydit.runtime.device.operations import CONDITIONER, DECODER, TEXT_CONDITIONER, EngineId
from dydit.runtime.device.residency import conditioners_of, engine_of, engines_of
from dydit.runtime.device.stepping import Stepper
from dydit.runtime.device.whole_runs import DeviceSampler, WholeRunsBackend, close_whatever_state
from dydit.runtime.loop import LatentStore, Progress, RunStats
from dydit.runtime.noise_source import NoiseSource
from dydit.runtime.request import Batch
from dydit.runtime.resident import default_residency

RESERVE = 512 << 20
"""Bytes of device memory that are left free, for execution contexts and for other libraries."""


class DeviceSubnet(Subnet):
    """A loaded engine, run step by step; with dynamic width, the one engine of all subnetworks."""

    def __init__(self, backend: Backend, index: int, full: bool, stepper: Stepper):
        super().__init__(backend, index)
        self._manifest = backend.bundle.manifest
        self._stepper: Stepper | None = stepper
        self._engine = engine_of(self._manifest, index, full)
        stepper.load(self._engine)

    def _step(self, feeds: Arrays) -> StepResult:
        model = self._manifest.model
        outputs = subnet_outputs(model, self._manifest.routing is Routing.CAPACITY)
        sizes = {BATCH: feeds["x"].shape[0], ROWS: feeds["condition"].shape[0]}
        assert self._stepper is not None
        self._stepper.use(self._backend.bundle)
        out = self._stepper.run(self._engine, feeds, outputs, sizes, self._index)
        return StepResult(
            out["x_prev"], out["next_history"], out.get("token_overflow", np.zeros(model.depth, np.int64))
        )

    def _free(self) -> None:
        stepper, self._stepper = self._stepper, None
        if stepper is not None:
            stepper.unload(self._engine)


class DeviceBackend(WholeRunsBackend):
    """Single steps and whole runs each open a device with `make_device`, and load their own engines.

    `known`: memory of engines, as their builder reported it or earlier runs measured it. `graphs`: capture steps where
    the routing allows it.
    """

    def __init__(
        self,
        bundle: Bundle,
        options: BackendOptions | None,
        make_device: Callable[[], Device],
        known: Mapping[EngineId, EngineMemory] | None = None,
        graphs: bool = True,
    ):
        super().__init__(bundle, options)
        self._make_device, self._graphs = make_device, graphs
        self._memory = dict(known or {})
        self._owned: list[Executor | Stepper] = []
        self._making = threading.Lock()
        self._made_stepper: Stepper | None = None
        self._finalizer = weakref.finalize(self, _close_all, self._owned)

    def subnet(self, index: int, full_capacity: bool = False, debug: bool = False) -> Subnet:
        if debug:
            raise BackendError(
                f"{self.name} cannot return values between layers; use backend='onnxruntime' or 'torch' for that "
                "(--backend onnxruntime)"
            )
        self.require_open()
        full = full_capacity and self.bundle.manifest.subnets[index].full_file is not None
        return DeviceSubnet(self, index, full, self._stepper)

    def _conditioning(self, feeds: Arrays) -> np.ndarray:
        steps, labels = self._conditioning_limits
        outputs = conditioning_outputs(self.bundle.manifest.model)
        rows = []
        for t in range(0, len(feeds["timesteps"]), steps):
            parts = []
            for r in range(0, len(feeds["labels"]), labels):
                part = {"timesteps": feeds["timesteps"][t : t + steps], "labels": feeds["labels"][r : r + labels]}
                sizes = {STEPS: len(part["timesteps"]), LABELS: len(part["labels"])}
                parts.append(self._stepper.run(CONDITIONER, part, outputs, sizes)["condition"])
            rows.append(np.concatenate(parts, axis=1))
        return np.concatenate(rows)

    def _text_values(self, feeds: Arrays) -> dict[str, np.ndarray]:
        most, tokens = self._text_limits
        _require_tokens(feeds["mask"].shape[1], tokens)
        outputs, parts = text_outputs(self.bundle.manifest.model), []
        for first in range(0, len(feeds["mask"]), most):
            part = {name: array[first : first + most] for name, array in feeds.items()}
            count, length = part["mask"].shape
            parts.append(self._stepper.run(TEXT_CONDITIONER, part, outputs, {TEXTS: count, TEXT_TOKENS: length}))
        return {
            name: np.concatenate([part[name] for part in parts], axis)
            for name, axis in ((TEXT_VALUES, 1), (TEXT_BIAS, 0))
        }

    def decode(self, tiles: np.ndarray) -> np.ndarray:
        """Tiles of latents f32 [B, C, tile, tile] to pixels f32 [B, 3, side, side], by the VAE decoder's engine.

        If there is no memory for it, what whole runs keep on the device is freed; the next run loads it again.
        """
        with self.lock:
            self.require_open()
            try:
                pixels = self._decode(tiles)
            except BackendError:
                if not self._clear_runs():
                    raise
                pixels = self._decode(tiles)
            self._after_run()
            return pixels

    def _decode(self, tiles: np.ndarray) -> np.ndarray:
        vae = self.bundle.manifest.vae
        assert vae is not None
        most, parts = self._decoder_limit, []
        for first in range(0, len(tiles), most):
            part = tiles[first : first + most]
            out = self._stepper.run(DECODER, {"latents": part}, vae_outputs(vae), {BATCH: len(part)})
            parts.append(out["images"])
        return np.concatenate(parts)

    @cached_property
    def _decoder_limit(self) -> int:
        """The most tiles that the decoder's engine takes at once."""
        self._stepper.load(DECODER)
        return self._stepper.longest(DECODER, "latents")[0]

    def _clear_runs(self) -> bool:
        executors = [each for each in self._owned if isinstance(each, Executor)]
        self._made_sampler = None
        for executor in executors:
            self._owned.remove(executor)
            close_whatever_state(executor)
        return bool(executors)

    @property
    def _stepper(self) -> Stepper:
        with self._making:  # subnetworks are loaded in the background
            if self._made_stepper is None:
                stepper = Stepper(self._make_device(), self.bundle)
                self._owned.append(stepper)
                self._made_stepper = stepper
            return self._made_stepper

    @cached_property
    def _conditioning_limits(self) -> tuple[int, int]:
        """The most timesteps and labels that the conditioning's engine takes at once."""
        self._stepper.load(CONDITIONER)
        return self._stepper.longest(CONDITIONER, "timesteps")[0], self._stepper.longest(CONDITIONER, "labels")[0]

    @cached_property
    def _text_limits(self) -> tuple[int, ...]:
        """The most texts that the text graph's engine takes at once, and the most tokens of each."""
        self._stepper.load(TEXT_CONDITIONER)
        return self._stepper.longest(TEXT_CONDITIONER, "mask")

    def sample_run(
        self,
        batches: Sequence[Batch],
        noise: NoiseSource,
        store: LatentStore,
        cfg_scale: float,
        progress: Progress | None = None,
    ) -> RunStats:
        """What `WholeRunsBackend` does; if too little memory was known of an engine, all are measured."""
        with self.lock:
            try:
                return super().sample_run(batches, noise, store, cfg_scale, progress)
            except WorkspaceError:
                self._clear_runs()
                self._memory.clear()
                return super().sample_run(batches, noise, store, cfg_scale, progress)

    def _make_sampler(self) -> DeviceSampler:
        device, manifest = self._make_device(), self.bundle.manifest
        executor = Executor(device)
        self._owned.append(executor)
        self._measure(executor)
        options = LaunchOptions(
            graphs=self._graphs,
            resident=default_residency(manifest),
            conditioning_steps=device.longest(CONDITIONER, "timesteps")[0],
        )
        most_rows = device.longest(CONDITIONER, "labels")[0]
        most_tokens = 0 if manifest.model.text is None else device.longest(TEXT_CONDITIONER, "mask")[1]

        def fit(shape: RunShape, wanted: LaunchOptions) -> LaunchOptions:
            if (rows := shape.rows(max(shape.sizes))) > most_rows:
                raise BackendError(
                    f"the conditioning's engine takes at most {most_rows} labels at once, but this batch has {rows}; "
                    "use a smaller batch size, or build engines for larger batches"
                )
            _require_tokens(shape.text_tokens, most_tokens)
            state = executor.state
            held = sum(state.buffers.values()) + sum(self._memory[engine].weights for engine in state.engines)
            with device.activate():
                limit = device.free_memory() + held - RESERVE
            return fit_resident(self.bundle.manifest, shape, self._memory, wanted, limit)

        return DeviceSampler(executor, self.bundle, self._memory, options, fit)

    def _measure(self, executor: Executor) -> None:
        """Measure the memory of engines of which it is not known, by loading each once."""
        wanted = engines_of(self.bundle.manifest)
        unknown = [engine for engine in wanted if engine not in self._memory]
        for engine in conditioners_of(self.bundle.manifest):
            executor.load(engine)
            measured = executor.device.memory(engine)
            if engine not in self._memory or measured.activation > self._memory[engine].activation:
                self._memory[engine] = measured
        for engine in unknown:
            if engine.subnet is not None:
                executor.load(engine)
            self._memory[engine] = executor.device.memory(engine)
            if engine.subnet is not None:
                executor.unload(engine)
        if unknown:
            self._keep_memory(self._memory)

    def _keep_memory(self, memory: Mapping[EngineId, EngineMemory]) -> None:
        """Save the memory of the engines for the next process."""

    def _in_context(self) -> AbstractContextManager[Any]:
        """Make the GPU's context current. Something must have run; all devices of a backend are the same GPU."""
        return self._owned[-1].device.activate()

    def _free(self) -> None:
        self._finalizer()


def _require_tokens(tokens: int, most: int) -> None:
    """Raise `BackendError` for texts that are longer than the engines take."""
    if tokens > most:
        raise BackendError(
            f"the texts have {tokens} tokens, but the model was trained with at most {most}, for which its engines "
            "were built; encode the texts again with that limit, or use backend='onnxruntime' (--backend onnxruntime)"
        )


def _close_all(owned: list[Executor | Stepper]) -> None:
    while owned:
        owned.pop().close()
