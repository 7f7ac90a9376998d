"""OpenVINO itself: importing it, its core, and compiled graphs of a bundle.

Every import of openvino in `dydit` goes through `openvino_module`.

Graphs keep the types that they are written in (inference precision "dynamic"). By default OpenVINO would compute all of
a graph in bf16 where the CPU has it, routers and the residual stream included.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np

from dydit.errors import BackendError, one_line
from dydit.extras import require_release
from dydit.runtime.backends.base import Arrays
from dydit.runtime.backends.ov_cache import ModelCache
from dydit.runtime.backends.ov_graph import read_graph
from dydit.runtime.forks import register

OLDEST = (2026, 4)
"""The first release that is tested here."""
TELEMETRY = "openvino_telemetry"
DEVICES = {"cpu": "CPU", "gpu": "GPU", "npu": "NPU"}
_READING = 1
"""Part of the keys of cached models. To be raised when `ov_graph` makes other models of the same graphs."""


def openvino_module() -> Any:
    """The module openvino. Raises `BackendError`, saying what to install, if it is missing or too old.

    Importing it reports usage to its vendor, unless the user has declined, through the package openvino_telemetry,
    which is installed with it. While openvino is imported here, that package counts as missing.
    """
    silenced = "openvino" not in sys.modules and TELEMETRY not in sys.modules
    if silenced:
        sys.modules[TELEMETRY] = None  # type: ignore[assignment]
    try:
        import openvino
    except ImportError as error:
        raise BackendError(f"openvino cannot be imported ({one_line(error)}); pip install 'dydit[openvino]'") from error
    finally:
        if silenced:
            sys.modules.pop(TELEMETRY, None)
    require_release(openvino, "openvino", OLDEST, "bundles")
    return openvino


class _Core:
    """The `openvino.Core` of this process. A forked child makes its own: the parent's threads are not there."""

    def __init__(self) -> None:
        self._core: Any = None
        self.in_child = False
        self._making = threading.Lock()
        register(self)

    def get(self) -> Any:
        """The core; made when first needed."""
        with self._making:
            if self._core is None:
                self._core = openvino_module().Core()
            return self._core

    def after_fork(self) -> None:
        """Leave the parent's core alone, without freeing it."""
        _leak(self._core)
        self._core, self._making, self.in_child = None, threading.Lock(), True


_core = _Core()


def here(device: str) -> bool:
    """Whether OpenVINO lists a device: `cpu`, `gpu`, `npu`."""
    return any(name.split(".")[0] == DEVICES[device] for name in _core.get().available_devices)


def devices_here() -> list[str]:
    """The devices that OpenVINO lists."""
    return [device for device in DEVICES if here(device)]


@dataclass(frozen=True)
class CompileSettings:
    """What a graph is compiled for.

    `sha256`: of the graph and its weights. `weights(name)`: a file beside the graph, uint8. `streams`: calls that run
    at once, which share `threads`. `gives`: outputs that the graph must have. `inside`: values inside the graph that
    become outputs, as far as it has them.
    """

    file: Path
    sha256: tuple[str, ...]
    weights: Callable[[str], np.ndarray]
    device: str
    threads: int
    streams: int = 1
    gives: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()

    def properties(self, in_child: bool) -> dict[str, Any]:
        """The properties that OpenVINO compiles with.

        `in_child`: in a forked child, where OpenVINO would give a model the threads of one that the parent has freed,
        and wait for them forever. Without streams it needs none; what would run in streams takes turns on one thread.
        """
        if self.device != "cpu":
            return {"EXECUTION_MODE_HINT": "ACCURACY"}
        return {
            "INFERENCE_PRECISION_HINT": "dynamic",
            "INFERENCE_NUM_THREADS": 1 if in_child and self.streams > 1 else self.threads,
            "NUM_STREAMS": 0 if in_child else self.streams,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 32,  # of values that meet weights in 8 bits
            "ENABLE_CPU_PINNING": False,  # other processes, and other streams, use the same cores
        }


class CompiledGraph:
    """A compiled graph. Its errors are one line. Threads may run it at once; in a forked child it is compiled again.

    `bfloat16`: names of inputs of that type, whose arrays are uint16, as NumPy has none.
    """

    def __init__(self, settings: CompileSettings, cache: ModelCache, bfloat16: frozenset[str] = frozenset()):
        self._settings, self._cache, self._bfloat16 = settings, cache, bfloat16
        self._ov = openvino_module()
        self._requests: SimpleQueue[Any] = SimpleQueue()
        self._compiled: Any = None
        self._memory: list[np.ndarray] = []  # of the weights; the compiled model reads it, so it is freed last
        self._lock = threading.Lock()
        self._ready()
        register(self)

    @property
    def compiled(self) -> Any:
        """The `openvino.CompiledModel`."""
        return self._ready()

    def run(self, feeds: Arrays, what: str) -> dict[str, np.ndarray]:
        """Every output by each of its names: OpenVINO merges values that are copies of each other."""
        compiled = self._ready()
        inputs = {name: self._tensor(name, array) for name, array in feeds.items()}
        try:
            try:
                request = self._requests.get_nowait()
            except Empty:
                request = compiled.create_infer_request()
            results = request.infer(inputs, share_inputs=True)
            outputs = {name: results[output] for output in compiled.outputs for name in output.get_names()}
        except (RuntimeError, ValueError, TypeError, MemoryError) as error:
            raise BackendError(f"openvino failed in {what}: {one_line(error)}") from error
        self._requests.put(request)
        return outputs

    def after_fork(self) -> None:
        """Leave the parent's model alone, without freeing it."""
        for owned in (self._compiled, self._requests, self._memory):
            _leak(owned)
        self._compiled, self._requests, self._memory = None, SimpleQueue(), []
        self._lock = threading.Lock()

    def _tensor(self, name: str, array: np.ndarray) -> Any:
        array = np.require(array, requirements="C")
        if name not in self._bfloat16:
            return array
        return self._ov.Tensor(array, self._ov.Shape(array.shape), self._ov.Type.bf16)

    def _ready(self) -> Any:
        with self._lock:
            if self._compiled is None:
                self._compiled = self._load()
            return self._compiled

    def _load(self) -> Any:
        settings, core = self._settings, _core.get()
        self._memory = []
        key = self._key(core)
        compiled = self._from_cache(core, key)
        if compiled is None:
            model = read_graph(self._ov, core, settings.file, self._weights, settings.inside)
            try:
                compiled = core.compile_model(model, DEVICES[settings.device], settings.properties(_core.in_child))
            except (RuntimeError, MemoryError) as error:
                raise BackendError(
                    f"openvino {self._ov.__version__} cannot load {settings.file} on {settings.device}: "
                    f"{one_line(error)}"
                ) from error
            self._to_cache(compiled, key)
        names = {name for output in compiled.outputs for name in output.get_names()}
        for output in settings.gives:
            if output not in names:
                raise BackendError(
                    f"{settings.file} is another graph: it has no output {output}; export the bundle again"
                )
        return compiled

    def _weights(self, name: str) -> np.ndarray:
        memory = self._settings.weights(name)
        self._memory.append(memory)
        return memory

    def _key(self, core: Any) -> str:
        """A hash of all that a compiled model depends on. Threads and streams are chosen when it is imported."""
        settings, device = self._settings, DEVICES[self._settings.device]
        machine = [str(core.get_property(device, name)) for name in ("FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES")]
        facts = [_READING, self._ov.__version__, device, *machine, *settings.sha256, *settings.inside]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def _from_cache(self, core: Any, key: str) -> Any:
        data = self._cache.read(key)
        if data is None:
            return None
        try:
            return core.import_model(data, DEVICES[self._settings.device], self._settings.properties(_core.in_child))
        except RuntimeError:
            self._cache.drop(key)
            return None

    def _to_cache(self, compiled: Any, key: str) -> None:
        if self._cache.folder is None:
            return
        try:
            data = compiled.export_model().getvalue()
        except (RuntimeError, MemoryError):  # a device may not offer it, and the run does not need it
            return
        self._cache.write(key, data)


def _leak(owned: Any) -> None:
    """Keep an object for ever: freeing it would wait for threads that are not in a forked child."""
    if owned is not None:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(owned))
