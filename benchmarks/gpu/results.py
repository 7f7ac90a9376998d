"""The report: what each cell gave, and the rows that tables and picture take from it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from bounds import StepWork
from settings import Settings
from sides import PYTORCH, RESIDENT, TITLES, is_dense
from ways import way_of

from dydit.errors import ConfigError
from dydit.files import write_json
from dydit.reports.results import Machine

VERSION = 1


class Status(StrEnum):
    """How a cell ended. What is left, for want of time, is tried again by the next run."""

    DONE = "done"
    FAILED = "failed"
    NOT_RUN = "not run"
    LEFT = "left"


@dataclass
class Report:
    """A file of results; `cells`: by name {stage, arguments, status, reason, seconds, parts}."""

    path: Path
    settings: Settings
    cells: dict[str, dict[str, Any]] = field(default_factory=dict)
    machine: dict[str, Any] | None = None

    @classmethod
    def open(cls, path: Path, settings: Settings) -> Report:
        """The report that is there, or a new one. Raises `ConfigError` where it is of other settings or another GPU."""
        if not path.exists():
            return cls(path, settings)
        values = json.loads(path.read_text(encoding="utf-8"))
        theirs = Settings.model_validate(values["settings"])
        for name in Settings.model_fields:
            if getattr(theirs, name) != getattr(settings, name):
                raise ConfigError(
                    f"{path} was measured with {name} {getattr(theirs, name)}, not {getattr(settings, name)}; choose "
                    "another --work"
                )
        return cls(path, settings, values["cells"], values["machine"])

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "version": VERSION,
            "dry_run": self.settings.dry_run,
            "device": self.device,
            "settings": self.settings.model_dump(mode="json"),
            "machine": self.machine,
            "cells": self.cells,
            "rows": speed_rows(self),
        }

    def save(self, machine: Machine) -> None:
        """Write the file, all of it or nothing."""
        self.machine = machine.to_json()
        write_json(self.path, self.to_json())

    @property
    def device(self) -> str:
        """What everything was measured on."""
        return "cpu" if self.settings.dry_run else f"cuda: {self.settings.gpu}"

    def part(self, cell: str, name: str) -> Any:
        """A part of a cell; None where there is none."""
        return self.cells.get(cell, {}).get("parts", {}).get(name)

    def doctor(self) -> dict[str, dict[str, Any]]:
        """The rows of `dydit doctor` by name."""
        found = self.part("installed", "doctor") or {}
        return {row["name"]: row for kind in ("backends", "devices") for row in found.get(kind, ())}

    def ceilings(self) -> tuple[float | None, float | None]:
        """(TFLOP/s of matrix products in the precision that is timed, GB/s of a copy); None where not measured."""
        product = self.part("ceilings", f"product {self.settings.precision}") or {}
        return product.get("tflops"), (self.part("ceilings", "copy") or {}).get("gb_per_s")

    def work(self, batch: int, dense: bool) -> StepWork | None:
        """What a step of that batch asks for."""
        values = (self.part("models", "work") or {}).get(str(batch))
        return None if values is None else StepWork(**values["dense" if dense else "dynamic"])


def title(way: str) -> str:
    """A way's name for people."""
    return TITLES[way] if way in (RESIDENT, PYTORCH) else way_of(way).title


def speed_rows(report: Report) -> list[dict[str, Any]]:
    """A row for each way, side and batch that was to be timed: its figures, or `reason` why it has none.

    `ms` a step; `images_per_second` of whole runs; `speedup` over the static model of the same way and batch, in the
    same cell; `macs_share`, `memory_share`: of its time, what the multiply-adds and the bytes alone would take.
    A side that two cells timed has the row of the first.
    """
    rows: dict[tuple[str, str, int], dict[str, Any]] = {}
    for cell in report.cells.values():
        arguments = cell["arguments"]
        if "sides" not in arguments:
            continue
        parts, way, batch = cell["parts"], arguments["way"], arguments["batch"]
        for side in arguments["sides"]:
            key, row = (way, side, batch), {"way": way, "side": side, "batch": batch}
            found = parts.get(side)
            if found is None or "ms" not in found:
                rows.setdefault(key, {**row, "reason": _reason(cell, found)})
            elif "ms" not in rows.get(key, {}):
                rows[key] = {**row, **_figures(report, way, side, batch, found, parts)}
    return list(rows.values())


def _reason(cell: dict[str, Any], found: dict[str, Any] | None) -> str:
    if found is not None:
        return str(found.get("not_run") or f"failed: {found['error']}")
    return f"{cell['status']}: {cell.get('reason') or 'its process said nothing of it'}"


def _figures(
    report: Report, way: str, side: str, batch: int, found: dict[str, Any], parts: dict[str, Any]
) -> dict[str, Any]:
    ms, dense = found["ms"], is_dense(way, side)
    figures = {
        "ms": ms,
        "images_per_second": 1e3 * batch / (ms * report.settings.steps),
        "memory_bytes": found["memory_bytes"],
        "clock": found["clock"],
        "steps": found["steps"],
        "rounds": len(found["round_ms"]),
        "repeated_steps": found["repeated_steps"],
        "alone": found["alone"],
        "warmup": found["warmup"],
        "speedup": None,
        "macs_ms": None,
        "memory_ms": None,
    }
    yardstick = next((parts[other] for other in parts if is_dense(way, other) and "ms" in parts[other]), None)
    if not dense and yardstick is not None:
        figures["speedup"] = yardstick["ms"] / ms
    (tflops, bandwidth), work = report.ceilings(), report.work(batch, dense)
    if work is not None and tflops:
        figures["macs_ms"] = work.macs_ms(tflops)
    if work is not None and bandwidth:
        figures["memory_ms"] = work.memory_ms(bandwidth)
    for bound in ("macs", "memory"):
        value = figures[f"{bound}_ms"]
        figures[f"{bound}_share"] = None if value is None else value / ms
    return figures
