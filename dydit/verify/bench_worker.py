"""One side of a benchmark in a process of its own: `python -m dydit.verify.bench_worker`, spoken to by `bench`.

Lines of JSON on standard input and output. First comes the job; the worker loads and answers. Then each command is a
word, answered by a line: `round`, `memory` (bytes), `decided`. It ends when its input ends. A `DyditError`
is answered as {"error": message}. Whatever else writes to standard output goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
from typing import TextIO

from dydit.errors import DyditError, one_line
from dydit.verify.measure import Job, Measured, open_side, peak_bytes, settled_bytes


def main() -> int:
    """Serve one job."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        return _serve(answers)
    except DyditError as error:
        _answer(answers, {"error": one_line(error)})
        return 2


def _serve(answers: TextIO) -> int:
    side = open_side(Job.model_validate_json(sys.stdin.readline()))
    _answer(answers, side.load().model_dump(mode="json"))
    for line in sys.stdin:
        _answer(answers, _command(side, line.strip()))
    return 0


def _command(side: Measured, command: str) -> dict[str, object]:
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
