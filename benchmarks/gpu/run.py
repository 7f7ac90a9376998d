"""What runs on one NVIDIA GPU, and how fast.

    python benchmarks/gpu/run.py --work DIR [--minutes 60] [--out DIR2] [--model XL/2]
    python benchmarks/gpu/run.py --work DIR --dry-run

It makes the table of a GPU for docs/hardware.md, on a machine where packages can be installed. `nine_minutes.py` is for
one where they cannot: it needs only PyTorch, and measures what PyTorch can run.

It lists what is installed, measures a large matrix product as the GPU's ceiling, runs a small model in every backend
configuration (`tasks.BUNDLES`) and compares its images with the CPU's, and times the static model, 16 merged
subnetworks and the graph of dynamic width beside the whole model in PyTorch. Models and bundles are made on the
machine; those of DiT-XL/2 take about 8 GB of DIR, and engines more.

Every task is a process with a time limit, so that a crash, a lack of memory or a hang costs one task. After each task
DIR/gpu.json is complete; the same command continues an interrupted run. Tasks stand in the order of their worth, and
with --minutes those that the time does not reach are left for the next run. Failed tasks are tried again only with
--retry. At the end the tables are printed; --out gets gpu.json and gpu.md.

--dry-run tries the script on the CPU in a minute: a tiny model, two steps, one configuration. It says nothing about any
GPU. Exit code 0 where the table was made, however many tasks failed; 2 for bad usage.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from report import Report, Status, markdown
from tasks import DRY, MODELS, PRECISIONS, SECONDS, Settings, Task, Work, asked_settings, tasks

from dydit.errors import DyditError, one_line
from dydit.files import write_atomic, write_json

LEAST_SECONDS = 10
"""With less than this left of the time budget no task starts."""
Outcome = dict[str, Any]


class Runner:
    """Runs tasks one by one and keeps the report. `command`: what starts a task's process, when its name follows."""

    def __init__(self, settings: Settings, work: Work, command: list[str], minutes: float | None, retry: bool = False):
        self.settings, self.work, self.command = settings, work, command
        self.settled = (Status.DONE,) if retry else (Status.DONE, Status.FAILED, Status.NOT_RUN)
        self.deadline = float("inf") if minutes is None else time.monotonic() + 60 * minutes
        self.report = Report.open(work.report, settings)

    def run(self, chosen: Sequence[Task]) -> None:
        """Every task that is not settled yet; the report is written after each."""
        for number, task in enumerate(chosen, 1):
            if self.report.tasks.get(task.name, {}).get("status") in self.settled:
                continue
            start = time.monotonic()
            outcome = self.outcome(task)
            about = {"kind": task.kind, "arguments": task.arguments, "seconds": round(time.monotonic() - start, 1)}
            self.report.tasks[task.name] = {**about, **outcome}
            self.report.save()
            reason = f": {outcome['reason']}" if outcome.get("reason") else ""
            print(f"[{number}/{len(chosen)}] {task.name}: {outcome['status']}{reason}", file=sys.stderr, flush=True)

    def outcome(self, task: Task) -> Outcome:
        """Run a task, or say why it is not run."""
        if reason := self.obstacle(task):
            return {"status": Status.NOT_RUN, "reason": reason, "parts": {}}
        for need in task.needs:
            if self.report.tasks.get(need, {}).get("status") != Status.DONE:
                return {"status": Status.LEFT, "reason": f"needs the task {need!r}, which comes first", "parts": {}}
        limit, left = SECONDS[task.kind], self.deadline - time.monotonic()
        if left < LEAST_SECONDS:
            return {"status": Status.LEFT, "reason": "the time budget was used up before", "parts": {}}
        outcome = self.run_child(task, min(limit, left))
        if outcome["status"] == Status.FAILED and time.monotonic() >= self.deadline:
            outcome |= {"status": Status.LEFT, "reason": "the time budget was used up"}
        return outcome

    def obstacle(self, task: Task) -> str | None:
        """Why a task cannot run here: a row of `dydit doctor`, or an earlier task that failed."""
        trials = self.report.doctor()
        for probe in task.probes:
            if probe in trials and not trials[probe]["ok"]:
                return f"{probe}: {trials[probe]['detail']}"
        for need in task.needs:
            if (status := self.report.tasks.get(need, {}).get("status")) in (Status.FAILED, Status.NOT_RUN):
                return f"needs the task {need!r}: {status}"
        return None

    def run_child(self, task: Task, seconds: float) -> Outcome:
        """A task's status, reason and parts. Its process, and those that it started, end within `seconds`."""
        log, results = self.work.log(task.name), self.work.results(task.name)
        log.parent.mkdir(parents=True, exist_ok=True)
        results.unlink(missing_ok=True)
        with open(log, "wb") as output:
            words = [*self.command, "--seconds", str(seconds), "--task", task.name]
            process = subprocess.Popen(words, stdout=output, stderr=output, start_new_session=True)
            reason = None
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                reason = f"stopped after {seconds:.0f} s"
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        parts = json.loads(results.read_text()) if results.exists() else {}
        if process.returncode == 0:
            return {"status": Status.DONE, "parts": parts}
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        ended = f"its process ended with exit code {process.returncode}: {lines[-1][:300] if lines else 'no message'}"
        return {"status": Status.FAILED, "reason": parts.pop("failed", None) or reason or ended, "parts": parts}


def run_task(settings: Settings, work: Work, task: Task, seconds: float, end_with_parent: bool = True) -> int:
    """Run a task in this process, keeping every part of its result as soon as it is known; returns the exit code."""
    if end_with_parent and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    parts: dict[str, Any] = {}

    def emit(part: str, value: Any) -> None:
        parts[part] = value
        write_json(work.results(task.name), parts)

    try:
        from measure import KINDS

        KINDS[task.kind](
            settings, work, emit, **task.arguments, **({"seconds": seconds} if task.kind == "time" else {})
        )
    except Exception as error:  # a task that fails is a result; the log has the traceback
        traceback.print_exc()
        name = "" if isinstance(error, DyditError) else f"{type(error).__name__}: "
        emit("failed", f"{name}{one_line(error)[:400]}")
        return 1
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for models, bundles, logs and the report")
    parser.add_argument("--minutes", type=float, help="time budget; the next run continues  [no limit]")
    parser.add_argument("--out", type=Path, help="folder for gpu.json and gpu.md")
    parser.add_argument("--model", choices=MODELS, default="XL/2", help="the model that is timed  [%(default)s]")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp16", help="of what is timed  [%(default)s]")
    parser.add_argument("--batch", type=int, action="append", help="batch size; may be repeated  [8, 32, 1]")
    parser.add_argument("--only", choices=SECONDS, action="append", help="a kind of task to run; may be repeated")
    parser.add_argument("--retry", action="store_true", help="try failed tasks again")
    parser.add_argument("--dry-run", action="store_true", help="try the script on the CPU, with a tiny model")
    parser.add_argument("--task", help="(internal) run this task in this process")
    parser.add_argument("--seconds", type=float, help="(internal) its time limit")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print and write."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    try:
        settings = asked_settings(options, DRY)
        options.work.mkdir(parents=True, exist_ok=True)
        work, everything = Work(options.work.resolve()), tasks(settings)
        if options.task:
            task = next(task for task in everything if task.name == options.task)
            return run_task(settings, work, task, options.seconds)
        runner = Runner(settings, work, [sys.executable, __file__, *arguments], options.minutes, options.retry)
        try:
            runner.run([task for task in everything if options.only is None or task.kind in options.only])
        except KeyboardInterrupt:
            print("interrupted; the same command continues here", file=sys.stderr)
        text = markdown(runner.report)
        print(text)
        if options.out is not None:
            runner.report.save(options.out / "gpu.json")
            write_atomic(options.out / "gpu.md", text.encode())
    except DyditError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # print what there is, then end
    sys.exit(main())
