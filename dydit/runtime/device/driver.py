"""What runs need of the CUDA driver, as a protocol, and the choice of the package that provides it.

PyCUDA is used where it is installed, `cuda-bindings` everywhere else. PyCUDA has no CUDA graphs; with it, graphs come
from `cuda-bindings` if that is installed too, and runs go on without graphs if not. Both use the primary context of the
first GPU, as PyTorch and ONNX Runtime do, so that all of them work in one process.

Only `dydit.runtime.device.cuda` and `dydit.runtime.device.pinned` call it.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np

from dydit.errors import BackendError, one_line

PYCUDA, BINDINGS = "pycuda.driver", "cuda.bindings.driver"
_PACKAGES = {PYCUDA: "pycuda", BINDINGS: "cuda-bindings"}
INSTALL = "pip install 'dydit[gpu]', or only cuda-bindings, which needs no compiler"


class Driver(Protocol):
    """The driver, on the first GPU. Every method but `push` and `close` needs the context to be current.

    Addresses, streams and graphs are integers: the driver's own handles. An event is whatever `make_event` returns.
    Work is queued on a stream, unless the method is said to wait. Errors are `BackendError`, one line each.
    """

    def push(self) -> None:
        """Make the context current in this thread."""

    def pop(self) -> None:
        """Undo the last `push` of this thread."""

    def free_memory(self) -> int:
        """Bytes of device memory that are free now."""

    def allocate(self, nbytes: int) -> int:
        """Allocate device memory, 256-byte aligned."""

    def free(self, address: int) -> None:
        """Free device memory."""

    def allocate_host(self, nbytes: int) -> np.ndarray:
        """Allocate page-locked host memory, uint8 [nbytes]."""

    def free_host(self, array: np.ndarray) -> None:
        """Free what `allocate_host` returned. The array must not be used any more."""

    def make_stream(self) -> int:
        """A stream that does not wait for the legacy default stream."""

    def destroy_stream(self, stream: int) -> None:
        """Free a stream."""

    def upload(self, to: int, data: np.ndarray, stream: int) -> None:
        """Copy contiguous page-locked memory to the device. It must not change until the copy has run."""

    def download(self, data: np.ndarray, source: int, stream: int) -> None:
        """Copy from the device to contiguous page-locked memory, which holds it once the copy has run."""

    def copy(self, to: int, source: int, nbytes: int, stream: int) -> None:
        """Copy within the device."""

    def clear(self, to: int, nbytes: int, stream: int) -> None:
        """Zero bytes."""

    def make_event(self) -> Any:
        """An event without timing."""

    def destroy_event(self, event: Any) -> None:
        """Free an event."""

    def record(self, event: Any, stream: int) -> None:
        """Record an event at the present end of a stream."""

    def wait(self, stream: int, event: Any) -> None:
        """Make a stream wait for what an event recorded last."""

    def query(self, event: Any) -> bool:
        """Whether the work before an event is done."""

    def synchronize(self, event: Any) -> None:
        """Make the host wait for an event."""

    def synchronize_stream(self, stream: int) -> None:
        """Make the host wait for all work of a stream."""

    def begin_capture(self, stream: int) -> None:
        """Record what this thread queues on a stream from here on, instead of running it."""

    def end_capture(self, stream: int) -> int:
        """Stop recording; the runnable graph of what was recorded."""

    def launch_graph(self, graph: int, stream: int) -> None:
        """Run a graph."""

    def destroy_graph(self, graph: int) -> None:
        """Free a graph that is not running."""

    def close(self) -> None:
        """Release the context. Everything that was allocated must have been freed."""


def is_installed() -> bool:
    """Whether a package with a driver layer is installed. Nothing is imported."""
    return any(_has(name) for name in (PYCUDA, BINDINGS))


def require_driver() -> str:
    """The packages that `open_driver` uses, with their versions. Raises `BackendError` if none can be imported."""
    pycuda, bindings = _import()
    if pycuda is None:
        return _named(BINDINGS)
    return (
        f"{_named(PYCUDA)}, {f'graphs by {_named(BINDINGS)}' if bindings else 'no CUDA graphs without cuda-bindings'}"
    )


def open_driver() -> Driver:
    """The driver of this machine. Raises `BackendError` if no package, NVIDIA driver or GPU is found."""
    pycuda, bindings = _import()
    if pycuda is None:
        from dydit.runtime.device.driver_bindings import BindingsDriver

        return BindingsDriver(bindings)
    from dydit.runtime.device.driver_bindings import Graphs
    from dydit.runtime.device.driver_pycuda import PyCudaDriver

    return PyCudaDriver(pycuda, None if bindings is None else Graphs(bindings))


def _import() -> tuple[Any, Any]:
    """PyCUDA's driver module and that of cuda-bindings, or None; at least one is there."""
    modules: list[Any] = []
    problems = []
    for name in (PYCUDA, BINDINGS):
        try:
            modules.append(importlib.import_module(name))
        except (ImportError, OSError, RuntimeError) as error:
            modules.append(None)
            problems.append(f"{_PACKAGES[name]} cannot be imported ({one_line(error)})")
    if modules == [None, None]:
        raise BackendError(f"{' and '.join(problems)}; {INSTALL}")
    return modules[0], modules[1]


def _has(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _named(name: str) -> str:
    try:
        return f"{_PACKAGES[name]} {version(_PACKAGES[name])}"
    except PackageNotFoundError:
        return _PACKAGES[name]
