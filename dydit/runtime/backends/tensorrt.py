"""The TensorRT backend, for both flavours: engines that `dydit build` put into the bundle, on an NVIDIA GPU.

The work is done in `dydit.runtime.device`. This module provides what that needs: a flavour of TensorRT, a GPU, a
package with the CUDA driver, engines. None is imported or looked for before a backend is opened, and an error says in
one line what is missing.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from typing import Any

from dydit.bundle.bundle import Bundle
from dydit.bundle.vae_entry import VAE_DECODER
from dydit.engines.flavour import (
    Flavour,
    Gpu,
    default_flavour,
    is_installed,
    load_flavour,
    present_gpu,
    require_target,
)
from dydit.engines.store import EngineEntry, EngineStore, open_store
from dydit.errors import BackendError, DyditError, one_line
from dydit.runtime.backends.base import BackendOptions, DecodeTile
from dydit.runtime.device.backend import DeviceBackend
from dydit.runtime.device.cuda import CudaDevice
from dydit.runtime.device.driver import require_driver
from dydit.runtime.device.engine_runtime import Runtime
from dydit.runtime.device.launches import EngineMemory
from dydit.runtime.device.operations import EngineId
from dydit.runtime.device.residency import engines_of, graph_of

FIGURES = "memory.json"
"""Beside the engines: `{sha256: [activation bytes, engine bytes]}`, measured here; see `DeviceBackend._measure`."""


class TensorRTBackend(DeviceBackend):
    """Runs a bundle's engines of one flavour; by default of the one that is installed and has engines in the bundle.

    Raises `BackendError` if a package, the driver or a GPU is missing, `BundleError` if engines are missing or were
    built for another GPU or version.
    """

    name = "tensorrt"

    def __init__(
        self,
        bundle: Bundle,
        options: BackendOptions | None = None,
        flavour: Flavour | None = None,
        graphs: bool = True,
    ):
        trt, self._store = open_engines(bundle, flavour)
        store = self._store
        runtime = Runtime(trt, lambda engine: store.load(graph_of(bundle.manifest, engine)), store.read_runtime_cache())
        self._runtime, self._saved_contexts = runtime, 0
        known = _known(bundle, self._store)
        super().__init__(bundle, options, lambda: CudaDevice(runtime), known, graphs)

    def tile_decoder(self) -> DecodeTile | None:
        """Decode with the engine of the bundle's VAE decoder; None if it was not built."""
        index = self._store.read()
        return self.decode if index is not None and VAE_DECODER in index.engines else None

    def _after_run(self) -> None:
        """Save the kernels that were compiled for the run, for the next process. What fails here fails no run."""
        if self._runtime.contexts == self._saved_contexts:
            return
        self._saved_contexts = self._runtime.contexts
        try:
            with self._in_context():
                compiled = self._runtime.compiled()
        except (RuntimeError, DyditError) as error:
            warnings.warn(f"compiled kernels cannot be saved for the next process: {one_line(error)}", stacklevel=2)
            return
        if compiled is not None:
            self._store.write_runtime_cache(compiled)

    def _keep_memory(self, memory: Mapping[EngineId, EngineMemory]) -> None:
        entries = _entries(self.bundle, self._store)
        values = {entries[engine].sha256: [each.activation, each.weights] for engine, each in memory.items()}
        self._store.keep(FIGURES, json.dumps(values).encode())


def open_engines(bundle: Bundle, flavour: Flavour | None) -> tuple[Any, EngineStore]:
    """A flavour's module, and the bundle's engines of it that run here. Raises for the first thing that is missing."""
    modules = {each: load_flavour(each) for each in _flavours(flavour)}
    gpu = _require_gpu()
    refusals: list[DyditError] = []
    for each, trt in modules.items():
        try:
            return trt, open_store(bundle, each, trt.__version__, gpu)
        except DyditError as error:
            refusals.append(error)
    raise refusals[0]


def describe(flavour: Flavour | None = None) -> str:
    """Versions and GPU, for `dydit doctor`. Raises `BackendError` for what is missing."""
    flavours = _flavours(flavour)
    versions = {each: f"{each} {load_flavour(each).__version__}" for each in flavours}
    gpu, refusals = _require_gpu(), []
    for each in flavours:
        try:
            require_target(each, gpu)
        except BackendError as error:
            refusals.append(error)
            del versions[each]
    if not versions:
        raise refusals[0]
    return f"{', '.join(versions.values())} on {gpu}"


def _flavours(flavour: Flavour | None) -> list[Flavour]:
    if flavour is not None:
        return [flavour]
    return [each for each in Flavour if is_installed(each)] or [default_flavour()]


def _require_gpu() -> Gpu:
    gpu = present_gpu()
    if gpu is None:
        raise BackendError(
            "TensorRT engines need an NVIDIA GPU, but no driver or GPU was found here; use "
            "backend='onnxruntime' (--backend onnxruntime)"
        )
    require_driver()
    return gpu


def _entries(bundle: Bundle, store: EngineStore) -> dict[EngineId, EngineEntry]:
    index = store.read()
    entries = {} if index is None else index.engines
    names = {engine: graph_of(bundle.manifest, engine) for engine in engines_of(bundle.manifest)}
    return {engine: entries[name] for engine, name in names.items() if name in entries}


def _known(bundle: Bundle, store: EngineStore) -> dict[EngineId, EngineMemory]:
    """What earlier processes measured of the engines, or else what the builder reported.

    A damaged file of measurements counts as missing.
    """
    try:
        values = json.loads((store.folder / FIGURES).read_text(encoding="utf-8"))
        measured = {sha256: EngineMemory(int(activation), int(size)) for sha256, (activation, size) in values.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        measured = {}
    known = {}
    for engine, entry in _entries(bundle, store).items():
        if entry.sha256 in measured:
            known[engine] = measured[entry.sha256]
        elif entry.activation_bytes is not None:
            known[engine] = EngineMemory(entry.activation_bytes, entry.bytes)
    return known
