"""The CUDA driver by `cuda-bindings`, NVIDIA's own Python bindings: wheels, no compiler, CUDA graphs.

The module `cuda.bindings.driver` is passed in. It imports without a GPU; libcuda is looked for at the first call.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from dydit.errors import BackendError, one_line

_NON_BLOCKING, _DISABLE_TIMING = 1, 2  # CU_STREAM_NON_BLOCKING, CU_EVENT_DISABLE_TIMING
_NOT_READY = 600  # CUDA_ERROR_NOT_READY
NO_DRIVER = "no NVIDIA driver (libcuda) on this machine; use backend='onnxruntime' (--backend onnxruntime)"


class _Calls:
    """Functions of the module by name: each returns an error code and then its results."""

    def __init__(self, cuda: Any):
        self._cuda = cuda

    def _call(self, function: str, *arguments: Any) -> Any:
        """The only result, or None if there is none. Raises `BackendError` for every error code."""
        code, *results = getattr(self._cuda, function)(*arguments)
        if int(code):
            raise BackendError(f"{function} failed ({int(code)}, {self._reason(code)})")
        return results[0] if results else None

    def _reason(self, code: Any) -> str:
        unknown, text = self._cuda.cuGetErrorString(code)
        return "unknown" if int(unknown) else text.decode(errors="replace")


class Graphs(_Calls):
    """Capture and replay. Streams and graphs are integers, so they may be another package's."""

    def begin(self, stream: int) -> None:
        """Record what this thread queues on a stream. Other threads, PyTorch's say, may allocate meanwhile."""
        self._call("cuStreamBeginCapture", stream, self._cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)

    def end(self, stream: int) -> int:
        """Stop recording, and make the graph runnable."""
        graph = self._call("cuStreamEndCapture", stream)
        try:
            return int(self._call("cuGraphInstantiate", graph, 0))
        finally:
            self._call("cuGraphDestroy", graph)

    def launch(self, graph: int, stream: int) -> None:
        """Run a graph on a stream."""
        self._call("cuGraphLaunch", graph, stream)

    def destroy(self, graph: int) -> None:
        """Free a runnable graph."""
        self._call("cuGraphExecDestroy", graph)


class BindingsDriver(_Calls):
    """`Driver` by the module `cuda.bindings.driver`."""

    def __init__(self, cuda: Any):
        super().__init__(cuda)
        try:
            self._call("cuInit", 0)
            self._device = self._call("cuDeviceGet", 0)
            self._context = self._call("cuDevicePrimaryCtxRetain", self._device)
        except BackendError as error:
            raise BackendError(f"the NVIDIA driver does not start: {error}") from error
        except RuntimeError as error:  # what the bindings raise where there is no libcuda
            raise BackendError(f"{NO_DRIVER} ({one_line(error)})") from error
        self._graphs = Graphs(cuda)

    def push(self) -> None:
        self._call("cuCtxPushCurrent", self._context)

    def pop(self) -> None:
        self._call("cuCtxPopCurrent")

    def free_memory(self) -> int:
        code, free, _ = self._cuda.cuMemGetInfo()
        if int(code):
            raise BackendError(f"cuMemGetInfo failed ({int(code)}, {self._reason(code)})")
        return int(free)

    def allocate(self, nbytes: int) -> int:
        return int(self._call("cuMemAlloc", nbytes))

    def free(self, address: int) -> None:
        self._call("cuMemFree", address)

    def allocate_host(self, nbytes: int) -> np.ndarray:
        address = int(self._call("cuMemHostAlloc", nbytes, 0))
        return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))

    def free_host(self, array: np.ndarray) -> None:
        self._call("cuMemFreeHost", array.ctypes.data)

    def make_stream(self) -> int:
        return int(self._call("cuStreamCreate", _NON_BLOCKING))

    def destroy_stream(self, stream: int) -> None:
        self._call("cuStreamDestroy", stream)

    def upload(self, to: int, data: np.ndarray, stream: int) -> None:
        self._call("cuMemcpyHtoDAsync", to, data.ctypes.data, data.nbytes, stream)

    def download(self, data: np.ndarray, source: int, stream: int) -> None:
        self._call("cuMemcpyDtoHAsync", data.ctypes.data, source, data.nbytes, stream)

    def copy(self, to: int, source: int, nbytes: int, stream: int) -> None:
        self._call("cuMemcpyDtoDAsync", to, source, nbytes, stream)

    def clear(self, to: int, nbytes: int, stream: int) -> None:
        self._call("cuMemsetD8Async", to, 0, nbytes, stream)

    def make_event(self) -> Any:
        return self._call("cuEventCreate", _DISABLE_TIMING)

    def destroy_event(self, event: Any) -> None:
        self._call("cuEventDestroy", event)

    def record(self, event: Any, stream: int) -> None:
        self._call("cuEventRecord", event, stream)

    def wait(self, stream: int, event: Any) -> None:
        self._call("cuStreamWaitEvent", stream, event, 0)

    def query(self, event: Any) -> bool:
        (code,) = self._cuda.cuEventQuery(event)
        if int(code) not in (0, _NOT_READY):
            raise BackendError(f"cuEventQuery failed ({int(code)}, {self._reason(code)})")
        return int(code) == 0

    def synchronize(self, event: Any) -> None:
        self._call("cuEventSynchronize", event)

    def synchronize_stream(self, stream: int) -> None:
        self._call("cuStreamSynchronize", stream)

    def begin_capture(self, stream: int) -> None:
        self._graphs.begin(stream)

    def end_capture(self, stream: int) -> int:
        return self._graphs.end(stream)

    def launch_graph(self, graph: int, stream: int) -> None:
        self._graphs.launch(graph, stream)

    def destroy_graph(self, graph: int) -> None:
        self._graphs.destroy(graph)

    def close(self) -> None:
        self._call("cuDevicePrimaryCtxRelease", self._device)
