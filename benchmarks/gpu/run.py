"""The table of one NVIDIA GPU: what runs on it, how fast, and what bounds it.

    python benchmarks/gpu/run.py --work DIR [--minutes 60] [--out DIR2] [--model XL/2]
    python benchmarks/gpu/run.py --work DIR --dry-run

It finds what is installed, measures the GPU's two ceilings (a large matrix product, a large copy), tries every way to
run a bundle, holds their pictures against the CPU's, times dense and dynamic plans beside PyTorch, and profiles the
fastest. Models and bundles are made on the machine; of DiT-XL/2 they take about 12 GB of DIR, engines more.

Every cell of the table is a process with a time limit, so that a crash, a lack of memory or a hang costs one cell.
After each the report in DIR is complete; the same command goes on where a run was stopped. Cells stand in the order of
their worth, and with --minutes those that the time does not reach are left for the next run. What has failed is not
tried again, unless with --retry. At the end the tables of docs/hardware.md are printed; --out gets gpu.json, gpu.md and
gpu.png.

--dry-run goes through all of it in a minute on the CPU, with a model of two blocks, and says nothing about any GPU.
Exit code 0 where the table was made, however many of its cells failed; 2 for bad usage.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cells import STAGES, Cell, best_arguments, cells
from picture import gpu_png
from results import Report, Status, speed_rows
from settings import MODELS, Settings, Work, dry_settings
from tables import markdown

from dydit.engines.flavour import present_gpu
from dydit.errors import ConfigError, DyditError
from dydit.files import write_atomic, write_json
from dydit.models.config import parse_config
from dydit.reports.results import Machine

CHILD = Path(__file__).with_name("child.py")
LEAST_SECONDS = 10
"""With less than this left of the time budget no cell is begun."""
BUDGET, NOT_BEGUN = "the time budget was used up", "the time budget was used up before"


class Runner:
    """Runs cells one by one and keeps the report."""

    def __init__(self, settings: Settings, work: Work, minutes: float | None, retry: bool = False):
        self.settings, self.work, self.retry = settings, work, retry
        self.deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self.report = Report.open(work.report, settings)

    def run(self, chosen: Sequence[Cell]) -> None:
        """Every cell that has not been settled yet; the report is written after each."""
        for number, cell in enumerate(chosen, 1):
            before = self.report.cells.get(cell.name)
            if before is not None and before["status"] in self._settled:
                continue
            start = time.monotonic()
            outcome = self._outcome(cell)
            outcome["seconds"] = round(time.monotonic() - start, 1)
            self.report.cells[cell.name] = {"stage": cell.stage, "arguments": cell.arguments, **outcome}
            self.report.save(Machine.here())
            said = f": {outcome['reason']}" if outcome.get("reason") else ""
            print(f"[{number}/{len(chosen)}] {cell.name}: {outcome['status']}{said}", file=sys.stderr, flush=True)

    @property
    def _settled(self) -> tuple[str, ...]:
        return (Status.DONE,) if self.retry else (Status.DONE, Status.FAILED, Status.NOT_RUN)

    def _outcome(self, cell: Cell) -> dict[str, Any]:
        if (reason := self._obstacle(cell)) is not None:
            return {"status": Status.NOT_RUN, "reason": reason, "parts": {}}
        if (need := self._waits_for(cell)) is not None:
            return {"status": Status.LEFT, "reason": f"needs the cell {need!r}, which comes first", "parts": {}}
        arguments = cell.arguments
        if cell.best is not None:
            found = best_arguments(cell.best, speed_rows(self.report))
            if found is None:
                return {"status": Status.LEFT, "reason": "nothing has been timed yet", "parts": {}}
            arguments = found
        limit, left = cell.limit(self.settings), self._left()
        if left < LEAST_SECONDS:
            return {"status": Status.LEFT, "reason": NOT_BEGUN, "parts": {}}
        outcome = run_child(cell.kind, arguments, self.settings, self.work, cell.name, min(limit, left))
        if outcome["status"] == Status.FAILED and outcome.get("timed_out") and left < limit:
            return {**outcome, "status": Status.LEFT, "reason": BUDGET}
        return outcome

    def _obstacle(self, cell: Cell) -> str | None:
        """Why a cell cannot run here."""
        if self.settings.dry_run:
            if cell.not_dry is not None:
                return cell.not_dry
        else:
            rows = self.report.doctor()
            for probe in cell.probes:
                if probe in rows and not rows[probe]["ok"]:
                    return f"{probe}: {rows[probe]['detail']}"
        for need in cell.needs:
            other = self.report.cells.get(need)
            if other is not None and other["status"] in (Status.FAILED, Status.NOT_RUN):
                return f"needs the cell {need!r}: {other['status']}"
        return None

    def _waits_for(self, cell: Cell) -> str | None:
        """A cell that has to be done first, and was left for want of time or by --only."""
        done = {name for name, each in self.report.cells.items() if each["status"] == Status.DONE}
        return next((need for need in cell.needs if need not in done), None)

    def _left(self) -> float:
        return float("inf") if self.deadline is None else self.deadline - time.monotonic()


def run_child(
    kind: str, arguments: dict[str, Any], settings: Settings, work: Work, name: str, seconds: float
) -> dict[str, Any]:
    """A cell's status, reason and parts. Its process, and those that it started, end within `seconds`."""
    work.logs.mkdir(parents=True, exist_ok=True)
    log = work.logs / f"{''.join(c if c.isalnum() else '-' for c in name)}.log"
    request = {
        "kind": kind,
        "arguments": arguments,
        "settings": settings.model_dump(mode="json"),
        "work": str(work.folder),
        "seconds": seconds,
    }
    parts: dict[str, Any] = {}
    said: dict[str, Any] = {}
    with open(log, "w", encoding="utf-8") as errors:
        process = subprocess.Popen(
            [sys.executable, str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
        timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), _kill, [process])
        timer.start()
        try:
            assert process.stdin is not None and process.stdout is not None
            with contextlib.suppress(BrokenPipeError), process.stdin as stdin:  # it may be dead already
                stdin.write(json.dumps(request) + "\n")
            for line in process.stdout:
                with contextlib.suppress(json.JSONDecodeError):  # the half line of a process that was killed
                    value = json.loads(line)
                    if "part" in value:
                        parts[value["part"]] = value["value"]
                    else:
                        said = value
            process.wait()
        finally:
            timed_out = not timer.is_alive()
            timer.cancel()
            _kill(process)
            process.wait()
    if said.get("end"):
        return {"status": Status.DONE, "parts": parts}
    if timed_out:
        reason = f"stopped after {seconds:.0f} s"
    else:
        reason = said.get("failed") or f"its process ended with exit code {process.returncode}: {_last_line(log)}"
    return {"status": Status.FAILED, "reason": reason, "timed_out": timed_out, "parts": parts}


def _kill(process: subprocess.Popen[str]) -> None:
    """End a child and what it started: they are a group of their own."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


def write_out(report: Report, out: Path) -> None:
    """The table's three files, replacing those of an earlier run."""
    write_json(out / "gpu.json", report.to_json())
    write_atomic(out / "gpu.md", markdown(report).encode())
    if speed_rows(report):
        write_atomic(out / "gpu.png", gpu_png(report))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for models, bundles, logs and the report")
    parser.add_argument("--minutes", type=float, help="stop in time; the next run goes on")
    parser.add_argument("--out", type=Path, help="folder for gpu.json, gpu.md and gpu.png")
    parser.add_argument("--model", choices=MODELS, default="XL/2")
    parser.add_argument("--precision", choices=("fp16", "bf16", "fp32"), default="fp16", help="of what is timed")
    parser.add_argument("--batch", type=int, action="append", help="images at a time; may be repeated  [1, 8, 32]")
    parser.add_argument("--only", choices=STAGES, action="append", help="a stage to run; may be repeated")
    parser.add_argument("--retry", action="store_true", help="try again what has failed")
    parser.add_argument("--dry-run", action="store_true", help="go through all of it on the CPU, with a tiny model")
    return parser.parse_args(arguments)


def settings_of(options: argparse.Namespace) -> Settings:
    """What to measure. Raises `ConfigError` where there is no GPU, or a value is out of range."""
    if options.dry_run:
        return dry_settings()
    gpu = present_gpu()
    if gpu is None:
        raise ConfigError("no NVIDIA GPU or driver on this machine; --dry-run goes through the script on the CPU")
    values = {"model": options.model, "precision": options.precision, "gpu": str(gpu)}
    return parse_config(Settings, values | ({"batches": tuple(options.batch)} if options.batch else {}))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print and write."""
    options = parse(arguments)
    try:
        settings = settings_of(options)
        options.work.mkdir(parents=True, exist_ok=True)
        runner = Runner(settings, Work(options.work.resolve()), options.minutes, options.retry)
        chosen = [cell for cell in cells(settings) if options.only is None or cell.stage in options.only]
        try:
            runner.run(chosen)
        except KeyboardInterrupt:
            print("stopped; the same command goes on here", file=sys.stderr)
        print(markdown(runner.report))
        if options.out is not None:
            write_out(runner.report, options.out)
    except DyditError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    sys.exit(main())
