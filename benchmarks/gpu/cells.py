"""The cells of the table, in the order of their worth: each is one child process with a time limit of its own.

First what is installed, the ceilings and what runs; then pictures; then the times, from the least that gives every way
a row up to all; the profile last. A run that is stopped has done what was worth most.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from settings import DENSE, MERGED, MERGED_32, PER_STEP, SLIDING, Settings
from sides import COMPILED, MASKED, PYTORCH, RESIDENT, STATIC
from ways import DRIVER, TIMED, TORCH, WAYS, Way

INSTALLED, CEILINGS, RUNS, PICTURES, SPEED, PROFILE = STAGES = (
    *("installed", "ceilings", "runs", "pictures", "speed", "profile"),
)
CORE, REST = (DENSE, MERGED), (DENSE, MERGED_32, PER_STEP, SLIDING)
ENGINES = (DENSE, MERGED, SLIDING)
"""What engines are built of: of 32 or 250 subnetworks they would take too long, and too much of the disk."""
SECONDS = {"installed": 400, "ceilings": 120, "small": 240, "way": 300, "parity": 240, "models": 900}
SECONDS |= {"bundles": 1200, "engines": 1200, "speed": 420, "kernels": 300}
DRY_SECONDS = 900
NO_GPU = "no NVIDIA GPU (dry run)"
SHORT = "left out of the dry run, which is short"
ONLY_TORCH = "left out of the dry run: on a CPU PyTorch's profiler sees PyTorch's work alone"
DRY_RUNS = (("torch", "fp32"), ("onnxruntime", "fp32"), ("torch", "fp16"), ("ort-loop", "fp16"))
BEST, BEST_TORCH = "best", "best of PyTorch"


@dataclass(frozen=True)
class Cell:
    """A cell: `kind` and `arguments` are what its child does (`child.run`), `seconds` its limit.

    `probes`: rows of `dydit doctor` that must be well. `needs`: cells that must have been done. `not_dry`: why it has
    no part in a dry run. `best`: what its arguments are taken from, once times are known.
    """

    name: str
    stage: str
    kind: str
    arguments: dict[str, Any] = field(default_factory=dict)
    probes: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    not_dry: str | None = None
    best: str | None = None

    def limit(self, settings: Settings) -> float:
        """Seconds after which it is stopped."""
        return DRY_SECONDS if settings.dry_run else SECONDS[self.kind]


def cells(settings: Settings) -> list[Cell]:
    """All cells of a run, in the order of their worth."""
    return [*_first(), *_pictures(), *_times(settings), *_last(settings)]


def _first() -> Iterator[Cell]:
    yield Cell("installed", INSTALLED, "installed")
    yield Cell("ceilings", CEILINGS, "ceilings", probes=(DRIVER, TORCH))
    yield Cell("small bundles", RUNS, "small")
    for way in WAYS:
        yield _same(way, "fp32", RUNS)


def _pictures() -> Iterator[Cell]:
    for precision in ("fp16", "bf16"):
        for way in WAYS:
            yield _same(way, precision, PICTURES)
    for way in WAYS[:2]:  # those that show what they decide
        for precision in ("fp32", "fp16", "bf16"):
            arguments = {"way": way.name, "precision": precision}
            name = f"parity: {way.name} {precision}"
            not_dry = None if way.name == "torch" and precision == "fp32" else SHORT
            yield Cell(name, PICTURES, "parity", arguments, way.probes, ("small bundles",), not_dry)


def _same(way: Way, precision: str, stage: str) -> Cell:
    arguments = {"way": way.name, "precision": precision}
    shown = (way.name, precision) in DRY_RUNS
    not_dry = None if shown else SHORT if way.dry else NO_GPU
    return Cell(f"run: {way.name} {precision}", stage, "way", arguments, way.probes, ("small bundles",), not_dry)


def _times(settings: Settings) -> Iterator[Cell]:
    """The core of every batch, the most telling batch first; then the other plans."""
    yield Cell("models", SPEED, "models")
    middle, *others = settings.by_worth()
    yield from _bundles("core", CORE)
    for batch in (middle, *others):
        yield _speed(PYTORCH, (STATIC, MASKED), batch, "core", (DRIVER, TORCH))
        yield from _batch("core", CORE, batch)
    yield from _bundles("rest", REST[1:])
    for batch in (*others, middle):
        yield from _batch("rest", REST, batch)


def _bundles(what: str, plans: tuple[str, ...]) -> Iterator[Cell]:
    bundles = f"bundles: {what}"
    yield Cell(bundles, SPEED, "bundles", {"plans": list(plans)}, needs=("models",))
    for way in TIMED:
        for plan in plans:
            if way.flavour is not None and plan in ENGINES:
                arguments, name = {"way": way.name, "plan": plan}, f"engines: {way.name} {plan}"
                yield Cell(name, SPEED, "engines", arguments, way.probes, (bundles,), NO_GPU)


def _batch(what: str, plans: tuple[str, ...], batch: int) -> Iterator[Cell]:
    yield _speed(RESIDENT, plans, batch, what, (DRIVER, TORCH))
    for way in TIMED:
        short = SHORT if what == "rest" and way.name != "onnxruntime" else None
        yield _speed(way.name, plans, batch, what, way.probes, short if way.dry else NO_GPU)


def _speed(
    way: str, sides: tuple[str, ...], batch: int, what: str, probes: tuple[str, ...], not_dry: str | None = None
) -> Cell:
    arguments = {"way": way, "sides": list(sides), "batch": batch}
    return Cell(f"speed: {way} {what} batch {batch}", SPEED, "speed", arguments, probes, ("models",), not_dry)


def _last(settings: Settings) -> Iterator[Cell]:
    for batch in settings.by_worth():
        yield _speed(PYTORCH, (COMPILED,), batch, "compiled", (DRIVER, TORCH), SHORT)
    for best in (BEST_TORCH, BEST):
        not_dry = ONLY_TORCH if best == BEST else None
        yield Cell(f"kernels: {best}", PROFILE, "kernels", probes=(DRIVER, TORCH), not_dry=not_dry, best=best)


def best_arguments(best: str, table: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What to profile: our fastest side of the largest batch that has times; None where there is none.

    `table`: rows with way, side, batch and ms, as `results.speed_rows` has them.
    """
    ours = [row for row in table if row["way"] != PYTORCH and row["side"] != DENSE and row.get("ms") is not None]
    if best == BEST_TORCH:
        ours = [row for row in ours if row["way"] in (RESIDENT, "torch")]
    if not ours:
        return None
    largest = max(row["batch"] for row in ours)
    row = min((row for row in ours if row["batch"] == largest), key=lambda row: row["ms"])
    return {name: row[name] for name in ("way", "side", "batch")}
