"""ONNX Runtime itself: importing it, and inference sessions on graphs of a bundle.

Every import of onnxruntime in `dydit` goes through `runtime`, which sets what has to be set before the import.

The weights of a graph lie in a file beside it, which ONNX Runtime maps by itself. It refuses a file whose real path is
outside the graph's folder, where links lead (the cache of a hub, git-annex), and it needs a file system that can map
files. Where it cannot map the file, `open_session` maps or reads it and hands the memory over, to be used in place.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dydit.bundle.bundle import mapped_file
from dydit.bundle.stored_weights import WEIGHTS
from dydit.bundle.vae_entry import VAE_DECODER, VAE_WEIGHTS
from dydit.errors import BackendError, one_line
from dydit.extras import require_release
from dydit.runtime.backends.base import Arrays, BackendOptions
from dydit.runtime.backends.cores import thread_count
from dydit.runtime.backends.device_copies import Copy, copies
from dydit.runtime.forks import register

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
CUDA_OPTIONS = {"use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}
"""TF32 is on by default; it would let fp32 products, on which routing decisions hang, round to 10 bits. Arenas grow to
the next power of two by default, which many sessions together have no memory for."""
OLDEST = (1, 24)
"""The first release that is tested here; opset 23 and IR 11, in which bundles are written, need 1.22."""
OLDEST_CUDA = (1, 28)
"""The first release whose CUDA provider has a kernel for every node of a bundle; `scripts/cuda_kernels.py` reads that
from the packages."""
OLDEST_8_BITS = (1, 28)
"""Earlier releases refuse the QuantizeLinear of int8-static and fp8 bundles, on every device."""
GRAPHS_OPTION = "enable_cuda_graph"
TELEMETRY = "ORT_DISABLE_TELEMETRY"
_FOLDER = "session.model_external_initializers_file_folder_path"
_IN_PLACE = "session.use_external_initializer_file_buffers_directly"
WEIGHTS_APART = "session.use_device_allocator_for_initializers"
"""Weights otherwise lie in the arena of a GPU's memory, between blocks that are reused for activations."""
_shared: weakref.WeakValueDictionary[Path, np.ndarray] = weakref.WeakValueDictionary()
_ERRORS = (
    *("Fail", "InvalidArgument", "NoSuchFile", "NoModel", "EngineError", "RuntimeException", "InvalidProtobuf"),
    *("ModelLoaded", "NotImplemented", "InvalidGraph", "EPFail", "ModelLoadCanceled", "ModelRequiresCompilation"),
)


def runtime() -> Any:
    """The module onnxruntime.

    Its Linux builds report usage to their vendor unless an environment variable forbids it before the import. The
    variable is set here, unless the user has set it. Raises `BackendError`, saying what to install, if onnxruntime is
    missing or too old for the graphs of a bundle.
    """
    os.environ.setdefault(TELEMETRY, "1")
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(
            f"onnxruntime cannot be imported ({one_line(error)}); pip install 'dydit[cpu]', or 'dydit[gpu]' for CUDA"
        ) from error
    require_runtime(onnxruntime, OLDEST, "bundles")
    return onnxruntime


def require_runtime(ort: Any, oldest: tuple[int, int], why: str) -> None:
    """Raise `BackendError`, with the command that installs a newer one, if onnxruntime is older than `oldest`."""
    package = "onnxruntime-gpu" if PROVIDERS["cuda"] in ort.get_available_providers() else "onnxruntime"
    require_release(ort, package, oldest, why)


@dataclass(frozen=True)
class SessionSettings:
    """How a session is opened, besides `BackendOptions`.

    `graph` replaces the file's content; `left_out` are optimizers not to run. `lazy`: widen fp16 weights when they are
    multiplied, instead of all when the session is opened; this turns most optimizers off. `arena`: keep a pool of
    memory for activations. `gives`: outputs that the graph must have.
    """

    graph: bytes | None = None
    left_out: tuple[str, ...] = ()
    lazy: bool = False
    arena: bool = False
    gives: tuple[str, ...] = ()


class Session:
    """An InferenceSession on a file. Its errors are one line; in a forked child it is opened again.

    A session's threads do not survive `fork`: running or freeing it in the child would wait for them forever. So a
    child leaves its copy alone and opens another session when it first needs one.
    """

    def __init__(self, file: Path, options: BackendOptions, settings: SessionSettings | None = None):
        self._file, self._options, self._settings = file, options, settings or SessionSettings()
        ort = runtime()
        self._errors = error_types(ort)
        self._session: Any = self._open(ort)
        self._outputs = [output.name for output in self._session.get_outputs()]
        for output in self._settings.gives:
            if output not in self._outputs:
                raise BackendError(f"{file} is another graph: it has no output {output}; export the bundle again")
        register(self)

    def run(self, feeds: Arrays, what: str) -> dict[str, np.ndarray]:
        """Every output by name."""
        if self._session is None:
            self._session = self._open(runtime())
        try:
            return dict(zip(self._outputs, self._session.run(None, dict(feeds)), strict=True))
        except self._errors as error:
            raise BackendError(f"onnxruntime failed in {what}: {one_line(error)}") from error

    def after_fork(self) -> None:
        """Leave the parent's session alone, without freeing it."""
        if self._session is not None:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._session))  # or it would be freed
            self._session = None

    def _open(self, ort: Any) -> Any:
        settings = self._settings
        session, self._weights = open_session(
            ort,
            self._file,
            self._options.device,
            self._session_options(ort),
            graph=settings.graph,
            left_out=settings.left_out,
        )
        require_provider(ort, session, self._options.device)
        return session

    def _session_options(self, ort: Any) -> Any:
        settings, options = self._settings, base_options(ort, self._options)
        options.enable_cpu_mem_arena = settings.arena
        if settings.lazy:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        return options


def open_session(
    ort: Any,
    file: Path,
    device: str,
    options: Any,
    provider_options: Mapping[str, str] | None = None,
    graph: bytes | None = None,
    left_out: Sequence[str] = (),
) -> tuple[Any, object]:
    """An `InferenceSession` on a graph of a bundle, and what must live as long as the session.

    `options`: its `SessionOptions`, which are changed. `provider_options`: for `cuda`, besides `CUDA_OPTIONS`. `graph`
    replaces the file's content. `left_out`: optimisers not to run. Warns where values of the graph are copied between
    GPU and host in every run. Raises `BackendError` where the graph cannot be loaded, or there is no memory for the
    weights.
    """
    provider = PROVIDERS[device]
    weights = file.with_name(VAE_WEIGHTS if file.name == VAE_DECODER else WEIGHTS)
    memory = _weights_in_memory(file, weights) if weights.is_file() else None  # a graph may hold all its weights itself
    if memory is not None:
        graph = file.read_bytes() if graph is None else graph
        options.add_external_initializers_from_files_in_memory([weights.name], [memory], [memory.nbytes])
        if device == "cpu":
            options.add_session_config_entry(_IN_PLACE, "1")
    if graph is not None:
        options.add_session_config_entry(_FOLDER, str(file.parent))
    more = {"disabled_optimizers": list(left_out)} if left_out else {}
    providers = [(provider, {**CUDA_OPTIONS, **(provider_options or {})})] if device == "cuda" else [provider]

    def start() -> Any:
        return ort.InferenceSession(str(file) if graph is None else graph, options, providers=providers, **more)

    try:
        # With CUDA graphs, ONNX Runtime itself refuses copies.
        watched = device == "cuda" and (provider_options or {}).get(GRAPHS_OPTION) != "1"
        session = _watched(ort, start, options, file.name) if watched else start()
    except error_types(ort) as error:
        raise BackendError(f"onnxruntime {ort.__version__} cannot load {file}: {one_line(error)}") from error
    return session, memory


def _watched(ort: Any, start: Callable[[], Any], options: Any, name: str) -> Any:
    """A session, with a warning if it copies values between GPU and host.

    ONNX Runtime shows its copies only in an optimised graph that it saves. A graph that cannot be saved is not watched.
    """
    found: list[Copy] = []
    not_watched: tuple[type[Exception], ...] = (OSError, ImportError, *error_types(ort))
    try:
        with tempfile.TemporaryDirectory(prefix="dydit-") as folder:
            saved = Path(folder, "optimised.onnx")
            options.optimized_model_filepath = str(saved)
            session = start()
            found = copies(saved)
    except not_watched:
        options.optimized_model_filepath = ""
        return start()
    if found:
        more = f", and {len(found) - 1} more values" if len(found) > 1 else ""
        warnings.warn(
            f"{name} is slow, and cannot be captured in a CUDA graph, because in each run {found[0]}{more}; this "
            f"onnxruntime {ort.__version__} places nodes on the CPU that other releases place on the GPU: pip install "
            "-U onnxruntime-gpu",
            stacklevel=2,
        )
    return session


def require_provider(ort: Any, session: Any, device: str) -> None:
    """Raise `BackendError` where a session does not run on the device: ONNX Runtime falls back to the CPU silently."""
    if PROVIDERS[device] not in session.get_providers():
        raise BackendError(
            f"onnxruntime {ort.__version__} could not start its {PROVIDERS[device]} (driver, CUDA or cuDNN missing?); "
            "pip install 'dydit[gpu]', or use device='cpu' (--device cpu)"
        )


def _weights_in_memory(file: Path, weights: Path) -> np.ndarray | None:
    """The weights, where ONNX Runtime cannot take them from their file."""
    if not (file.is_symlink() or weights.is_symlink()) and isinstance(mapped_file(weights), np.memmap):
        return None
    memory = _shared.get(weights)
    if memory is None:
        _shared[weights] = memory = mapped_file(weights)
    return memory


def base_options(ort: Any, options: BackendOptions) -> Any:
    """Options of every session: no log output, the requested threads, which do not spin, weights packed or not.

    On a GPU weights are allocated apart from the arena.
    """
    session_options = ort.SessionOptions()
    session_options.log_severity_level = 3
    session_options.intra_op_num_threads = thread_count(options.threads)
    session_options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not options.packed:
        session_options.add_session_config_entry("session.disable_prepacking", "1")
    if options.device == "cuda":
        session_options.add_session_config_entry(WEIGHTS_APART, "1")
    return session_options


def error_types(ort: Any) -> tuple[type[Exception], ...]:
    """The exceptions of onnxruntime, which have no base class. ValueError: for inputs that a graph does not have."""
    state = ort.capi.onnxruntime_pybind11_state
    return (RuntimeError, ValueError, *(getattr(state, name) for name in _ERRORS if hasattr(state, name)))


def load_cuda_libraries(ort: Any) -> None:
    """Load CUDA and cuDNN from where pip installed them: the dynamic linker does not look there by itself."""
    if hasattr(ort, "preload_dlls"):  # since 1.21
        ort.preload_dlls()
