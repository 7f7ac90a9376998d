"""One contender of a benchmark in a process of its own: `python -m dydit.bench.bench_worker`, used by
`dydit.bench.bench`.

The protocol is lines of JSON on standard input and output. The first line is the job; the worker loads the contender
and answers. Each further line is one word, which is answered by one line: `check` (an array: its shape, and its float32
values in base64), `round`, `memory` (bytes), `decided`. The worker ends with its input. A `DyditError` is answered as
{"error": message}, an `UnavailableError` as {"unavailable": message}. All other output goes to standard error.

A user's script can be a contender: `sys.exit(serve(Mine))`, where `Mine` is a subclass of `Measured`.
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
    """Serve one job for every kind of contender except scripts."""
    return serve(open_side)


def open_side(job: Job) -> Measured:
    """The model that a job is to time, not yet loaded. A user's script opens its own."""
    if job.side.kind is SideKind.BUNDLE:
        return MeasuredBundle(job)
    from dydit.bench.timing_torch import MeasuredTorch  # a process that times a bundle does without PyTorch

    return MeasuredTorch(job)


def serve(open_side: Callable[[Job], Measured]) -> int:
    """Serve one job with the contender that `open_side` makes of it; returns the exit code."""
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
