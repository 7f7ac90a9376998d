"""Processes that build engines: each imports TensorRT once and builds one job after another.

They end with the process that started them, however that ends, so that a killed build leaves nothing running. Started
afresh (`spawn`), for Polygraphy serves one flavour in a process; a script that builds needs the usual
`if __name__ == "__main__":`.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

from dydit.engines.builder import Built, Job, build_engine
from dydit.errors import BackendError, DyditError, one_line

_PR_SET_PDEATHSIG = 1
_PATIENCE = 5.0  # seconds that an idle worker gets to end
Done = Callable[[Job, Built], None]


@dataclass
class _Worker:
    process: SpawnProcess
    pipe: Connection
    job: Job | None = None


def run_jobs(jobs: Sequence[Job], processes: int, done: Done) -> None:
    """Build all jobs, `processes` at a time; `done` is called here, as each is finished.

    After a failure no further job starts; those under way are finished first. Raises the first failure, or
    `BackendError` naming the job over which a process died.
    """
    waiting = list(reversed(jobs))
    workers = [_start() for _ in range(min(processes, len(jobs)))]
    failure: DyditError | None = None
    try:
        for worker in workers:
            _assign(worker, waiting)
        while busy := {worker.pipe: worker for worker in workers if worker.job is not None}:
            for pipe in wait(list(busy)):
                worker = busy[pipe]  # type: ignore[index]
                job, outcome = worker.job, _receive(worker)
                assert job is not None
                if isinstance(outcome, Built):
                    done(job, outcome)
                else:
                    failure, waiting = failure or outcome, []
                _assign(worker, waiting)
        if failure is not None:
            raise failure
    finally:
        _stop(workers)


def _start() -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, os.getpid()), name="dydit-build", daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _assign(worker: _Worker, waiting: list[Job]) -> None:
    worker.job = waiting.pop() if waiting else None
    if worker.job is not None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # its end shows when we ask for the outcome
            worker.pipe.send(worker.job)


def _receive(worker: _Worker) -> Built | DyditError:
    try:
        outcome: Built | DyditError = worker.pipe.recv()
        return outcome
    except (EOFError, ConnectionResetError):
        worker.process.join()
        code, graph = worker.process.exitcode, worker.job.graph.name if worker.job else "?"
        if code is not None and code < 0:
            how = f"ended by {signal.Signals(-code).name}, as when memory runs out: run again, with fewer --jobs"
        else:
            how = f"ended with exit code {code}: what it wrote to standard error says why"
        return BackendError(f"the process that built {graph} was {how}; what is finished is kept")


def _stop(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.pipe.close()
        if worker.job is not None:
            worker.process.kill()
    for worker in workers:
        worker.process.join(_PATIENCE)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()


def _serve(pipe: Connection, parent: int) -> None:
    """A worker's life: jobs come through the pipe, results go back, and the end of the pipe is its end."""
    _end_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ^C reaches the parent, which ends us
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            job: Job = pipe.recv()
            try:
                pipe.send(build_engine(job))
            except DyditError as error:
                pipe.send(error)
            except OSError as error:
                pipe.send(BackendError(f"cannot build {job.graph.name}: {one_line(error)}"))


def _end_with(parent: int) -> None:
    """Have the system kill this process when its parent dies, even in the midst of a build."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
