"""Processes that build engines: each imports TensorRT once and builds one job after another.

`python -m dydit.engines.build_workers` is such a process. It is a fresh one, because Polygraphy serves one flavour in a
process.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from dydit.child_process import ChildDiedError, ChildProcess, answered, serve
from dydit.engines.builder import Job, build_engine
from dydit.engines.store import Built
from dydit.errors import BackendError, DyditError, one_line

WORKER = [sys.executable, "-m", "dydit.engines.build_workers"]
Done = Callable[[Job, Built], None]


def run_jobs(jobs: Sequence[Job], processes: int, done: Done) -> None:
    """Build all jobs, `processes` at a time; `done` is called here, as each is finished.

    After a failure no further job starts; those under way are finished first. Raises the first failure, or
    `BackendError` naming the job over which a process died.
    """
    waiting, failure = list(reversed(jobs)), None
    with ExitStack() as stack:
        idle = [stack.enter_context(ChildProcess(WORKER, "builds engines")) for _ in range(min(processes, len(jobs)))]
        busy: dict[ChildProcess, Job] = {}
        while busy or (idle and waiting):
            while idle and waiting:
                worker, job = idle.pop(), waiting.pop()
                worker.send(job.model_dump_json())
                busy[worker] = job
            for worker in answered(busy):
                job = busy.pop(worker)
                try:
                    built = _receive(worker, job)
                except DyditError as error:
                    failure, waiting = failure or error, []
                else:
                    idle.append(worker)
                    done(job, built)
    if failure is not None:
        raise failure


def _receive(worker: ChildProcess, job: Job) -> Built:
    try:
        return Built.model_validate(worker.receive())
    except ChildDiedError as error:
        raise BackendError(
            f"cannot build {job.graph.name}: {error}; finished engines are kept; run the same command again, with "
            "fewer --jobs if memory ran out"
        ) from error


def _answer(line: str) -> dict[str, Any]:
    job = Job.model_validate_json(line)
    try:
        return build_engine(job).model_dump(mode="json")
    except OSError as error:
        raise BackendError(f"cannot build {job.graph.name}: {one_line(error)}") from error


if __name__ == "__main__":
    sys.exit(serve(_answer))
