"""`BUNDLE/engines/<settings>/`: the engines of one set of build settings, and the only way to load one.

    engines.json        the settings, and of every graph: engine file, what it depends on, SHA-256, size, seconds
    subnet-0000.engine, conditioning.engine, ...
    build.log           the builder's warnings
    timing.cache        tensorrt: measured tactics, for the next build
    runtime.cache       tensorrt-rtx: compiled kernels, for the next run; its SHA-256 is in runtime.json

An engine is code. It is loaded only from its bundle's own folder, only with the hash that was recorded when it was
built there, and only with a GPU and version that it was built for.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from dydit.bundle.bundle import Bundle
from dydit.bundle.manifest import Manifest
from dydit.bundle.stored_weights import WEIGHTS
from dydit.bundle.vae_entry import VAE_DECODER, VAE_WEIGHTS
from dydit.engines.fingerprint import EngineKey, EngineRequest, HardwareCompatibility, digest_of
from dydit.engines.flavour import Flavour, Gpu, require_target
from dydit.engines.inspector import ChosenKernels
from dydit.engines.profiles import tuned_batches
from dydit.errors import BundleError, DyditError, one_line
from dydit.files import sha256_of, write_atomic
from dydit.validation import Strict, first_problem

ENGINES, INDEX, BUILD_LOG, TIMING_CACHE = "engines", "engines.json", "build.log", "timing.cache"
RUNTIME_CACHE, RUNTIME_RECORD = "runtime.cache", "runtime.json"
_INDEX_VERSION: Literal[3] = 3
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*\.engine")
_AMPERE = (8, 0)


class Built(Strict):
    """Facts of an engine's build. `modified_ns`: the file's modification time when its hash was last computed."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    bytes: int = Field(ge=1)
    modified_ns: int
    seconds: float
    peak_memory: int = Field(description="bytes, of the process that built it, since its start")
    layers: int = Field(description="of the parsed network, whose types were checked")
    warnings: int
    activation_bytes: int | None = Field(
        description="device memory for its activations at its largest shapes, if the builder reported it"
    )
    kernels: ChosenKernels | None = Field(default=None, description="what the builder chose, where it could be read")


class EngineEntry(Built):
    """A built engine: its file, what it depends on, and facts of its build."""

    file: str
    key: EngineKey
    fingerprint: str


class EngineIndex(Strict):
    """`engines.json`. `engines`: by the graph's file name; equal graphs share a file."""

    schema_version: Literal[3]
    request: EngineRequest
    engines: dict[str, EngineEntry]
    digest: str = ""

    def compute_digest(self) -> str:
        """SHA-256 over the canonical JSON of every field but `digest`."""
        return digest_of(self.model_dump(mode="json", exclude={"digest"}))

    def to_json(self) -> str:
        """The text of `engines.json`, with the digest filled in."""
        values = self.model_dump(mode="json") | {"digest": self.compute_digest()}
        return json.dumps(values, indent=1, allow_nan=False) + "\n"


@dataclass(frozen=True)
class EngineStore:
    """The folder of one set of settings."""

    bundle: Bundle
    folder: Path

    @classmethod
    def of(cls, bundle: Bundle, request: EngineRequest) -> EngineStore:
        """The store for a request; it need not exist."""
        return cls(bundle, bundle.path / ENGINES / request.folder)

    @property
    def timing_cache(self) -> Path:
        """The file of tactic timings."""
        return self.folder / TIMING_CACHE

    @property
    def build_log(self) -> Path:
        """The file of the builder's warnings."""
        return self.folder / BUILD_LOG

    def read(self) -> EngineIndex | None:
        """The index; None if nothing was built, or an older release built it.

        Raises `BundleError` if it is damaged or was changed.
        """
        path = self.folder / INDEX
        remove = f"remove {self.folder} and build again"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(values, dict) and values.get("schema_version") in range(1, _INDEX_VERSION):
                return None
            index = EngineIndex.model_validate(values)
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise BundleError(f"{path} is not valid: {first_problem(error)}; {remove}") from error
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{path} is damaged: not JSON ({error}); {remove}") from error
        except OSError as error:
            raise BundleError(f"{path} cannot be read: {error.strerror}; check its permissions and the disk") from error
        if index.digest != index.compute_digest():
            raise BundleError(f"{path} was changed after it was written (its digest differs); {remove}")
        return index

    def write(self, request: EngineRequest, engines: dict[str, EngineEntry]) -> None:
        """Write the index, atomically."""
        index = EngineIndex(schema_version=_INDEX_VERSION, request=request, engines=dict(sorted(engines.items())))
        write_atomic(self.folder / INDEX, index.to_json().encode())

    def engine_path(self, entry: EngineEntry) -> Path:
        """The file of an entry. Raises `BundleError` if it is not a file of this folder."""
        path = self.folder / entry.file
        if not _FILE_NAME.fullmatch(entry.file):
            raise BundleError(
                f"{path} is not in the bundle's own engines folder; engines are code and are loaded from nowhere "
                f"else: remove {self.folder} and build again"
            )
        return path

    def is_complete(self, entry: EngineEntry) -> bool:
        """Whether an engine's file is there as it was built, by its hash: a modification time does not show damage."""
        path = self.engine_path(entry)
        return path.is_file() and path.stat().st_size == entry.bytes and sha256_of(path) == entry.sha256

    def load(self, graph: str) -> bytes:
        """The engine of a graph: the bytes whose hash was checked.

        Raises `BundleError`, with the command to run, if it was not built, is missing, was changed, or was built from
        another bundle's graph or weights.
        """
        index = self.read()
        entry = index.engines.get(graph) if index else None
        if index is None or entry is None:
            flavour = index.request.flavour if index else None
            raise BundleError(f"{self.folder} has no engine for {graph}; run `{build_command(self.bundle, flavour)}`")
        command = build_command(self.bundle, index.request)
        manifest = self.bundle.manifest
        if graph not in manifest.files or entry.key.graph_sha256 != manifest.files[graph].sha256:
            raise BundleError(f"{self.folder}: {entry.file} was built from another bundle's {graph}; run `{command}`")
        if entry.key.weights_sha256 != manifest.files[weights_of(manifest, graph)].sha256:
            raise BundleError(f"{self.folder}: {entry.file} was built with another bundle's weights; run `{command}`")
        path = self.engine_path(entry)
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise BundleError(f"{path} is missing; run `{command}`") from error
        except OSError as error:
            raise BundleError(f"{path} cannot be read: {error.strerror}; check its permissions and the disk") from error
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise BundleError(
                f"{path} was changed after it was built (its SHA-256 differs); remove it and run `{command}`"
            )
        return data

    def read_runtime_cache(self) -> bytes | None:
        """What the last run compiled; None if there is nothing, or it is not what was written here."""
        try:
            data = (self.folder / RUNTIME_CACHE).read_bytes()
            record = json.loads((self.folder / RUNTIME_RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        known = isinstance(record, dict) and record.get("sha256") == hashlib.sha256(data).hexdigest()
        return data if known else None

    def write_runtime_cache(self, data: bytes) -> None:
        """Save what a run compiled."""
        record = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        if self.keep(RUNTIME_CACHE, data):
            self.keep(RUNTIME_RECORD, (json.dumps(record) + "\n").encode())

    def keep(self, name: str, data: bytes) -> bool:
        """Save a file beside the engines, which makes the next process faster; returns whether it was saved.

        A failure is only a warning: a bundle may be read-only, or its disk full, and still run.
        """
        try:
            write_atomic(self.folder / name, data)
        except (OSError, DyditError) as error:
            warnings.warn(f"{name} cannot be saved for the next process: {one_line(error)}", stacklevel=2)
            return False
        return True


def weights_of(manifest: Manifest, graph: str) -> str:
    """The file with a graph's weights."""
    return VAE_WEIGHTS if graph == VAE_DECODER else WEIGHTS


def stores(bundle: Bundle) -> Iterator[EngineStore]:
    """The folders of engines that a bundle holds, newest index first."""
    folders = [path.parent for path in (bundle.path / ENGINES).glob(f"*/{INDEX}")]
    for folder in sorted(folders, key=lambda each: (each / INDEX).stat().st_mtime_ns, reverse=True):
        yield EngineStore(bundle, folder)


def open_store(bundle: Bundle, flavour: Flavour, installed: str, gpu: Gpu | None) -> EngineStore:
    """The engines that run here.

    Raises `BackendError` if the flavour does not run on the GPU, `BundleError`, with the command to run, if there are
    no engines of this flavour, or only for another GPU or version.
    """
    if gpu is not None:
        require_target(flavour, gpu)
    refusals = []
    for store in stores(bundle):
        index = store.read()
        if index is None or index.request.flavour is not flavour:
            continue
        refusal = unfit_reason(index.request, installed, gpu)
        if refusal is None:
            return store
        command = build_command(bundle, flavour if index.request.compute_capabilities else index.request)
        refusals.append(f"{store.folder} {refusal}; run `{command}`")
    if refusals:
        raise BundleError(refusals[0])
    raise BundleError(f"{bundle.path} has no {flavour} engines; run `{build_command(bundle, flavour)}`")


def unfit_reason(request: EngineRequest, installed: str, gpu: Gpu | None) -> str | None:
    """Why engines of a request do not run with a version and GPU; None if they do."""
    if not _version_fits(request, installed):
        return f"was built by {request.flavour} {request.version}, but {installed} is installed"
    if gpu is None:
        return "needs an NVIDIA GPU to run, but there is no driver or GPU here"
    if not _gpu_fits(request, gpu):
        built_for = " or ".join(request.compute_capabilities or request.targets) or "8.0 and later"
        name = f" ({request.gpu})" if request.gpu else ""
        return f"was built for compute capability {built_for}{name}, but the GPU here is {gpu}"
    return None


def _version_fits(request: EngineRequest, installed: str) -> bool:
    if installed == request.version:
        return True
    if not request.version_compatible:
        return False
    here, built = _numbers(installed), _numbers(request.version)
    return here[0] == built[0] and here >= built


def _gpu_fits(request: EngineRequest, gpu: Gpu) -> bool:
    if request.flavour is Flavour.TENSORRT_RTX and not request.compute_capabilities:
        return gpu.compute_capability in request.targets
    if request.hardware_compatibility is HardwareCompatibility.AMPERE_PLUS:
        return _numbers(gpu.compute_capability) >= _AMPERE
    return gpu.compute_capability in request.compute_capabilities


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def build_command(bundle: Bundle, wanted: EngineRequest | Flavour | None) -> str:
    """The command that builds such engines, for messages."""
    words: list[Any] = ["dydit", "build", bundle.path]
    if isinstance(wanted, Flavour):
        words += ["--flavour", wanted]
    elif wanted is not None:
        words += ["--flavour", wanted.flavour]
        if wanted.max_batch != bundle.manifest.max_batch:
            words += ["--max-batch", wanted.max_batch]
        if wanted.opt_batches != tuned_batches(wanted.max_batch):
            words += [word for each in wanted.opt_batches for word in ("--opt-batch", each)]
        if wanted.flavour.traits.ahead_of_time:
            words += [word for each in wanted.compute_capabilities for word in ("--compute-capability", each)]
        if wanted.hardware_compatibility is not HardwareCompatibility.NONE:
            words += ["--hardware-compatibility", wanted.hardware_compatibility]
        if wanted.version_compatible:
            words += ["--version-compatible"]
    return shlex.join(str(word) for word in words)
