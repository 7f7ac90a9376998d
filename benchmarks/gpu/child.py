"""A cell of the table in a process of its own: `python child.py`, asked by a line of JSON on standard input.

The request is {"kind", "arguments", "settings", "work", "seconds"}. Answers are lines of JSON on standard output:
{"part", "value"}, each kept by the parent as it comes, and at last {"end": true}, or {"failed": one line}. Whatever
else writes to standard output goes to standard error, which the parent keeps as the cell's log.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from settings import Settings, Work

from dydit.errors import DyditError, one_line

_END_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def run(kind: str, arguments: dict[str, Any], settings: Settings, work: Work, emit: Any) -> None:
    """Do what a kind of cell does. Modules are imported as they are needed: a cell without PyTorch stays so."""
    if kind == "installed":
        from facts import installed

        for part, value in installed().items():
            emit(part, value)
    elif kind == "ceilings":
        from ceilings import measure

        measure(settings.device, emit)
    elif kind in ("small", "models"):
        import prepare

        made = prepare.make_small(work) if kind == "small" else prepare.make_models(settings, work)
        for part, value in made.items():
            emit(part, value)
    elif kind == "bundles":
        from prepare import make_bundles

        make_bundles(settings, work, emit, **arguments)
    elif kind == "engines":
        from ways import way_of, with_engines

        way, plan = way_of(arguments["way"]), arguments["plan"]
        assert way.flavour is not None
        jobs = max(1, min(4, (os.cpu_count() or 2) // 2))
        with_engines(way, work.bundle(plan), work.folder / "engines" / way.flavour / plan, jobs)
    elif kind == "way":
        from same import run_way

        run_way(settings, work, emit, **arguments)
    elif kind == "parity":
        from same import parity

        parity(settings, work, emit, **arguments)
    elif kind == "speed":
        from speed import measure as measure_speed

        measure_speed(settings, work, emit, **arguments)
    elif kind == "kernels":
        from kernels import profile

        profile(settings, work, emit, **arguments)
    else:
        raise ValueError(f"unknown kind of cell {kind!r}")


def main() -> int:
    """Answer one request."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_END_WITH_PARENT, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value, allow_nan=False) + "\n")
        answers.flush()

    request = json.loads(sys.stdin.readline())
    settings, work = Settings.model_validate(request["settings"]), Work(Path(request["work"]))
    if request["kind"] == "speed":
        request["arguments"]["seconds"] = request["seconds"]
    try:
        emit = lambda part, value: answer({"part": part, "value": value})  # noqa: E731
        run(request["kind"], request["arguments"], settings, work, emit)
    except DyditError as error:
        answer({"failed": one_line(error)})
        return 1
    except Exception as error:  # a cell that fails is a result; the log has the whole of it
        traceback.print_exc()
        answer({"failed": f"{type(error).__name__}: {one_line(error)[:400]}"})
        return 1
    answer({"end": True})
    return 0


if __name__ == "__main__":
    sys.exit(main())
