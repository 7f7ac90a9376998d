"""Which engines a run needs, and when each is loaded.

The next engine loads while the present one runs; engines are unloaded between segments.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dydit.bundle.manifest import CONDITIONING, TEXT_GRAPH, Manifest
from dydit.bundle.vae_entry import VAE_DECODER
from dydit.runtime.device.operations import CONDITIONER, TEXT_CONDITIONER, EngineId


def engine_of(manifest: Manifest, subnet: int, full: bool = False) -> EngineId:
    """The engine that a subnetwork runs on; `full`: at full capacity."""
    return EngineId(0 if manifest.dynamic_width else subnet, full)


def conditioners_of(manifest: Manifest) -> tuple[EngineId, ...]:
    """The engines that are no subnetworks and that every run needs. They stay loaded."""
    return (CONDITIONER,) if manifest.model.text is None else (CONDITIONER, TEXT_CONDITIONER)


def engines_of(manifest: Manifest, segments: Sequence[int] | None = None) -> tuple[EngineId, ...]:
    """Every engine that a run over the given segments may load; by default over all."""
    chosen = range(len(manifest.plan.segments)) if segments is None else segments
    subnets = sorted({manifest.plan.segments[index].subnet for index in chosen})
    plain = [engine_of(manifest, index) for index in subnets]
    full = [engine_of(manifest, index, full=True) for index in subnets if manifest.subnets[index].full_file]
    return (*conditioners_of(manifest), *dict.fromkeys(plain), *dict.fromkeys(full))


def graph_of(manifest: Manifest, engine: EngineId) -> str:
    """The file of the graph that an engine is made from."""
    if engine.decoder:
        return VAE_DECODER
    if engine.texts:
        return TEXT_GRAPH
    if engine.subnet is None:
        return CONDITIONING
    entry = manifest.subnets[engine.subnet]
    return entry.full_file if engine.full and entry.full_file else entry.file


@dataclass(frozen=True)
class Stop:
    """One segment: its engine, the engine to load meanwhile, the engines to unload afterwards, those that then stay."""

    engine: EngineId
    load: EngineId | None
    unload: tuple[EngineId, ...]
    stay: tuple[EngineId, ...]


@dataclass(frozen=True)
class Residency:
    """Engines to unload and load before a run, those that are loaded then, and the run's segments.

    The engines of `conditioners_of` are not counted here.
    """

    unload: tuple[EngineId, ...]
    load: tuple[EngineId, ...]
    start: tuple[EngineId, ...]
    stops: tuple[Stop, ...]

    def peak_bytes(self, weights: Mapping[EngineId, int], repeats: bool) -> int:
        """The most bytes that loaded engines hold at any time; with `repeats` also while a segment is repeated."""
        present, peak = list(self.start), sum(weights[key] for key in self.start)
        for stop in self.stops:
            present += [stop.load] if stop.load else []
            full = weights.get(EngineId(stop.engine.subnet, full=True), 0) if repeats else 0
            peak = max(peak, sum(weights[key] for key in present), sum(weights[key] for key in stop.stay) + full)
            present = list(stop.stay)
        return peak


def plan_residency(
    engines: Sequence[EngineId], loaded: Sequence[EngineId], limit: int | None, spare: bool
) -> Residency:
    """Loads and unloads for segments that run on `engines`, starting from those that are `loaded`.

    `limit`: most engines at a time, at least 2 (None: all stay). The engine whose next use lies farthest ahead is
    unloaded first. With `spare` there is room for one more after every segment, for a repetition at full capacity.
    """
    uses: dict[EngineId, list[int]] = defaultdict(list)
    for position, key in enumerate(engines):
        uses[key].append(position)

    def next_use(key: EngineId, position: int) -> int:
        return next(iter(uses[key][bisect_left(uses[key], position) :]), len(engines))

    def make_room(present: list[EngineId], needed: int, position: int, stay: Sequence[EngineId]) -> list[EngineId]:
        """The engines to unload so that `needed` more fit."""
        if limit is None:
            return []
        free = sorted((key for key in present if key not in stay), key=lambda key: -next_use(key, position))
        return free[: max(0, len(present) + needed - limit)]

    wanted = list(dict.fromkeys(engines[:2]))
    missing = [key for key in wanted if key not in loaded]
    unload = make_room(list(loaded), len(missing), 0, wanted)
    load = [engines[0]] if engines[0] in missing else []
    start = [key for key in loaded if key not in unload] + load
    present, stops = list(start), []
    for position, engine in enumerate(engines):
        upcoming = engines[position + 1 : position + 3]
        following = upcoming[0] if upcoming and upcoming[0] not in present else None
        present += [following] if following else []
        needed = int(spare or (len(upcoming) > 1 and upcoming[1] not in present))
        gone = make_room(present, needed, position + 1, upcoming[:1])
        present = [key for key in present if key not in gone]
        stops.append(Stop(engine, following, tuple(gone), tuple(present)))
    return Residency(tuple(unload), tuple(load), tuple(start), tuple(stops))
