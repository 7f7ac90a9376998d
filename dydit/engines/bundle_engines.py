"""`dydit build`: engines for every graph of a bundle. Engines that are up to date are kept."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dydit.bundle.bundle import Bundle
from dydit.bundle.io_spec import BATCH, TensorSpec, conditioning_inputs, subnet_inputs, text_inputs, unit_inputs
from dydit.bundle.manifest import CONDITIONING, TEXT_GRAPH
from dydit.bundle.vae_entry import VAE_DECODER, vae_inputs
from dydit.engines.build_workers import run_jobs
from dydit.engines.builder import Job
from dydit.engines.fingerprint import EngineKey, EngineRequest, stale_key_reasons, stale_reasons
from dydit.engines.inspector import ChosenKernels
from dydit.engines.profiles import Extent, shape_profiles, symbol_ranges, width_ranges
from dydit.engines.store import Built, EngineEntry, EngineStore, stores, weights_of
from dydit.errors import BundleError, ConfigError
from dydit.files import explained, sha256_of
from dydit.locks import FileLock

DECODED_AT_ONCE = 4
"""The largest batch of the VAE decoder's engine: its activations are large."""
_SHOWN = 3
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class BuiltEngine:
    """An engine that this call built.

    Its graph, file, size in bytes, seconds, why it was built, and its kernels, where they could be read.
    """

    graph: str
    file: str
    bytes: int
    seconds: float
    reasons: tuple[str, ...]
    kernels: ChosenKernels | None


@dataclass(frozen=True)
class BuildReport:
    """What a build did.

    `reasons`: why engines of other settings do not serve. `kept`: engines that were up to date. `bytes`: of all
    engines. `peak_memory`: the most bytes that a building process used; `jobs` of them ran at a time. `warnings`: their
    number, in `log`.
    """

    folder: Path
    request: EngineRequest
    built: tuple[BuiltEngine, ...]
    kept: int
    reasons: tuple[str, ...]
    bytes: int
    seconds: float
    jobs: int
    peak_memory: int
    warnings: int
    log: Path

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        values = {**asdict(self), "folder": str(self.folder), "log": str(self.log)}
        built = [
            {**asdict(each), "kernels": each.kernels and each.kernels.model_dump(mode="json")} for each in self.built
        ]
        return values | {"request": self.request.model_dump(mode="json"), "built": built}

    def text(self) -> list[str]:
        """The report as lines for a terminal."""
        lines = list(self.reasons)
        lines += [f"{each.graph}: {'; '.join(each.reasons)}" for each in self.built if each.reasons]
        name = f"{self.request.flavour} {self.request.version}"
        if not self.built:
            return [*lines, f"{self.folder}: all {self.kept} engines for {name} are up to date; nothing was built"]
        kept = f", {self.kept} up to date" if self.kept else ""
        lines.append(f"{self.folder}: {len(self.built)} engines built by {name}{kept}")
        lines += self._wider_products()
        return [*lines, f"{self.warnings} builder warnings are in {self.log}"] if self.warnings else lines

    def _wider_products(self) -> list[str]:
        """A line if products that the bundle holds in 8 bits are computed in another type."""
        chosen = [(each.graph, each.kernels) for each in self.built if each.kernels]
        wider = [f"{weight} in {graph}" for graph, kernels in chosen for weight in kernels.not_in_8_bits]
        if not wider:
            return []
        total, more = sum(kernels.in_8_bits for _, kernels in chosen), len(wider) - _SHOWN
        also = f" and {more} more" if more > 0 else ""
        return [
            f"the builder chose other types for {len(wider)} of {total} products that the bundle holds in 8 bits: "
            f"{', '.join(wider[:_SHOWN])}{also}; these gain nothing from 8 bits"
        ]


@dataclass(frozen=True)
class _Wanted:
    """A graph of the bundle: its inputs, their ranges for each profile, and what its engine depends on."""

    graph: str
    inputs: tuple[TensorSpec, ...] | None
    ranges: tuple[dict[str, Extent], ...]
    key: EngineKey


def build_engines(
    bundle: Bundle, request: EngineRequest, jobs: int = 1, progress: Progress | None = None, inspect: bool = True
) -> BuildReport:
    """Build what is missing or stale, `jobs` engines at a time; `progress(done, total)` counts those to be built.

    `request`: from `make_request`; `inspect`: as in `Job`. Finished engines are kept whatever happens to the others.
    Raises `BackendError` if a graph cannot be built, `BundleError` if the bundle was changed, `OutputError` if another
    build is running or the folder cannot be written.
    """
    if jobs < 1:
        raise ConfigError(f"{jobs} jobs: expected at least 1")
    started = time.perf_counter()
    store = EngineStore.of(bundle, request)
    reasons = _settings_reasons(store, request)
    wanted = _wanted(bundle, request)
    with explained(store.folder):
        store.folder.mkdir(parents=True, exist_ok=True)
    with _only_one(store):
        index = store.read()
        entries = dict(index.engines) if index else {}
        stale = _stale_graphs(store, request, wanted, entries)
        new = _build(store, request, stale, entries, jobs, progress, inspect)
        _remove_unused(store, entries)
        if index is None or entries != index.engines:
            store.write(request, entries)
    built = tuple(_built(each.graph, entries[each.graph], why) for each, why in stale)
    return BuildReport(
        folder=store.folder,
        request=request,
        built=built,
        kept=len(wanted) - len(built),
        reasons=tuple(reasons) if built else (),
        bytes=sum({entry.file: entry.bytes for entry in entries.values()}.values()),
        seconds=time.perf_counter() - started,
        jobs=jobs,
        peak_memory=max((each.peak_memory for each in new), default=0),
        warnings=sum(each.warnings for each in new),
        log=store.build_log,
    )


def _built(graph: str, entry: EngineEntry, reasons: tuple[str, ...]) -> BuiltEngine:
    return BuiltEngine(graph, entry.file, entry.bytes, entry.seconds, reasons, entry.kernels)


def _settings_reasons(store: EngineStore, request: EngineRequest) -> list[str]:
    """Why the bundle's engines for other settings of this flavour do not serve."""
    if store.read() is not None:
        return []
    for other in stores(store.bundle):
        index = other.read()
        if index is not None and index.request.flavour is request.flavour:
            changes = "; ".join(stale_reasons(index.request, request))
            return [
                f"the engines in {other.folder} were built with other settings and are not used ({changes}); the "
                "folder is kept, remove it if you do not need it"
            ]
    return []


def _wanted(bundle: Bundle, request: EngineRequest) -> list[_Wanted]:
    """Every graph, the conditioning first. Raises `BundleError` if one differs from the manifest."""
    manifest = bundle.manifest
    ranges = symbol_ranges(manifest, request.opt_batches, request.max_batch)
    described: dict[str, tuple[TensorSpec, ...] | None] = {CONDITIONING: conditioning_inputs()}
    if manifest.model.text is not None:
        described[TEXT_GRAPH] = text_inputs(manifest.model)
    units: tuple[TensorSpec, ...] = ()
    if manifest.dynamic_width:
        units = unit_inputs(manifest.weights, manifest.model)
        widths = width_ranges(manifest.model)
        ranges = tuple({**each, **widths} for each in ranges)
    for subnet in manifest.subnets:
        specs = (*subnet_inputs(manifest.model, subnet.gated), *units)
        described |= {file: specs for file in (subnet.file, subnet.full_file) if file is not None}
    decoder = () if manifest.vae is None else vae_inputs(manifest.vae)
    if decoder:
        described[VAE_DECODER] = None
    wanted = []
    for graph, inputs in described.items():
        digest = manifest.files[graph].sha256
        if sha256_of(bundle.file(graph)) != digest:
            raise BundleError(f"{bundle.path}: {graph} was changed (its SHA-256 differs); export the bundle again")
        if graph == VAE_DECODER:
            few = min(DECODED_AT_ONCE, request.max_batch)
            extents: tuple[dict[str, Extent], ...] = ({BATCH: Extent(min=1, opt=few, max=few)},)
        else:
            extents = ranges
        key = EngineKey(
            graph_sha256=digest,
            weights_sha256=manifest.files[weights_of(manifest, graph)].sha256,
            profiles=shape_profiles(decoder if graph == VAE_DECODER else inputs or (), extents, graph),
        )
        wanted.append(_Wanted(graph, inputs, extents, key))
    return wanted


@contextlib.contextmanager
def _only_one(store: EngineStore) -> Iterator[None]:
    """Hold the folder's lock, and remove what killed builds left."""
    busy = f"another build is running in {store.folder}; wait for it, then run again"
    with explained(store.folder), FileLock(store.folder / ".lock").require(busy):
        for part in store.folder.glob(".*.part"):
            part.unlink()
        yield


def _stale_graphs(
    store: EngineStore, request: EngineRequest, wanted: list[_Wanted], entries: dict[str, EngineEntry]
) -> list[tuple[_Wanted, tuple[str, ...]]]:
    """The graphs to build, and why. Entries whose engine is missing or stale are removed from `entries`."""
    stale = []
    for each in wanted:
        entry = entries.get(each.graph)
        reasons = _reasons(store, each.key, entry)
        if entry is None or reasons:
            entries.pop(each.graph, None)
            stale.append((each, tuple(reasons)))
        else:
            modified = store.engine_path(entry).stat().st_mtime_ns
            entries[each.graph] = entry.model_copy(update={"modified_ns": modified})
    for graph in entries.keys() - {each.graph for each in wanted}:
        del entries[graph]
    current = {entry.fingerprint: entry for entry in entries.values()}
    for each, _ in stale:
        if equal := current.get(each.key.fingerprint(request)):
            entries[each.graph] = equal
    return [(each, reasons) for each, reasons in stale if each.graph not in entries]


def _reasons(store: EngineStore, key: EngineKey, entry: EngineEntry | None) -> list[str]:
    if entry is None:
        return []
    if reasons := stale_key_reasons(entry.key, key):
        return reasons
    return [] if store.is_complete(entry) else [f"{entry.file} is missing or was changed"]


def _build(
    store: EngineStore,
    request: EngineRequest,
    stale: list[tuple[_Wanted, tuple[str, ...]]],
    entries: dict[str, EngineEntry],
    jobs: int,
    progress: Progress | None,
    inspect: bool,
) -> list[Built]:
    """Build the stale graphs, equal ones once, and add each to the index when it is finished."""
    groups: dict[str, list[_Wanted]] = {}
    for each, _ in stale:
        groups.setdefault(each.key.fingerprint(request), []).append(each)
    timing_cache = None if request.flavour.traits.ahead_of_time else store.timing_cache
    taken = {entry.file for entry in entries.values()}
    work, todo = [], dict[str, list[_Wanted]]()
    for fingerprint, group in groups.items():
        graph, first = store.bundle.file(group[0].graph), group[0]
        name = f"{graph.stem}.engine"
        engine = store.folder / (f"{graph.stem}-{fingerprint[:8]}.engine" if name in taken else name)
        todo[engine.name] = group
        work.append(
            Job(
                graph=graph,
                engine=engine,
                request=request,
                model=store.bundle.manifest.model,
                inputs=first.inputs,
                ranges=first.ranges,
                log=store.build_log,
                timing_cache=timing_cache,
                inspect=inspect,
            )
        )
    new: list[Built] = []

    def done(job: Job, built: Built) -> None:
        new.append(built)
        for each in todo[job.engine.name]:
            entries[each.graph] = EngineEntry(
                file=job.engine.name, key=each.key, fingerprint=each.key.fingerprint(request), **built.model_dump()
            )
        store.write(request, entries)
        if progress:
            progress(len(new), len(work))

    if work:
        if progress:
            progress(0, len(work))
        run_jobs(work, jobs, done)
    return new


def _remove_unused(store: EngineStore, entries: dict[str, EngineEntry]) -> None:
    """Remove engines that no graph uses any more: they are large."""
    used = {entry.file for entry in entries.values()}
    for path in store.folder.glob("*.engine"):
        if path.name not in used:
            path.unlink()
