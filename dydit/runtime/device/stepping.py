"""One execution of an engine at a time, with feeds and results on the host: for parity and the generic loop."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from dydit.bundle.bundle import Bundle
from dydit.bundle.io_spec import TensorSpec
from dydit.runtime.device.execute import Device, Executor, Tensor
from dydit.runtime.device.inputs import StoredWeights
from dydit.runtime.device.launches import WORKSPACE
from dydit.runtime.device.operations import COMPUTE, Allocate, EngineId
from dydit.runtime.device.slots import Slots


class Stepper:
    """Runs engines on a device.

    Buffers grow to the largest feeds and stay until `close`. Engines may be loaded in another thread, and more than
    once; the last `unload` frees one.
    """

    def __init__(self, device: Device, bundle: Bundle):
        self._device, self._bundle = device, bundle
        self._weights = Executor(device)
        self._slots = Slots(bundle.manifest) if bundle.manifest.sliding else None
        self._buffers: dict[str, tuple[int, int]] = {}
        self._users: Counter[EngineId] = Counter()
        self._lock = threading.Lock()

    def load(self, engine: EngineId) -> None:
        """Load an engine, unless it is there."""
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
        """Every output by name; `sizes` are the values of the specs' symbols.

        `subnet`: the subnetwork that runs, whose weights come to the front with a sliding plan.
        """
        with self._device.activate():
            inputs = [] if self._slots is None or subnet is None else self._slide(self._slots, subnet)
            for name, feed in feeds.items():
                array = np.asarray(feed, order="C")
                inputs.append(Tensor(name, array.dtype.name, array.shape, self._buffer(f"in.{name}", array.nbytes)))
                self._device.upload(inputs[-1].address, array, COMPUTE)
            results = [np.empty(spec.concrete(sizes), spec.dtype) for spec in outputs]
            places = [
                Tensor(spec.name, spec.dtype, result.shape, self._buffer(f"out.{spec.name}", result.nbytes))
                for spec, result in zip(outputs, results, strict=True)
            ]
            need = self._device.memory(engine).activation
            workspace = (self._buffer(WORKSPACE, need), self._buffers[WORKSPACE][1]) if need else (0, 0)
            self._device.launch(engine, inputs, places, workspace)
            return {
                place.name: self._device.download(place.address, result.nbytes).view(place.dtype).reshape(place.shape)
                for place, result in zip(places, results, strict=True)
            }

    def _slide(self, slots: Slots, subnet: int) -> list[Tensor]:
        """The weight inputs of a subnetwork, moved to where it reads them."""
        state = self._weights.state
        ready = [Allocate(name, nbytes) for name, nbytes in slots.buffers.items() if name not in state.buffers]
        filled = slots.fill() if state.places is None else ()
        moves, _ = slots.enter(state.places or slots.stored, subnet)
        self._weights.do((*ready, *filled, *moves), StoredWeights(self._bundle))
        return [self._weights.tensor(binding) for binding in slots.bindings(subnet)]

    def longest(self, engine: EngineId, name: str) -> int:
        """The largest first dimension of an input of a loaded engine."""
        return self._device.longest(engine, name)[0]

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
        """Free buffers and engines."""
        with self._lock, self._device.activate():
            self._device.idle()
            for engine in [engine for engine, users in self._users.items() if users > 0]:
                self._device.unload(engine)
            self._users.clear()
            self._weights.close()
            for address, _ in self._buffers.values():
                self._device.free(address)
            self._buffers.clear()
