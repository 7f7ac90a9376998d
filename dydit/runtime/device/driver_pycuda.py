"""The CUDA driver by PyCUDA. The module `pycuda.driver` is passed in.

PyCUDA has no CUDA graphs: those come from `cuda-bindings`, on the same streams.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np

from dydit.errors import BackendError, one_line
from dydit.runtime.device.driver_bindings import Graphs

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
_MOST = 1 << 30  # bytes: PyCUDA takes the sizes of copies within the device and of fills as 32-bit numbers
NO_GRAPHS = "PyCUDA has none; pip install cuda-bindings"


class PyCudaDriver:
    """`Driver` by PyCUDA. `graphs`: those of cuda-bindings, if it is installed."""

    def __init__(self, cuda: Any, graphs: Graphs | None = None):
        self._cuda, self._graphs = cuda, graphs
        try:
            self._context = _primary_context(cuda)
        except cuda.Error as error:
            raise BackendError(f"the NVIDIA driver does not start: {one_line(error)}") from error
        self._memory: dict[int, Any] = {}
        self._streams: dict[int, Any] = {}

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except self._cuda.Error as error:
            raise BackendError(one_line(error)) from error

    def push(self) -> None:
        with self._explained():
            self._context.push()

    def pop(self) -> None:
        with self._explained():
            self._cuda.Context.pop()

    def free_memory(self) -> int:
        with self._explained():
            return int(self._cuda.mem_get_info()[0])

    def allocate(self, nbytes: int) -> int:
        with self._explained():
            allocation = self._cuda.mem_alloc(nbytes)
        self._memory[int(allocation)] = allocation
        return int(allocation)

    def free(self, address: int) -> None:
        with self._explained():
            self._memory.pop(address).free()

    def allocate_host(self, nbytes: int) -> np.ndarray:
        with self._explained():
            array: np.ndarray = self._cuda.pagelocked_empty(nbytes, np.uint8)
        return array

    def free_host(self, array: np.ndarray) -> None:
        allocation: Any = array.base
        with self._explained():
            allocation.free()

    def make_stream(self) -> int:
        with self._explained():
            stream = self._cuda.Stream(_NON_BLOCKING)
        self._streams[int(stream.handle)] = stream
        return int(stream.handle)

    def destroy_stream(self, stream: int) -> None:
        del self._streams[stream]

    def upload(self, to: int, data: np.ndarray, stream: int) -> None:
        with self._explained():
            self._cuda.memcpy_htod_async(to, data, self._streams[stream])

    def download(self, data: np.ndarray, source: int, stream: int) -> None:
        with self._explained():
            self._cuda.memcpy_dtoh_async(data, source, self._streams[stream])

    def copy(self, to: int, source: int, nbytes: int, stream: int) -> None:
        def part(offset: int, size: int) -> None:
            self._cuda.memcpy_dtod_async(to + offset, source + offset, size, self._streams[stream])

        self._in_parts(part, nbytes)

    def clear(self, to: int, nbytes: int, stream: int) -> None:
        def part(offset: int, size: int) -> None:
            self._cuda.memset_d8_async(to + offset, 0, size, self._streams[stream])

        self._in_parts(part, nbytes)

    def _in_parts(self, part: Callable[[int, int], None], nbytes: int) -> None:
        with self._explained():
            for offset in range(0, nbytes, _MOST):
                part(offset, min(_MOST, nbytes - offset))

    def make_event(self) -> Any:
        with self._explained():
            return self._cuda.Event(self._cuda.event_flags.DISABLE_TIMING)

    def destroy_event(self, event: Any) -> None:
        """Nothing to do: PyCUDA destroys an event that nobody holds."""

    def record(self, event: Any, stream: int) -> None:
        with self._explained():
            event.record(self._streams[stream])

    def wait(self, stream: int, event: Any) -> None:
        with self._explained():
            self._streams[stream].wait_for_event(event)

    def query(self, event: Any) -> bool:
        with self._explained():
            return bool(event.query())

    def synchronize(self, event: Any) -> None:
        with self._explained():
            event.synchronize()

    def synchronize_stream(self, stream: int) -> None:
        with self._explained():
            self._streams[stream].synchronize()

    def begin_capture(self, stream: int) -> None:
        self._with_graphs().begin(stream)

    def end_capture(self, stream: int) -> int:
        return self._with_graphs().end(stream)

    def launch_graph(self, graph: int, stream: int) -> None:
        self._with_graphs().launch(graph, stream)

    def destroy_graph(self, graph: int) -> None:
        self._with_graphs().destroy(graph)

    def _with_graphs(self) -> Graphs:
        if self._graphs is None:
            raise BackendError(NO_GRAPHS)
        return self._graphs

    def close(self) -> None:
        """Nothing to do: the context stays, as `_primary_context` says."""


@cache
def _primary_context(cuda: Any) -> Any:
    """The primary context of the first GPU, kept until the process ends.

    PyCUDA makes a context current to release it, and leaves a primary one current in that thread.
    """
    cuda.init()
    return cuda.Device(0).retain_primary_context()
