"""The results of the GPU benchmark: the file that keeps them, its rows of times, and the tables in Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
from tasks import BUNDLES, COMPILED, DENSE, PRECISIONS, STATIC, Settings
from timing import macs_share

from dydit.bench.scripts import markdown_table
from dydit.errors import ConfigError
from dydit.files import write_json
from dydit.reports.results import Machine
from dydit.reports.text import bytes_text, exponent

Row = dict[str, Any]


class Status(StrEnum):
    """How a task ended. What is left, for lack of time, is tried again by the next run."""

    DONE = "done"
    FAILED = "failed"
    NOT_RUN = "not run"
    LEFT = "left"


@dataclass
class Report:
    """A file of results; `tasks`: by name {kind, arguments, status, reason, seconds, parts}."""

    path: Path
    settings: Settings
    tasks: dict[str, Row] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, settings: Settings) -> Report:
        """The report that is there, or a new one. Raises `ConfigError` where it has other settings or another GPU."""
        if not path.exists():
            return cls(path, settings)
        values = json.loads(path.read_text(encoding="utf-8"))
        for name, value in Settings.model_validate(values["settings"]):
            if value != getattr(settings, name):
                raise ConfigError(
                    f"{path} was measured with {name} {value}, not {getattr(settings, name)}; choose another --work"
                )
        return cls(path, settings, values["tasks"])

    def save(self, path: Path | None = None) -> None:
        """Write the file, all of it or nothing."""
        settings, machine = self.settings.model_dump(mode="json"), Machine.here().to_json()
        dry_run = self.settings.gpu is None
        values = {"version": 2, "dry_run": dry_run, "settings": settings, "machine": machine, "tasks": self.tasks}
        write_json(path or self.path, {**values, "rows": list(self.rows())})

    def part(self, task: str, name: str) -> Any:
        """A part of a task's result; None where there is none."""
        return self.tasks.get(task, {}).get("parts", {}).get(name)

    def doctor(self) -> dict[str, Row]:
        """The rows of `dydit doctor` by name."""
        trials = self.part("installed", "doctor") or {}
        return {row["name"]: row for kind in ("backends", "devices") for row in trials.get(kind, ())}

    def why(self, name: str) -> str:
        """Why a task has no result."""
        task = self.tasks.get(name)
        return "not run yet" if task is None else f"{task['status']}: {task.get('reason')}"

    def rows(self) -> Iterator[Row]:
        """A row for each contender of each timing task: its figures, or only a `reason` why it has none.

        `ms` per step; `images_per_second` of whole runs; `speedup` over the static model that took turns with it;
        `macs_share`: of its time, what its blocks' multiply-adds alone would take at the ceiling.
        """
        tflops = (self.part("ceiling", "product") or {}).get("tflops")
        macs = self.part("models", "macs")
        for task_name, task in self.tasks.items():
            if task["kind"] != "time":
                continue
            arguments, parts = task["arguments"], task["parts"]
            baseline, batch = parts.get(arguments["contenders"][0], {}).get("ms"), arguments["batch"]
            for name in arguments["contenders"]:
                row = {"configuration": arguments["configuration"], "contender": name, "batch": batch}
                row |= parts.get(name) or {"reason": self.why(task_name)}
                if "ms" in row:
                    static = name in (DENSE, STATIC, COMPILED)
                    row["images_per_second"] = 1e3 * batch / (row["ms"] * self.settings.steps)
                    row["speedup"] = None if name in (DENSE, STATIC) or not baseline else baseline / row["ms"]
                    work = macs["static" if static else "dynamic"] if tflops else None
                    row["macs_share"] = macs_share(batch, work, tflops, row["ms"]) if tflops else None
                yield row


def markdown(report: Report) -> str:
    """All tables. A task that was not done says why."""
    parts = [_head(report), _installed(report), _checks(report), _times(report), _not_done(report)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(report: Report) -> str:
    machine, settings = Machine.here(), report.settings
    chosen = ("dydit", "torch", "onnxruntime", "tensorrt")
    packages = [f"{name} {version}" for name, version in machine.packages.items() if name.startswith(chosen)]
    lines = [f"## {settings.gpu or 'CPU (dry run: these are not figures of a GPU)'}", ""]
    lines.append(f"{', '.join(packages)}; {machine.system}; {machine.date}.")
    driver, memory = report.part("installed", "driver"), report.part("installed", "memory_bytes")
    if driver and memory:
        lines.append(f"Driver {driver}, {bytes_text(memory)} of device memory.")
    if product := report.part("ceiling", "product"):
        size = f"{product['n']} x {product['n']}"
        lines.append(f"A matrix product in {settings.precision}, {size}: {product['tflops']:.4g} TFLOP/s.")
    return "\n".join(lines)


def _installed(report: Report) -> str:
    rows = [["yes" if row["ok"] else "no", name, row["detail"]] for name, row in report.doctor().items()]
    return "What is installed:\n\n" + markdown_table(["", "", "detail"], rows) if rows else ""


def _checks(report: Report) -> str:
    text = (
        "What runs (a small model, 12 steps, 4 images with guidance): the median image against the CPU's in fp32, "
        "relative L2 after the run or its PSNR below fp32; in brackets its worst single step."
    )
    rows = [[each.name, *(_checked(report, f"check: {each.name} {p}") for p in PRECISIONS)] for each in BUNDLES]
    return f"{text}\n\n" + markdown_table(["", *PRECISIONS], rows)


def _checked(report: Report, name: str) -> str:
    task = report.tasks.get(name)
    if task is None or task["status"] != Status.DONE:
        return report.why(name)
    step, run = task["parts"]["step"], task["parts"]["run"]
    if run["median"] is None or step["median"] is None:
        return "runs, and gives NaN or infinite values"
    in_decibels = run["decibels"] and run["median"] > 0
    value = f"{-20 * np.log10(run['median']):.0f} dB" if in_decibels else exponent(run["median"])
    verdict = "yes" if step["holds"] and run["holds"] else "runs, beyond the tolerance"
    return f"{verdict}: {value} ({exponent(step['median'])})"


def _times(report: Report) -> str:
    settings, tokens = report.settings, report.part("models", "token_share")
    rows = sorted((row for row in report.rows() if "ms" in row), key=lambda row: (row["batch"], row["ms"]))
    if not rows:
        return "How fast: nothing was timed yet."
    share = "" if tokens is None else f" ({tokens:.0%} of the tokens in the MLPs)"
    text = (
        f"How fast: {settings.model}, {settings.precision}, guidance, {settings.steps} DDPM steps, routers at a FLOPs "
        f"ratio near 0.5{share}. ms per step: median over rounds. Speed-up: over the static model that took turns with "
        "it. Of multiply-adds: the share of the time that these alone would take at the speed of the product above."
    )
    head = ["batch", "configuration", "", "ms/step", "images/s", "speed-up", "of multiply-adds", "device memory"]
    return f"{text}\n\n" + markdown_table([*head, "steps x rounds"], [_time_row(row) for row in rows])


def _time_row(row: Row) -> list[str]:
    repeated = f" ({row['repeated_steps']} steps repeated)" if row["repeated_steps"] else ""
    return [
        str(row["batch"]),
        row["configuration"],
        row["contender"] + repeated,
        f"{row['ms']:.4g}",
        f"{row['images_per_second']:.3g}",
        "-" if row["speedup"] is None else f"{row['speedup']:.2f}",
        "-" if row["macs_share"] is None else f"{row['macs_share']:.1%}",
        "-" if row["memory_bytes"] is None else bytes_text(row["memory_bytes"]),
        f"{row['steps']} x {len(row['round_ms'])}",
    ]


def _not_done(report: Report) -> str:
    """Tasks but the checks, which have a table, and contenders of timing tasks that were done."""
    tasks = report.tasks.items()
    rows = [
        [name, report.why(name)]
        for name, task in tasks
        if task["status"] != Status.DONE and task["kind"] not in ("check", "time")
    ]
    rows += [
        [f"{row['configuration']}, {row['contender']}, batch {row['batch']}", row["reason"]]
        for row in report.rows()
        if "ms" not in row
    ]
    return "Not done:\n\n" + markdown_table(["", "why"], rows) if rows else ""
