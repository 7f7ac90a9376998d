"""One side of a benchmark in a process of its own: `python -m dydit.bench.bench_worker`, spoken to by `bench`.

Lines of JSON on standard input and output. First comes the job; the worker loads and answers. Then each command is a
word, answered by a line: `check` (an array: its shape, and its float32 values in base64), `round`, `memory` (bytes),
`decided`. It ends when its input ends. A `DyditError` is answered as {"error": message}, an `UnavailableError` as
{"unavailable": message}. Whatever else writes to standard output goes to standard error.

A script of a user's own is a side too: `sys.exit(serve(Mine))`, where `Mine` is a `Measured`.
"""

from __future__ import annotations

import base64
import json
import os
import sys
from collections.abc import Callable
from typing import TextIO

from dydit.bench.timing import Job, Measured, MeasuredBundle, peak_bytes, settled_bytes
from dydit.errors import DyditError, UnavailableError, one_line
from dydit.reports.bench_report import SideKind


def main() -> int:
    """Serve one job for any kind of side but a script."""
    return serve(open_side)


def open_side(job: Job) -> Measured:
    """The model that a job is to time, not yet loaded. A user's script opens its own."""
    if job.side.kind is SideKind.BUNDLE:
        return MeasuredBundle(job)
    from dydit.bench.timing_torch import MeasuredTorch  # a process that times a bundle does without PyTorch

    return MeasuredTorch(job)


def serve(open_side: Callable[[Job], Measured]) -> int:
    """Serve one job with the side that `open_side` makes of it; returns the exit code."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        return _serve(answers, open_side)
    except UnavailableError as error:
        _answer(answers, {"unavailable": one_line(error)})
        return 2
    except DyditError as error:
        _answer(answers, {"error": one_line(error)})
        return 2


def _serve(answers: TextIO, open_side: Callable[[Job], Measured]) -> int:
    side = open_side(Job.model_validate_json(sys.stdin.readline()))
    _answer(answers, side.load().model_dump(mode="json"))
    for line in sys.stdin:
        _answer(answers, _command(side, line.strip()))
    return 0


def _command(side: Measured, command: str) -> dict[str, object]:
    if command == "check":
        array = side.check()
        return {"shape": array.shape, "values": base64.b64encode(array.astype("<f4").tobytes()).decode()}
    if command == "round":
        return side.round().model_dump(mode="json")
    if command == "memory":
        return {"peak_bytes": peak_bytes(), "settled_bytes": settled_bytes()}
    if command == "decided":
        return side.decided().model_dump(mode="json")
    raise ValueError(f"unknown command {command!r}")


def _answer(answers: TextIO, value: dict[str, object]) -> None:
    answers.write(json.dumps(value, allow_nan=False) + "\n")
    answers.flush()


if __name__ == "__main__":
    sys.exit(main())
