"""The ONNX Runtime backend: one inference session per subnetwork, on the CPU or through the CUDA provider.

Many sessions live in one process, so none may hold what it does not need while idle (figures: DiT-S/2, two cores):

- a batch of as many images as threads is shared out (`dydit.runtime.backends.sharing`);
- threads do not spin: with other work on the machine spinning made a step twice as slow (310 against 145 ms);
- no memory arena: each would keep the activations of its largest step (24 MB for one image), to save 1.5 % of time;
- weights stay one shared map of `weights.bin`, unless `BackendOptions.packed` asks for each session's own copy. The CPU
  multiplies fp16 as fp32; a layer is widened when its turn comes, not the whole subnetwork when it is loaded: less
  memory and loading, for somewhat longer steps (`benchmarks/xl.py` measures it).
- conditioning, a third of the weights and seldom needed, has a session only while it is evaluated.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from dydit.bundle.bundle import Bundle
from dydit.bundle.graph_io import residual_name, token_mask_name
from dydit.bundle.manifest import CONDITIONING, Routing
from dydit.bundle.stored import Precision
from dydit.errors import BackendError, one_line
from dydit.runtime.backends.base import Arrays, Backend, BackendOptions, StepResult, Subnet
from dydit.runtime.backends.int8 import require_exact_products
from dydit.runtime.backends.sessions import open_session
from dydit.runtime.backends.sharing import Sharing
from dydit.runtime.sliding import SlidingWeights

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
CUDA_OPTIONS = {"use_tf32": "0"}
"""On by default; it would let fp32 products, on which routing decisions hang, round to 10 bits."""
_ERRORS = (
    *("Fail", "InvalidArgument", "NoSuchFile", "NoModel", "EngineError", "RuntimeException", "InvalidProtobuf"),
    *("ModelLoaded", "NotImplemented", "InvalidGraph", "EPFail", "ModelLoadCanceled", "ModelRequiresCompilation"),
)


class OnnxRuntimeSubnet(Subnet):
    """A session on a subnetwork's graph; with a sliding plan, the session of all, and the weights that slide."""

    def __init__(
        self,
        bundle: Bundle,
        index: int,
        open_session: Callable[[bool], _Session],
        sharing: Sharing | None,
        debug: bool,
        weights: SlidingWeights | None = None,
    ):
        super().__init__(bundle, index)
        self._model, self._debug, self._weights = bundle.manifest.model, debug, weights
        self._open_session, self._sharing = open_session, sharing
        self._session: _Session | None = None
        self._apart = False
        self._ready()

    def _ready(self) -> _Session:
        """The session, of one thread where threads have images of their own; another one when that has changed."""
        apart = self._sharing is not None and self._sharing.apart
        if self._session is None or apart != self._apart:
            self._session = None  # two would be twice the memory
            self._session, self._apart = self._open_session(apart), apart
        return self._session

    def _step(self, feeds: Arrays) -> StepResult:
        session = self._ready()
        if self._weights is not None:
            feeds = {**feeds, **self._weights.feeds(self.entry)}
        if self._sharing is not None:
            x_prev = self._sharing.run(feeds, lambda each: session.run(each, self.what))
            return StepResult(x_prev, np.zeros(self._model.depth, np.int64))
        out = session.run(feeds, self.what)
        overflow = out.get("token_overflow", np.zeros(self._model.depth, np.int64))
        if not self._debug:
            return StepResult(out["x_prev"], overflow)
        rows, blocks = feeds["modulation"].shape[0], range(self._model.depth)
        everything = np.ones(rows * self._model.tokens, bool)
        tokens = np.stack([out.get(token_mask_name(b), everything).reshape(rows, -1) for b in blocks])
        return StepResult(out["x_prev"], overflow, tokens, np.stack([out[residual_name(b)] for b in blocks]))

    def close(self) -> None:
        super().close()
        self._session = None


class OnnxRuntimeBackend(Backend):
    """Needs `onnxruntime` or `onnxruntime-gpu`, and for `debug` also the package onnx. No PyTorch."""

    name = "onnxruntime"

    def __init__(self, bundle: Bundle, options: BackendOptions | None = None):
        super().__init__(bundle, options)
        self._sessions: dict[tuple[str, bool, bool], _Session] = {}
        self._sharing = Sharing(bundle.manifest.model, self.options.threads)
        self._loading = threading.Lock()  # the next subnetwork is loaded in the background
        provider = PROVIDERS[self.options.device]
        if provider not in runtime().get_available_providers():
            raise BackendError(
                f"this onnxruntime has no {provider}; pip uninstall onnxruntime, then pip install 'dydit[gpu]', "
                "or use --device cpu"
            )
        _require_precision(bundle.manifest.precision, self.options.device)
        if self.options.device == "cuda":
            load_cuda_libraries(runtime())

    def _conditioning(self, feeds: Arrays) -> np.ndarray:
        session = self._conditioner if self.options.device == "cuda" else self._open_conditioning()
        return session.run(feeds, "conditioning")["modulation"]

    @cached_property
    def _conditioner(self) -> _Session:
        return self._open_conditioning()

    def _open_conditioning(self) -> _Session:
        options = dataclasses.replace(self.options, packed=False)
        return _Session(self.bundle.file(CONDITIONING), options, lazy=options.device == "cpu", gives="modulation")

    def expect(self, images: int) -> None:
        self._sharing.expected = images

    def subnet(self, index: int, full_capacity: bool = False, debug: bool = False) -> Subnet:
        entry = self.bundle.manifest.subnets[index]
        file = entry.full_file if full_capacity and entry.full_file else entry.file
        load, weights = self._load, None
        if self.bundle.manifest.sliding:
            load, weights = self._load_shared, self._sliding
        sharing = None if debug else self._shared_out
        return OnnxRuntimeSubnet(self.bundle, index, partial(load, file, debug), sharing, debug, weights)

    @cached_property
    def _sliding(self) -> SlidingWeights:
        return SlidingWeights(self.bundle)

    @property
    def _lazy(self) -> bool:
        """Whether fp16 weights are widened when they are multiplied, which only the CPU does."""
        cpu, half = self.options.device == "cpu", self.bundle.manifest.precision is Precision.FP16
        return cpu and half and not self.options.packed

    @property
    def _shared_out(self) -> Sharing | None:
        """Not where a batch shares its token slots, or every run would widen weights for itself."""
        by_capacity = self.bundle.manifest.routing is Routing.CAPACITY
        return None if by_capacity or self._lazy or self.options.device != "cpu" else self._sharing

    def _load_shared(self, name: str, debug: bool, apart: bool) -> _Session:
        """The one session of a sliding plan."""
        with self._loading:
            if (name, debug, apart) not in self._sessions:
                self._sessions.pop((name, debug, not apart), None)
                self._sessions[name, debug, apart] = self._load(name, debug, apart)
            return self._sessions[name, debug, apart]

    def _load(self, name: str, debug: bool, apart: bool) -> _Session:
        file = self.bundle.file(name)
        graph = _with_debug_outputs(file, self.bundle.manifest.model.depth) if debug else None
        # Of 8-bit products this optimiser would make fp32 ones.
        left_out = ("MatMulAddFusion",) if self.bundle.manifest.precision.is_calibrated else ()
        options = dataclasses.replace(self.options, threads=1) if apart else self.options
        return _Session(file, options, graph, left_out, self._lazy)


class _Session:
    """An InferenceSession on a file of a bundle, whose errors are one line.

    `graph` replaces the file's content; `left_out` are optimisers not to run. `lazy`: fp16 weights stay as they are
    until they are multiplied, instead of all being widened when the session is made; only few optimisers leave them.
    `gives`: an output that the graph must have.
    """

    def __init__(
        self,
        file: Path,
        options: BackendOptions,
        graph: bytes | None = None,
        left_out: tuple[str, ...] = (),
        lazy: bool = False,
        gives: str = "x_prev",
    ):
        ort = runtime()
        self._errors = _error_types(ort)
        settings = ort.SessionOptions()
        settings.log_severity_level = 3
        settings.intra_op_num_threads = options.threads
        settings.enable_cpu_mem_arena = False
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if lazy:
            settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
            left_out = (*left_out, "ConstantFolding")
        if not options.packed:
            settings.add_session_config_entry("session.disable_prepacking", "1")
        try:
            provider = PROVIDERS[options.device]
            more = {"disabled_optimizers": list(left_out)} if left_out else {}
            chosen = [(provider, CUDA_OPTIONS)] if options.device == "cuda" else [provider]
            self._session, self._weights = open_session(ort, file, settings, chosen, graph, **more)
        except self._errors as error:
            raise BackendError(f"onnxruntime {ort.__version__} cannot load {file}: {one_line(error)}") from error
        if provider not in self._session.get_providers():
            raise BackendError(
                f"onnxruntime {ort.__version__} could not start its {provider} (driver, CUDA or cuDNN missing?); "
                "pip install 'dydit[gpu]', or use --device cpu"
            )
        self._outputs = [output.name for output in self._session.get_outputs()]
        if gives not in self._outputs:
            raise BackendError(f"{file} is another graph: it has no output {gives}; export the bundle again")

    def run(self, feeds: Arrays, what: str) -> dict[str, np.ndarray]:
        """Every output by name."""
        try:
            return dict(zip(self._outputs, self._session.run(None, dict(feeds)), strict=True))
        except self._errors as error:
            raise BackendError(f"onnxruntime failed in {what}: {one_line(error)}") from error


def runtime() -> Any:
    """The module onnxruntime. Raises `BackendError` with what to install where it is missing."""
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(
            f"onnxruntime cannot be imported ({one_line(error)}); pip install 'dydit[cpu]', or 'dydit[gpu]' for CUDA"
        ) from error
    return onnxruntime


def load_cuda_libraries(ort: Any) -> None:
    """Load CUDA and cuDNN from where pip put them: the loader of shared libraries does not look there by itself."""
    if hasattr(ort, "preload_dlls"):  # since 1.21
        ort.preload_dlls()


def _require_precision(precision: Precision, device: str) -> None:
    if device == "cpu" and precision is Precision.BF16:
        raise BackendError(
            "onnxruntime has no bf16 matrix products on the CPU; use --backend torch, or a bundle in fp32 or fp16"
        )
    if precision is Precision.INT8 and device != "cpu":
        raise BackendError(f"int8 bundles run on the CPU, not on {device}; use --device cpu, or a bundle in fp16")
    if precision.weight_dtype == "int8" and device == "cpu":
        require_exact_products(runtime())


def _error_types(ort: Any) -> tuple[type[Exception], ...]:
    state = ort.capi.onnxruntime_pybind11_state
    # ValueError: of inputs that the graph does not have.
    return (RuntimeError, ValueError, *(getattr(state, name) for name in _ERRORS if hasattr(state, name)))


def _with_debug_outputs(file: Path, depth: int) -> bytes:
    """The graph with every block's residual stream, and token decisions where it has them, as further outputs."""
    try:
        import onnx
    except ImportError as error:
        raise BackendError("comparing inside a graph needs the package onnx; pip install 'dydit[export]'") from error
    model = onnx.load(file, load_external_data=False)
    values = {name for node in model.graph.node for name in node.output}
    for block in range(depth):
        for name, dtype in (
            (residual_name(block), onnx.TensorProto.FLOAT),
            (token_mask_name(block), onnx.TensorProto.BOOL),
        ):
            if name in values:
                model.graph.output.append(onnx.helper.make_tensor_value_info(name, dtype, None))
    data: bytes = model.SerializeToString()
    return data
