"""PyTorch on whole runs: the device-resident loop with engines in PyTorch, captured as CUDA graphs.

The launch plan is the one that TensorRT uses (`dydit.runtime.device`). PyTorch queues on the device's compute stream
and records the graphs, because its allocator has to know of them: all graphs share one private pool. They run one after
another on one stream, and what an engine computes is copied to the run's buffers within its graph, so nothing in the
pool outlives a graph.

Single steps, and the decoder, are those of `dydit.runtime.backends.torch`.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch

from dydit.bundle.bundle import Bundle
from dydit.bundle.manifest import Routing
from dydit.errors import BackendError, one_line
from dydit.models.pointwise import PLAIN, fused
from dydit.runtime.backends.base import BackendOptions
from dydit.runtime.backends.torch import TorchBackend
from dydit.runtime.device.driver import require_driver
from dydit.runtime.device.execute import CaptureError, Executor
from dydit.runtime.device.memory_layout import LaunchOptions
from dydit.runtime.device.torch_engines import TorchEngines, engine_memory
from dydit.runtime.device.whole_runs import DeviceSampler, WholeRunsBackend
from dydit.runtime.resident import default_residency


class CudaTorch(TorchEngines):
    """The first GPU, with engines in PyTorch."""

    kind = "cuda"

    _graph: Any = None

    @cached_property
    def _stream(self) -> Any:
        return torch.cuda.ExternalStream(self.stream)

    @cached_property
    def _pool(self) -> Any:
        return torch.cuda.graph_pool_handle()

    def allocate(self, nbytes: int) -> int:
        try:
            return super().allocate(nbytes)
        except BackendError:
            torch.cuda.empty_cache()  # what PyTorch keeps for later is of no use to the driver
            return super().allocate(nbytes)

    def begin_capture(self) -> None:
        with self._recording():
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")  # other threads may allocate
        self._graph, self.failure = graph, CaptureError

    def end_capture(self) -> Any:
        graph, self._graph, self.failure = self._graph, None, BackendError
        with self._recording():
            graph.capture_end()
        return graph

    def replay(self, graph: Any) -> None:
        with self._recording():
            graph.replay()

    def drop(self, graph: Any) -> None:
        with self._recording():
            graph.reset()

    @contextmanager
    def _recording(self) -> Iterator[None]:
        try:
            with torch.cuda.stream(self._stream):
                yield
        except RuntimeError as error:
            raise CaptureError(f"CUDA graphs of PyTorch do not work here: {one_line(error)}") from error

    def _queued(self) -> AbstractContextManager[object]:
        stack = ExitStack()
        stack.enter_context(super()._queued())
        stack.enter_context(torch.cuda.stream(self._stream))
        stack.enter_context(without_tf32())
        return stack


@contextmanager
def without_tf32() -> Iterator[None]:
    """fp32 products are not rounded to TF32: routing decisions depend on them."""
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [each.allow_tf32 for each in settings]
    try:
        for each in settings:
            each.allow_tf32 = False
        yield
    finally:
        for each, value in zip(settings, before, strict=True):
            each.allow_tf32 = value


class TorchDeviceBackend(WholeRunsBackend, TorchBackend):
    """The PyTorch backend with whole runs on the device; single steps are those of `TorchBackend`.

    Needs a CUDA build of PyTorch, and PyCUDA or cuda-bindings. `graphs`: capture steps as CUDA graphs. `fuse`:
    compile what is between products, which takes some seconds once and needs Triton, a part of PyTorch's CUDA builds;
    by default where it is installed. `engines`: the device of whole runs.

    A bundle with dynamic routing runs with all tokens in its MLPs, because the number of routed tokens is known only to
    the GPU: no token is dropped, and none is saved.
    """

    engines: type[TorchEngines] = CudaTorch

    def __init__(
        self, bundle: Bundle, options: BackendOptions | None = None, graphs: bool = True, fuse: bool | None = None
    ):
        super().__init__(bundle, options)
        self._graphs = graphs
        self._fuse = importlib.util.find_spec("triton") is not None if fuse is None else fuse
        if self.engines is CudaTorch:
            require_driver()

    def _make_sampler(self) -> DeviceSampler:
        manifest = self.bundle.manifest
        if manifest.routing is Routing.DYNAMIC:
            warnings.warn(
                "this bundle has dynamic routing, of which whole runs of torch on a GPU compute all tokens; export it "
                "with --routing capacity to save those that are not routed",
                stacklevel=4,
            )
        pointwise = fused() if self._fuse else PLAIN
        device: Any = self.engines(self.bundle, self._weights, self.settings, pointwise)
        options = LaunchOptions(
            graphs=self._graphs, fixed=True, fixed_shapes=True, resident=default_residency(manifest)
        )
        return DeviceSampler(Executor(device), self.bundle, engine_memory(manifest), options)

    def replay(self, batch: int, rows: int) -> int:
        """Queue all captured steps of an earlier run again, as `Executor.replay` does; returns their number."""
        segments = self.bundle.manifest.plan.segments
        return self.executor.replay([each.subnet for each in segments for _ in each.steps], batch, rows)

    @property
    def executor(self) -> Executor:
        """What whole runs left on the device, for measuring. Raises `BackendError` before the first of them."""
        if self._made_sampler is None:
            raise BackendError("nothing ran yet: sample a run first")
        return self._made_sampler.executor

    def _free(self) -> None:
        self._clear_runs()
        super()._free()
