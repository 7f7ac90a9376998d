"""An NVIDIA GPU as a `Device`, on a `Driver` and on engines that run on its stream.

The context is current in a thread only inside `activate`. Every call of the driver is made here or in
`dydit.runtime.device.pinned`; the logic of runs is in `dydit.runtime.device.execute`. The tests run all of it on a
driver that is simulated, and that refuses what a real one would.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import numpy as np

from dydit.errors import BackendError, DyditError
from dydit.runtime.device.driver import Driver, open_driver
from dydit.runtime.device.execute import CaptureError, Tensor
from dydit.runtime.device.launches import EngineMemory
from dydit.runtime.device.operations import COMPUTE, COPY, EngineId
from dydit.runtime.device.pinned import PinnedRing

_MIB = 1 << 20


class Engine(Protocol):
    """A loaded engine."""

    @property
    def memory(self) -> EngineMemory:
        """What it needs."""

    def longest(self, name: str) -> tuple[int, ...]:
        """The largest shape of an input that it takes."""

    def launch(
        self,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        workspace: tuple[int, int],
        stream: int,
        capturing: bool,
    ) -> None:
        """Queue one execution on a CUDA stream; `workspace`: address and bytes for its activations."""

    def close(self) -> None:
        """Free it."""


class Engines(Protocol):
    """Loads engines onto the GPU whose context is current."""

    def load(self, engine: EngineId) -> Engine:
        """An engine. Raises `BackendError` where it cannot be loaded."""


class CudaMemory:
    """The first GPU's memory and streams, as `Device` describes. Raises `BackendError` for errors of the driver.

    `driver`: by default the one that is installed.
    """

    def __init__(self, driver: Driver | None = None):
        self._driver = open_driver() if driver is None else driver
        self._memory: set[int] = set()
        self._events: dict[str, Any] = {}
        self._ring = PinnedRing(self._driver)
        with self.activate(), _explained("start"):
            self._streams = {name: self._driver.make_stream() for name in (COMPUTE, COPY)}

    @contextmanager
    def activate(self) -> Iterator[None]:
        with _explained("be used"):
            self._driver.push()
        try:
            yield
        finally:
            self._driver.pop()

    def free_memory(self) -> int:
        with _explained("say how much memory is free"):
            return self._driver.free_memory()

    @property
    def stream(self) -> int:
        """The handle of the compute stream."""
        return self._streams[COMPUTE]

    def allocate(self, nbytes: int) -> int:
        with _explained(f"allocate {nbytes / _MIB:.0f} MiB (use a smaller batch size, or free memory)"):
            address = self._driver.allocate(nbytes)
        self._memory.add(address)
        return address

    def free(self, address: int) -> None:
        self._memory.discard(address)
        with _explained("free memory"):
            self._driver.free(address)

    def upload(self, to: int, data: np.ndarray, stream: str) -> None:
        with _explained("receive data"):
            self._ring.upload(to, data, self._streams[stream])

    def download(self, source: int, nbytes: int) -> np.ndarray:
        with _explained("finish its work"):
            return self._ring.download(source, nbytes, self.stream)

    def copy(self, to: int, source: int, nbytes: int) -> None:
        with _explained("copy data"):
            self._driver.copy(to, source, nbytes, self.stream)

    def clear(self, to: int, nbytes: int) -> None:
        with _explained("clear memory"):
            self._driver.clear(to, nbytes, self.stream)

    def record(self, event: str, stream: str) -> None:
        with _explained("record an event"):
            if event not in self._events:
                self._events[event] = self._driver.make_event()
            self._driver.record(self._events[event], self._streams[stream])

    def wait(self, stream: str, event: str) -> None:
        with _explained("wait for an event"):
            self._driver.wait(self._streams[stream], self._events[event])

    def synchronize(self, event: str) -> None:
        with _explained("finish its work"):
            self._driver.synchronize(self._events[event])

    def idle(self) -> None:
        with _explained("finish its work"):
            for stream in self._streams.values():
                self._driver.synchronize_stream(stream)

    def close(self) -> None:
        """Free all that is left on the device, streams and events too, and release its context."""
        with self.activate():
            with suppress(DyditError):
                self.idle()
            with _explained("free its memory"):
                while self._memory:
                    self._driver.free(self._memory.pop())
                self._ring.close()
                while self._events:
                    self._driver.destroy_event(self._events.popitem()[1])
                while self._streams:
                    self._driver.destroy_stream(self._streams.popitem()[1])
        with _explained("be released"):
            self._driver.close()


class CudaDevice(CudaMemory):
    """The first GPU, with engines that `engines` loads, TensorRT's say."""

    def __init__(self, engines: Engines, driver: Driver | None = None):
        super().__init__(driver)
        self._loader = engines
        self._engines: dict[EngineId, Engine] = {}
        self._graphs: set[int] = set()
        self._capturing = False

    def load(self, engine: EngineId) -> None:
        self._engines[engine] = self._loader.load(engine)

    def unload(self, engine: EngineId) -> None:
        self._engines.pop(engine).close()

    def memory(self, engine: EngineId) -> EngineMemory:
        return self._engines[engine].memory

    def longest(self, engine: EngineId, name: str) -> tuple[int, ...]:
        return self._engines[engine].longest(name)

    def launch(
        self, engine: EngineId, inputs: Sequence[Tensor], outputs: Sequence[Tensor], workspace: tuple[int, int]
    ) -> None:
        self._engines[engine].launch(inputs, outputs, workspace, self.stream, self._capturing)

    def begin_capture(self) -> None:
        with _captured():
            self._driver.begin_capture(self.stream)
        self._capturing = True

    def end_capture(self) -> int:
        with _captured():
            try:
                graph = self._driver.end_capture(self.stream)
            finally:
                self._capturing = False
        self._graphs.add(graph)
        return graph

    def replay(self, graph: int) -> None:
        with _captured():
            self._driver.launch_graph(graph, self.stream)

    def drop(self, graph: int) -> None:
        self._graphs.discard(graph)
        with _captured():
            self._driver.destroy_graph(graph)

    def close(self) -> None:
        with self.activate():
            with suppress(DyditError):
                if self._capturing:  # interrupted before its end
                    self.end_capture()
                self.idle()
            while self._graphs:
                self._driver.destroy_graph(self._graphs.pop())
            while self._engines:
                self._engines.popitem()[1].close()
        super().close()


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Say what the GPU cannot do, before the driver's reason."""
    try:
        yield
    except BackendError as error:
        raise BackendError(f"the GPU cannot {what}: {error}") from error


@contextmanager
def _captured() -> Iterator[None]:
    """Work that can be done without graphs if this fails."""
    try:
        yield
    except BackendError as error:
        raise CaptureError(f"CUDA graphs do not work here: {error}") from error
