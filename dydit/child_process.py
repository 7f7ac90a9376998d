"""Child processes that do one kind of work: a line with a job goes in, a line of JSON with its result comes back.

    with ChildProcess([sys.executable, "-m", "dydit.room.worker"], "measures") as child:
        result = child.ask(job.model_dump_json())

The worker module ends with `sys.exit(serve(answer))`. It ends with its parent, however that ends, so a killed command
leaves nothing running.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing.connection import wait
from typing import Any, Self

from dydit import errors
from dydit.errors import BackendError, DyditError, one_line

_PARENT = "DYDIT_PARENT_PROCESS"
_PR_SET_PDEATHSIG = 1
_PATIENCE = 10.0  # seconds that a process gets to end once its input has ended


class ChildDiedError(BackendError):
    """A child process ended without an answer."""


class ChildProcess:
    """A running worker. As a context manager it ends with the block, and is killed where the block fails.

    `task`: what the process does, for messages ("builds engines"). `threads`: threads that OpenMP may use there.
    """

    def __init__(self, command: Sequence[str], task: str, threads: int | None = None):
        self._task = task
        environment = {**os.environ, _PARENT: str(os.getpid())}
        if threads is not None:
            # On a busy machine OpenMP's spinning barriers make PyTorch many times slower than it is.
            environment = {"OMP_WAIT_POLICY": "PASSIVE", **environment, "OMP_NUM_THREADS": str(threads)}
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  (closed in _end)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            encoding="utf-8",
            env=environment,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._jobs, self._answers = self._process.stdin, self._process.stdout

    def send(self, line: str) -> None:
        """Hand over a job. Where the process has died, `receive` says so."""
        with contextlib.suppress(BrokenPipeError):
            self._jobs.write(line + "\n")
            self._jobs.flush()

    def receive(self) -> dict[str, Any]:
        """Wait for the answer to the job. Raises the worker's `DyditError`, and `ChildDiedError` where it has died."""
        answer = self._answers.readline()
        if not answer:
            raise self._death()
        values: dict[str, Any] = json.loads(answer)
        if "error" in values:
            raise getattr(errors, values["kind"], BackendError)(values["error"])
        return values

    def ask(self, line: str) -> dict[str, Any]:
        """Hand over a job and wait for its answer. Raises as `receive` does."""
        self.send(line)
        return self.receive()

    def fileno(self) -> int:
        """The descriptor of the pipe that answers come through."""
        return self._answers.fileno()

    def _death(self) -> ChildDiedError:
        """How the process ended, with its last line; all that it wrote is a note, which a traceback shows."""
        code = self._process.wait()
        self._errors.seek(0)
        text = self._errors.read().strip()
        last = text.splitlines()[-1].strip() if text else "it wrote nothing to standard error"
        how = f"ended: {last} (exit code {code})"
        if code < 0:
            how = f"was ended by {signal.Signals(-code).name}, which can mean that memory ran out: {last}"
        died = ChildDiedError(f"the process that {self._task} {how}")
        died.add_note(text)
        return died

    def _end(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # what is left to send to a process that has ended
            self._jobs.close()
        self._answers.close()
        try:
            self._process.wait(timeout=_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is not None:
            self._process.kill()
        self._end()


def answered(children: Iterable[ChildProcess]) -> list[ChildProcess]:
    """Wait until at least one of the processes has an answer, or has died; return those."""
    return wait(list(children))  # type: ignore[arg-type, return-value]  # it takes whatever has a `fileno`


def serve(answer: Callable[[str], Mapping[str, Any]]) -> int:
    """A worker's life: answer each line of standard input until the input ends. Returns the exit code.

    A `DyditError` is the answer {"error": message, "kind": class}, and the process ends with 2. Whatever else writes to
    standard output goes to standard error.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ^C reaches the parent, which ends this process
    _end_with_parent()
    for line in sys.stdin:
        code, values = 0, dict[str, Any]()
        try:
            values = dict(answer(line.strip()))
        except DyditError as error:
            code, values = 2, {"error": one_line(error), "kind": type(error).__name__}
        answers.write(json.dumps(values, allow_nan=False) + "\n")
        answers.flush()
        if code:
            return code
    return 0


def _end_with_parent() -> None:
    """Have the system kill this process when the one that started it dies, even in the midst of a job."""
    parent = os.environ.get(_PARENT)
    if parent is not None:
        end_with(int(parent))


def end_with(parent: int) -> None:
    """Have the system kill this process when its parent dies. `parent`: the parent's number, if it is still alive."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
