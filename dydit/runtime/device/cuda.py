"""An NVIDIA GPU as a `Device`: PyCUDA for context, memory, streams and events, TensorRT for engines.

It uses the device's primary context, as PyTorch and ONNX Runtime do, so that all of them work in one process. The
context is current in a thread only inside `activate`. Streams do not wait for the legacy default stream. PyCUDA
(2026.1) has no CUDA graphs, so the six driver functions that capture and replay them are called directly.

The logic is in `dydit.runtime.device.execute`, which is tested without a GPU.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from dydit.errors import BackendError, one_line
from dydit.runtime.device.engine_runtime import LoadedEngine, Runtime
from dydit.runtime.device.execute import CaptureError, Tensor
from dydit.runtime.device.launches import EngineMemory
from dydit.runtime.device.operations import COMPUTE, COPY, EngineId

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads, PyTorch's say, may allocate meanwhile
_MIB = 1 << 20


class CudaMemory:
    """The first GPU's memory and streams, as `Device` describes. Raises `BackendError` for errors of the driver."""

    def __init__(self) -> None:
        self._cuda = pycuda_driver()
        with self._explained("start"):
            self._cuda.init()
            self._context = self._cuda.Device(0).retain_primary_context()
        self._memory: dict[int, Any] = {}
        self._events: dict[str, Any] = {}
        with self.activate():
            self._streams = {name: self._cuda.Stream(_NON_BLOCKING) for name in (COMPUTE, COPY)}

    @contextmanager
    def activate(self) -> Iterator[None]:
        with self._explained("be used"):
            self._context.push()
        try:
            yield
        finally:
            self._cuda.Context.pop()

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except self._cuda.Error as error:
            raise BackendError(f"the GPU cannot {what}: {one_line(error)}") from error

    def free_memory(self) -> int:
        with self._explained("say how much memory is free"):
            return int(self._cuda.mem_get_info()[0])

    @property
    def stream(self) -> int:
        """The handle of the compute stream."""
        return int(self._streams[COMPUTE].handle)

    def allocate(self, nbytes: int) -> int:
        with self._explained(f"allocate {nbytes / _MIB:.0f} MiB (use a smaller batch size, or free memory)"):
            allocation = self._cuda.mem_alloc(nbytes)
        self._memory[int(allocation)] = allocation
        return int(allocation)

    def free(self, address: int) -> None:
        with self._explained("free memory"):
            self._memory.pop(address).free()

    def upload(self, to: int, data: np.ndarray, stream: str) -> None:
        """Copy contiguous host data. The driver copies pageable memory before it returns."""
        with self._explained("receive data"):
            self._cuda.memcpy_htod_async(to, data, self._streams[stream])

    def download(self, source: int, nbytes: int) -> np.ndarray:
        data = np.empty(nbytes, np.uint8)
        with self._explained("finish its work"):
            self._streams[COMPUTE].synchronize()
            self._cuda.memcpy_dtoh(data, source)
        return data

    def copy(self, to: int, source: int, nbytes: int) -> None:
        with self._explained("copy data"):
            self._cuda.memcpy_dtod_async(to, source, nbytes, self._streams[COMPUTE])

    def clear(self, to: int, nbytes: int) -> None:
        with self._explained("clear memory"):
            self._cuda.memset_d8_async(to, 0, nbytes, self._streams[COMPUTE])

    def record(self, event: str, stream: str) -> None:
        with self._explained("record an event"):
            if event not in self._events:
                self._events[event] = self._cuda.Event(self._cuda.event_flags.DISABLE_TIMING)
            self._events[event].record(self._streams[stream])

    def wait(self, stream: str, event: str) -> None:
        with self._explained("wait for an event"):
            self._streams[stream].wait_for_event(self._events[event])

    def synchronize(self, event: str) -> None:
        with self._explained("finish its work"):
            self._events[event].synchronize()

    def idle(self) -> None:
        with self._explained("finish its work"):
            for stream in self._streams.values():
                stream.synchronize()


class CudaDevice(CudaMemory):
    """The first GPU, with TensorRT engines."""

    def __init__(self, runtime: Runtime):
        super().__init__()
        self._graphs, self._runtime = _DriverGraphs(), runtime
        self._engines: dict[EngineId, LoadedEngine] = {}
        self._capturing = False

    def load(self, engine: EngineId) -> None:
        self._engines[engine] = self._runtime.load(engine)

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
        self._graphs.begin(self.stream)
        self._capturing = True

    def end_capture(self) -> Any:
        self._capturing = False
        return self._graphs.end(self.stream)

    def replay(self, graph: Any) -> None:
        self._graphs.launch(graph, self.stream)

    def drop(self, graph: Any) -> None:
        self._graphs.destroy(graph)


class _DriverGraphs:
    """Capture and replay by the driver API. Handles are integers."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise BackendError(
                "no NVIDIA driver (libcuda) on this machine; use backend='onnxruntime' (--backend onnxruntime)"
            ) from error

    def begin(self, stream: int) -> None:
        """Start recording a stream."""
        self._call("cuStreamBeginCapture_v2", ctypes.c_void_p(stream), ctypes.c_int(_THREAD_LOCAL))

    def end(self, stream: int) -> int:
        """Stop recording, and make the graph runnable."""
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuStreamEndCapture", ctypes.c_void_p(stream), ctypes.byref(graph))
        try:
            self._call("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
        finally:
            self._call("cuGraphDestroy", graph)
        assert executable.value is not None
        return executable.value

    def launch(self, graph: int, stream: int) -> None:
        """Run a graph on a stream."""
        self._call("cuGraphLaunch", ctypes.c_void_p(graph), ctypes.c_void_p(stream))

    def destroy(self, graph: int) -> None:
        """Free a runnable graph."""
        self._call("cuGraphExecDestroy", ctypes.c_void_p(graph))

    def _call(self, function: str, *arguments: Any) -> None:
        if code := getattr(self._library, function)(*arguments):
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(code, ctypes.byref(text))
            reason = (text.value or b"unknown").decode(errors="replace")
            raise CaptureError(f"CUDA graphs do not work here: {function} failed ({code}, {reason})")


def pycuda_driver() -> Any:
    """The module pycuda.driver. Raises `BackendError` with what to install where it is missing."""
    try:
        return importlib.import_module("pycuda.driver")
    except (ImportError, OSError) as error:
        raise BackendError(
            f"pycuda cannot be imported ({one_line(error)}); pip install 'dydit[gpu]' (pip compiles it here, which "
            "needs the CUDA headers)"
        ) from error
