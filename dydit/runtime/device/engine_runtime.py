"""TensorRT's part of a device: engines from bytes, execution contexts, launches. For both flavours.

An engine has one context for each set of input shapes that it is launched with. The context's shapes and addresses
must not change while a graph captured from it lives: a graph holds the state of its context (NVIDIA/TensorRT#3798). All
contexts share the same activation memory, which the caller owns, so launches must follow one another on one stream.

Nothing here imports TensorRT: the module is passed in (`dydit.engines.flavour.load_flavour`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dydit.errors import BackendError, one_line
from dydit.runtime.device.execute import CaptureError, Tensor
from dydit.runtime.device.launches import EngineMemory
from dydit.runtime.device.operations import EngineId

ReadEngine = Callable[[EngineId], bytes]
_KEPT_MESSAGES = 3


class Runtime:
    """Loads engines of one flavour. `read` returns their verified bytes; `cache`: what an earlier run compiled."""

    def __init__(self, trt: Any, read: ReadEngine, cache: bytes | None = None):
        self.trt, self._read = trt, read
        self.messages: list[str] = []
        self._runtime = trt.Runtime(_logger(trt, self.messages))
        self._cache_bytes = cache
        self._cache: Any = None
        self.contexts = 0  # number of contexts created

    def load(self, engine: EngineId) -> LoadedEngine:
        """An engine on the device. Raises `BundleError` as `read` does, `BackendError` where TensorRT refuses it."""
        data = self._read(engine)
        self.messages.clear()
        loaded = self._runtime.deserialize_cuda_engine(data)
        if loaded is None:
            raise BackendError(f"{self.trt.__name__} {self.trt.__version__} cannot load {engine}{self.last_messages()}")
        return LoadedEngine(self, engine, loaded, len(data))

    def context(self, engine: Any) -> Any:
        """A context without activation memory of its own; None if TensorRT cannot create it."""
        self.contexts += 1
        user_managed = self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not hasattr(self.trt, "DynamicShapesKernelSpecializationStrategy"):
            return engine.create_execution_context(user_managed)
        # tensorrt-rtx compiles kernels for the actual shapes. EAGER does it at once: done later, during a run, it would
        # change the run's results. Graphs are captured by the caller, not inside TensorRT.
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(user_managed)
        config.cuda_graph_strategy = self.trt.CudaGraphStrategy.DISABLED
        config.dynamic_shapes_kernel_specialization_strategy = self.trt.DynamicShapesKernelSpecializationStrategy.EAGER
        config.set_runtime_cache(self._runtime_cache(config))
        return engine.create_execution_context(config)

    def _runtime_cache(self, config: Any) -> Any:
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            if self._cache_bytes:
                self._cache.deserialize(self._cache_bytes)  # stays empty if the cache is another machine's
        return self._cache

    def compiled(self) -> bytes | None:
        """What this run compiled, for the next one; None if there is nothing new."""
        if self._cache is None:
            return None
        data = bytes(self._cache.serialize())
        return data if data != self._cache_bytes else None

    def last_messages(self) -> str:
        """TensorRT's last errors and warnings, for a message."""
        return f": {one_line(Exception(' '.join(self.messages[-_KEPT_MESSAGES:])))}" if self.messages else ""


class LoadedEngine:
    """A deserialised engine and its contexts."""

    def __init__(self, runtime: Runtime, name: EngineId, engine: Any, nbytes: int):
        self._runtime, self._name, self._engine = runtime, name, engine
        self._contexts: dict[tuple[tuple[str, tuple[int, ...]], ...], _Context] = {}
        self.memory = EngineMemory(int(engine.device_memory_size_v2), nbytes)

    def longest(self, name: str) -> tuple[int, ...]:
        """The largest shape of an input that the engine was built for."""
        return tuple(self._engine.get_tensor_profile_shape(name, 0)[2])

    def launch(
        self,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        workspace: tuple[int, int],
        stream: int,
        capturing: bool,
    ) -> None:
        """Queue one execution on a CUDA stream."""
        if workspace[1] < self.memory.activation:
            raise BackendError(
                f"{self._name} needs a workspace of {self.memory.activation} bytes, but got {workspace[1]}; remove "
                "memory.json from the folder of the engines"
            )
        key = tuple((each.name, each.shape) for each in inputs)
        if key not in self._contexts:
            self._contexts[key] = _Context(self._runtime, self._name, self._engine, inputs)
        self._contexts[key].launch((*inputs, *outputs), workspace, stream, capturing)

    def close(self) -> None:
        """Free the contexts, then the engine."""
        self._contexts.clear()
        self._engine = None


class _Context:
    """An execution context at fixed input shapes. Only what changed is set again."""

    def __init__(self, runtime: Runtime, name: EngineId, engine: Any, inputs: Sequence[Tensor]):
        self._runtime, self._name = runtime, name
        runtime.messages.clear()
        self._context = runtime.context(engine)
        self._require(self._context is not None, "cannot make an execution context")
        self._workspace: tuple[int, int] | None = None
        self._addresses: dict[str, int] = {}
        for tensor in inputs:
            accepted = self._context.set_input_shape(tensor.name, tensor.shape)
            self._require(accepted, f"does not take {tensor.name} of shape {tensor.shape}")

    def launch(self, tensors: Sequence[Tensor], workspace: tuple[int, int], stream: int, capturing: bool) -> None:
        """Queue one execution."""
        self._runtime.messages.clear()
        if self._workspace != workspace:
            address, nbytes = workspace
            self._context.set_device_memory(address, nbytes)
            self._workspace = workspace
        for tensor in tensors:
            if self._addresses.get(tensor.name) != tensor.address:
                accepted = self._context.set_tensor_address(tensor.name, tensor.address)
                self._require(accepted, f"has no input or output {tensor.name}")
                self._addresses[tensor.name] = tensor.address
        if capturing and hasattr(self._context, "is_stream_capturable"):
            capturable = self._context.is_stream_capturable(stream)
            self._require(capturable, "cannot be captured in a CUDA graph", CaptureError)
        self._require(self._context.execute_async_v3(stream), "failed")

    def _require(self, condition: bool, problem: str, kind: type[BackendError] = BackendError) -> None:
        if not condition:
            trt = self._runtime.trt
            raise kind(f"{trt.__name__} {trt.__version__}: {self._name} {problem}{self._runtime.last_messages()}")


def _logger(trt: Any, messages: list[str]) -> Any:
    """A logger that collects warnings and errors."""

    class Collector(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.WARNING:
                messages.append(message)
                del messages[:-_KEPT_MESSAGES]

    return Collector()
