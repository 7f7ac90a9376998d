"""TensorRT's part of a device: engines from bytes, execution contexts, launches. For both flavours.

An engine has one context for each set of input shapes that it is launched with, on the optimization profile that suits
them best. The context's shapes and addresses must not change while a graph captured from it lives: a graph holds the
state of its context (NVIDIA/TensorRT#3798). All contexts share the same activation memory, which the caller owns, so
launches must follow one another on one stream.
Everything but `Runtime()` needs a current CUDA context.

Nothing here imports TensorRT: the module is passed in (`dydit.engines.flavour.load_flavour`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from dydit.errors import BackendError, one_line
from dydit.runtime.device.execute import CaptureError, Tensor
from dydit.runtime.device.launches import EngineMemory
from dydit.runtime.device.operations import EngineId

ReadEngine = Callable[[EngineId], bytes]
_KEPT_MESSAGES = 3
_LOGGER = logging.getLogger(__name__)
_REASONS = {
    "VERSION_MISMATCH": "another version built it; run `dydit build` again",
    "UNSUPPORTED_CC": "this GPU's compute capability is not supported",
    "OLD_CUDA_DRIVER": "the NVIDIA driver is too old; update it",
    "OLD_CUDA_RUNTIME": "the CUDA runtime is too old; update it",
    "INSUFFICIENT_GPU_MEMORY": "the GPU has too little memory; use a smaller batch size, or free memory",
    "MALFORMED_ENGINE": "it is not an engine; run `dydit build` again",
    "CUDA_ERROR": "CUDA's driver or runtime does not work; run `dydit doctor`",
}
"""What `EngineInvalidityDiagnostics` of tensorrt_rtx means."""


class Runtime:
    """Loads engines of one flavour. `read` returns their verified bytes; `cache`: what an earlier run compiled."""

    def __init__(self, trt: Any, read: ReadEngine, cache: bytes | None = None):
        self.trt, self._read = trt, read
        self.messages: list[str] = []
        self._runtime = trt.Runtime(_logger(trt, self.messages))
        self._cache_bytes = cache
        self._cache: Any = None
        self._cache_works = True
        self.contexts = 0  # number of contexts created

    def load(self, engine: EngineId) -> LoadedEngine:
        """An engine on the device. Raises `BundleError` as `read` does, `BackendError` where TensorRT refuses it."""
        data = self._read(engine)
        self.messages.clear()
        self._require_valid(engine, data)
        loaded = self._runtime.deserialize_cuda_engine(data)
        if loaded is None:
            raise BackendError(f"{self.trt.__name__} {self.trt.__version__} cannot load {engine}{self.last_messages()}")
        return LoadedEngine(self, engine, loaded, len(data))

    def _require_valid(self, engine: EngineId, data: bytes) -> None:
        """Raise `BackendError` with TensorRT's reasons if it says that an engine does not run here.

        Only TensorRT for RTX can say that without loading the engine.
        """
        if not hasattr(self._runtime, "get_engine_validity"):
            return
        validity, diagnostics = self._runtime.get_engine_validity(data)
        if validity == self.trt.EngineValidity.INVALID:
            known = self.trt.EngineInvalidityDiagnostics.__members__
            reasons = [text for name, text in _REASONS.items() if name in known and int(known[name]) & int(diagnostics)]
            if not reasons and not self.messages:
                reasons = [f"its diagnostics are {int(diagnostics):#x}"]
            why = f": {' and '.join(reasons)}" if reasons else ""
            raise BackendError(
                f"{self.trt.__name__} {self.trt.__version__} cannot load {engine}{why}{self.last_messages()}"
            )

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
        # Without the cache, kernels are compiled again in the next process, and nothing else changes.
        self._cache_works = bool(config.set_runtime_cache(self._runtime_cache(config))) and self._cache_works
        return engine.create_execution_context(config)

    def _runtime_cache(self, config: Any) -> Any:
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            if self._cache_bytes and not self._cache.deserialize(self._cache_bytes):
                _LOGGER.info("the runtime cache is of another GPU, driver or version; kernels are compiled again")
        return self._cache

    def compiled(self) -> bytes | None:
        """What this run compiled, for the next one; None if there is nothing new, or TensorRT cannot save it."""
        if self._cache is None or not self._cache_works:
            return None
        serialized = self._cache.serialize()
        if serialized is None:
            return None
        data = bytes(serialized)
        return data if data and data != self._cache_bytes else None

    def last_messages(self) -> str:
        """TensorRT's last errors and warnings, for a message."""
        return f": {one_line(Exception(' '.join(self.messages[-_KEPT_MESSAGES:])))}" if self.messages else ""


class LoadedEngine:
    """A deserialised engine and its contexts."""

    def __init__(self, runtime: Runtime, name: EngineId, engine: Any, nbytes: int):
        self._runtime, self._name, self._engine = runtime, name, engine
        self._contexts: dict[tuple[tuple[str, tuple[int, ...]], ...], _Context] = {}
        self.memory = EngineMemory(int(engine.device_memory_size_v2), nbytes)
        self._profiles = int(engine.num_optimization_profiles)

    def longest(self, name: str) -> tuple[int, ...]:
        """The largest shape of an input that the engine was built for."""
        shapes = [self._engine.get_tensor_profile_shape(name, index)[2] for index in range(self._profiles)]
        return tuple(map(max, *shapes)) if len(shapes) > 1 else tuple(shapes[0])

    def _profile(self, inputs: Sequence[Tensor]) -> int | None:
        """The profile to run on; None if there is only one. Where none takes the inputs, the last.

        Of those that take them, the first of those that are tuned for at least as much in the most dimensions: the
        profiles of a text graph differ only in what they are tuned for.
        """
        if self._profiles == 1:
            return None
        suitable = []
        for index in range(self._profiles):
            sizes = [size for each in inputs for size in self._sizes(each, index)]
            if all(low <= size <= high for size, low, _, high in sizes):
                suitable.append((sum(size <= opt for size, _, opt, _ in sizes), -index))
        return -max(suitable)[1] if suitable else self._profiles - 1

    def _sizes(self, each: Tensor, profile: int) -> list[tuple[int, int, int, int]]:
        """Each dimension of an input: its size, and the least, tuned and largest; none if it has one shape alone."""
        extent = [tuple(shape) for shape in self._engine.get_tensor_profile_shape(each.name, profile)]
        return list(zip(each.shape, *extent, strict=True)) if extent else []

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
            if capturing:
                raise CaptureError(f"{self._name} was not run with these shapes before it was captured in a CUDA graph")
            profile = self._profile(inputs)
            self._contexts[key] = _Context(self._runtime, self._name, self._engine, inputs, profile, stream)
        self._contexts[key].launch((*inputs, *outputs), workspace, stream, capturing)

    def close(self) -> None:
        """Free the contexts, then the engine."""
        self._contexts.clear()
        self._engine = None


class _Context:
    """An execution context at fixed input shapes, on a profile if there are several. Only what changed is set again."""

    def __init__(
        self,
        runtime: Runtime,
        name: EngineId,
        engine: Any,
        inputs: Sequence[Tensor],
        profile: int | None,
        stream: int,
    ):
        self._runtime, self._name = runtime, name
        runtime.messages.clear()
        self._context = runtime.context(engine)
        self._require(self._context is not None, "cannot make an execution context")
        self._capturable: bool | None = None
        self._workspace: tuple[int, int] | None = None
        self._addresses: dict[str, int] = {}
        if profile is not None:  # on the stream of the launches, so that nothing has to wait
            self._require(self._context.set_optimization_profile_async(profile, stream), f"has no profile {profile}")
        for tensor in inputs:
            accepted = self._context.set_input_shape(tensor.name, tensor.shape)
            self._require(accepted, f"does not take {tensor.name} of shape {tensor.shape}")

    def launch(self, tensors: Sequence[Tensor], workspace: tuple[int, int], stream: int, capturing: bool) -> None:
        """Queue one execution.

        Whether a context can be captured is asked before: TensorRT does not say it while a stream is captured. So a
        context must have run once before.
        """
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
        if capturing:
            self._require(self._capturable, "cannot be captured in a CUDA graph", CaptureError)
            self._require(self._context.execute_async_v3(stream), "failed in a CUDA graph", CaptureError)
            return
        if self._capturable is None:
            ask = getattr(self._context, "is_stream_capturable", None)  # only TensorRT for RTX has it
            self._capturable = ask is None or bool(ask(stream))
        self._require(self._context.execute_async_v3(stream), "failed")

    def _require(self, condition: bool | None, problem: str, kind: type[BackendError] = BackendError) -> None:
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
