"""ONNX Runtime's CUDA provider on whole runs: inputs and outputs stay on the GPU, bound by their addresses.

The launch plan is the one that TensorRT uses (`dydit.runtime.device`); an engine is here an inference session that
runs on our stream. The provider captures CUDA graphs by itself, one for each set of shapes and addresses of a session.
So the plan holds none, and steps read their inputs at fixed addresses. With graphs every node has to run on the GPU; if
one does not, the session runs without graphs. Releases before microsoft/onnxruntime#28686 make the host wait after each
replay.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dydit.bundle.bundle import Bundle
from dydit.bundle.io_spec import unit_inputs
from dydit.bundle.manifest import Routing
from dydit.dtypes import DTYPES
from dydit.errors import BackendError, one_line
from dydit.runtime.backends.base import BackendOptions
from dydit.runtime.backends.onnxruntime import OnnxRuntimeBackend
from dydit.runtime.backends.session import (
    GRAPHS_OPTION,
    base_options,
    error_types,
    open_session,
    require_provider,
    runtime,
)
from dydit.runtime.device.cuda import CudaMemory
from dydit.runtime.device.driver import Driver, require_driver
from dydit.runtime.device.execute import Executor, Tensor
from dydit.runtime.device.launches import EngineMemory
from dydit.runtime.device.memory_layout import LaunchOptions
from dydit.runtime.device.operations import EngineId
from dydit.runtime.device.residency import engines_of, graph_of
from dydit.runtime.device.whole_runs import DeviceSampler, WholeRunsBackend
from dydit.runtime.resident import default_residency


class _BoundEngine:
    """A session on `device` (`cpu` or `cuda`). `graphs`: let the provider capture CUDA graphs where it can."""

    def __init__(self, file: Path, device: str, options: BackendOptions, stream: int, graphs: bool):
        ort = runtime()
        self._ort, self._device, self._errors = ort, device, error_types(ort)
        self._file, self._options, self._stream = file, options, stream
        self._graphs = graphs and device == "cuda"
        try:
            self._session = self._open()
        except BackendError as error:
            if not self._graphs:
                raise
            self._session = self._open_without_graphs(error)
        require_provider(ort, self._session, device)
        self._captured: dict[tuple[Tensor, ...], int] = {}  # by shapes and addresses

    def _open_without_graphs(self, error: Exception) -> Any:
        warnings.warn(f"{self._file.name} runs without CUDA graphs: {one_line(error)}", stacklevel=2)
        self._graphs = False
        return self._open()

    def _open(self) -> Any:
        values = {"user_compute_stream": str(self._stream), GRAPHS_OPTION: str(int(self._graphs))}
        settings = base_options(self._ort, self._options)
        session, self._weights = open_session(self._ort, self._file, self._device, settings, values)
        return session

    def launch(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], what: str) -> None:
        """Run once, reading and writing memory in place.

        Where that fails with CUDA graphs, which are captured in the first runs, it is tried again without them.
        """
        try:
            self._run(inputs, outputs)
        except self._errors as error:
            if not self._graphs:
                raise BackendError(f"onnxruntime failed in {what}: {one_line(error)}") from error
            self._session = self._open_without_graphs(error)
            self.launch(inputs, outputs, what)

    def _run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        binding = self._session.io_binding()
        for bind, tensors in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for each in tensors:
                dtype = DTYPES[each.dtype].onnx if each.dtype == "bfloat16" else np.dtype(each.dtype)
                bind(each.name, self._device, 0, dtype, list(each.shape), each.address)
        options = self._ort.RunOptions()
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        if self._graphs:
            number = self._captured.setdefault((*inputs, *outputs), len(self._captured) + 1)
            options.add_run_config_entry("gpu_graph_id", str(number))
        self._session.run_with_iobinding(binding, options)


class CudaSessions(CudaMemory):
    """Sessions of the CUDA provider as the engines of a `Device` that captures no graphs of its own."""

    kind = "cuda"

    def __init__(self, bundle: Bundle, options: BackendOptions, graphs: bool = True, driver: Driver | None = None):
        super().__init__(driver)
        self._bundle, self._options, self._graphs = bundle, options, graphs
        self._engines: dict[EngineId, _BoundEngine] = {}

    def load(self, engine: EngineId) -> None:
        manifest = self._bundle.manifest
        # Conditioning has other addresses each time, and repetitions run once: a graph would not be replayed.
        fixed = manifest.routing is not Routing.DYNAMIC and engine.subnet is not None and not engine.full
        graphs = self._graphs and fixed
        file = self._bundle.file(graph_of(manifest, engine))
        self._engines[engine] = _BoundEngine(file, self.kind, self._options, self.stream, graphs)

    def unload(self, engine: EngineId) -> None:
        del self._engines[engine]

    def close(self) -> None:
        self._engines.clear()
        super().close()

    def memory(self, engine: EngineId) -> EngineMemory:
        return session_memory(self._bundle, engine)

    def longest(self, engine: EngineId, name: str) -> tuple[int, ...]:
        return (1 << 30,)

    def launch(
        self, engine: EngineId, inputs: Sequence[Tensor], outputs: Sequence[Tensor], workspace: tuple[int, int]
    ) -> None:
        self._engines[engine].launch(inputs, outputs, str(engine))

    def begin_capture(self) -> None:
        raise NotImplementedError

    def end_capture(self) -> Any:
        raise NotImplementedError

    def replay(self, graph: Any) -> None:
        raise NotImplementedError

    def drop(self, graph: Any) -> None:
        raise NotImplementedError


def session_memory(bundle: Bundle, engine: EngineId) -> EngineMemory:
    """Bytes of the weights that a session holds. Its activations are not counted: onnxruntime allocates them itself.

    With dynamic width, no session holds unit weights.
    """
    manifest, model = bundle.manifest, bundle.manifest.model
    if engine.subnet is not None and not manifest.dynamic_width:
        return EngineMemory(0, manifest.subnets[engine.subnet].weight_bytes)
    sizes = {name: each.nbytes for name, each in manifest.weights.items()}
    texts = sum(nbytes for name, nbytes in sizes.items() if model.is_text(name))
    conditioning = sum(nbytes for name, nbytes in sizes.items() if model.is_conditioning(name))
    if engine.subnet is None:
        return EngineMemory(0, texts if engine.texts else conditioning - texts)
    units = sum(sizes[spec.name] for spec in unit_inputs(manifest.weights, model))
    return EngineMemory(0, sum(sizes.values()) - conditioning - units)


class OnnxRuntimeDeviceBackend(WholeRunsBackend, OnnxRuntimeBackend):
    """The ONNX Runtime backend with whole runs on the device; single steps are those of `OnnxRuntimeBackend`.

    Needs onnxruntime-gpu, and PyCUDA or cuda-bindings. `graphs`: let the provider capture CUDA graphs where it can.
    `sessions`: the device of whole runs.
    """

    sessions: type[CudaSessions] = CudaSessions

    def __init__(self, bundle: Bundle, options: BackendOptions | None = None, graphs: bool = True):
        super().__init__(bundle, options)
        self._graphs = graphs
        if self.sessions is CudaSessions:
            require_driver()

    def _make_sampler(self) -> DeviceSampler:
        manifest = self.bundle.manifest
        memory = {engine: session_memory(self.bundle, engine) for engine in engines_of(manifest)}
        options = LaunchOptions(graphs=False, fixed=True, resident=default_residency(manifest))
        executor = Executor(self.sessions(self.bundle, self.options, self._graphs))
        return DeviceSampler(executor, self.bundle, memory, options)

    def _free(self) -> None:
        super()._free()
        self._clear_runs()
