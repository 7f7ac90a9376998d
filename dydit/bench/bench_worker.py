"""One contender of a benchmark in a process of its own: `python -m dydit.bench.bench_worker`, started by `bench`.

The first line is the job; the worker loads the contender. Then each line is a command: `check`, or `check 0` for the
measured step 0 (an array: its shape, and its float32 values in base64), `round`, `last` (an array), `memory` (bytes),
`decided`. `dydit.child_process.serve` answers each.

A user's own script can be a contender, too: `sys.exit(serve(Mine))`, where `Mine` is a subclass of `Measured`.
"""

from __future__ import annotations

import base64
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from dydit import child_process
from dydit.bench.timing import Job, Measured, MeasuredBundle, peak_bytes, settled_bytes
from dydit.reports.bench_report import SideKind


def open_side(job: Job) -> Measured:
    """The model that a job is to time, not yet loaded. A user's script opens its own."""
    if job.side.kind is SideKind.BUNDLE:
        return MeasuredBundle(job)
    from dydit.bench.timing_torch import MeasuredTorch  # a process that times a bundle does without PyTorch

    return MeasuredTorch(job)


def main() -> int:
    """Serve one job for a bundle or a checkpoint."""
    return serve(open_side)


def serve(open_side: Callable[[Job], Measured]) -> int:
    """Serve one job with the contender that `open_side` opens for it; returns the exit code."""
    sides: list[Measured] = []

    def answer(line: str) -> dict[str, Any]:
        if sides:
            return _command(sides[0], line)
        sides.append(open_side(Job.model_validate_json(line)))
        return sides[0].load().model_dump(mode="json")

    return child_process.serve(answer)


def _command(side: Measured, command: str) -> dict[str, Any]:
    word, _, step = command.partition(" ")
    if word == "check":
        return _array(side.check(int(step) if step else None))
    if command == "last":
        return _array(side.last)
    if command == "round":
        return side.round().model_dump(mode="json")
    if command == "memory":
        return {"peak_bytes": peak_bytes(), "settled_bytes": settled_bytes()}
    if command == "decided":
        return side.decided().model_dump(mode="json")
    raise ValueError(f"unknown command {command!r}")


def _array(array: np.ndarray) -> dict[str, Any]:
    return {"shape": array.shape, "values": base64.b64encode(array.astype("<f4").tobytes()).decode()}


if __name__ == "__main__":
    sys.exit(main())
