"""Runs engines one step at a time, with inputs and results on the host: for parity and the generic loop."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from dydit.bundle.bundle import Bundle
from dydit.bundle.io_spec import TensorSpec
from dydit.runtime.device.execute import Device, Executor, Tensor
from dydit.runtime.device.launches import WORKSPACE
from dydit.runtime.device.operations import COMPUTE, Allocate, EngineId
from dydit.runtime.device.unit_weights import UnitWeights


class Stepper:
    """Runs engines on a device.

    Buffers grow to the largest feeds and stay until `close`. An engine may be loaded in another thread, and more than
    once; the last `unload` frees it.
    """

    def __init__(self, device: Device, bundle: Bundle):
        self._device, self._bundle = device, bundle
        self._weights = Executor(device)
        self._unit_weights = UnitWeights(bundle.manifest) if bundle.manifest.dynamic_width else None
        self._buffers: dict[str, tuple[int, int]] = {}
        self._users: Counter[EngineId] = Counter()
        self._lock = threading.Lock()

    @property
    def device(self) -> Device:
        """The device that it runs on."""
        return self._device

    def use(self, bundle: Bundle) -> None:
        """Run the steps of another manifest of the same files; its unit weights stay on the device."""
        if bundle.manifest is self._bundle.manifest:
            return
        if self._unit_weights is not None:
            weights = UnitWeights(bundle.manifest)
            if not weights.has_places_of(self._unit_weights):
                self._weights.free()
            self._unit_weights = weights
        self._bundle = bundle

    def load(self, engine: EngineId) -> None:
        """Load an engine, unless it is loaded already."""
        with self._lock, self._device.activate():
            if not self._users[engine]:
                self._device.load(engine)
            self._users[engine] += 1

    def unload(self, engine: EngineId) -> None:
        """Free an engine that nobody else loaded."""
        with self._lock, self._device.activate():
            self._users[engine] -= 1
            if not self._users[engine]:
                self._device.unload(engine)

    def run(
        self,
        engine: EngineId,
        feeds: Mapping[str, np.ndarray],
        outputs: Sequence[TensorSpec],
        sizes: Mapping[str, int],
        subnet: int | None = None,
    ) -> dict[str, np.ndarray]:
        """Run an engine; returns every output by name. `sizes` are the values of the specs' symbols.

        `subnet`: the subnetwork that runs; with dynamic width its weights are brought to the front first.
        """
        with self._device.activate():
            inputs = [] if self._unit_weights is None or subnet is None else self._arrange(self._unit_weights, subnet)
            for name, feed in feeds.items():
                array = np.asarray(feed, order="C")
                inputs.append(Tensor(name, array.dtype.name, array.shape, self._buffer(f"in.{name}", array.nbytes)))
                self._device.upload(inputs[-1].address, array, COMPUTE)
            results = [np.empty(spec.concrete(sizes), spec.dtype) for spec in outputs]
            destinations = [
                Tensor(spec.name, spec.dtype, result.shape, self._buffer(f"out.{spec.name}", result.nbytes))
                for spec, result in zip(outputs, results, strict=True)
            ]
            need = self._device.memory(engine).activation
            workspace = (self._buffer(WORKSPACE, need), self._buffers[WORKSPACE][1]) if need else (0, 0)
            self._device.launch(engine, inputs, destinations, workspace)
            return {
                out.name: self._device.download(out.address, result.nbytes).view(out.dtype).reshape(out.shape)
                for out, result in zip(destinations, results, strict=True)
            }

    def _arrange(self, weights: UnitWeights, subnet: int) -> list[Tensor]:
        """Bring the unit weights of a subnetwork to the front; returns them as inputs of the engine."""
        state = self._weights.state
        ready = [Allocate(name, nbytes) for name, nbytes in weights.buffers.items() if name not in state.buffers]
        filled = weights.fill() if state.unit_order is None else ()
        moves, _ = weights.enter(state.unit_order or weights.stored, subnet)
        self._weights.do((*ready, *filled, *moves), lambda source: self._bundle.weight(str(source.name)))
        return [self._weights.tensor(binding) for binding in weights.bindings(subnet)]

    def longest(self, engine: EngineId, name: str) -> tuple[int, ...]:
        """The largest shape of an input that a loaded engine takes."""
        return self._device.longest(engine, name)

    def _buffer(self, name: str, nbytes: int) -> int:
        address, size = self._buffers.get(name, (0, 0))
        if size < nbytes:
            self._device.idle()
            if size:
                del self._buffers[name]
                self._device.free(address)
            address = self._device.allocate(nbytes)
            self._buffers[name] = (address, nbytes)
        return address

    def close(self) -> None:
        """Free buffers, engines and the device."""
        with self._lock:
            try:
                with self._device.activate():
                    self._free()
            finally:
                self._device.close()

    def _free(self) -> None:
        self._device.idle()
        for engine in [engine for engine, users in self._users.items() if users > 0]:
            self._device.unload(engine)
        self._users.clear()
        self._weights.free()
        for address, _ in self._buffers.values():
            self._device.free(address)
        self._buffers.clear()
