"""A contender of a benchmark as seen by the process that lets contenders take turns.

`dydit.bench.bench_worker` is the other end of the pipe.
"""

from __future__ import annotations

import base64
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from dydit.bench.timing import Job, Loaded
from dydit.child_process import ChildDiedError, ChildProcess
from dydit.errors import BackendError, DyditError, UnavailableError
from dydit.reports.bench_report import SideKind

WORKER = [sys.executable, "-m", "dydit.bench.bench_worker"]


@contextmanager
def started(job: Job) -> Iterator[Contender]:
    """The loaded process of a contender, which ends with the block."""
    command = [sys.executable, job.side.path] if job.side.kind is SideKind.SCRIPT else WORKER
    with ChildProcess(command, f"runs {job.side.name!r}", job.threads) as process:
        yield Contender(job, process)


class Contender:
    """The process of a contender; it loads when this object is made."""

    def __init__(self, job: Job, process: ChildProcess):
        self.job, self._process = job, process
        self.loaded = Loaded.model_validate(self.ask(job.model_dump_json()))

    def ask(self, line: str) -> dict[str, Any]:
        """Send a line and wait for the answer. An error of the contender names it."""
        try:
            return self._process.ask(line)
        except (ChildDiedError, UnavailableError):
            raise
        except DyditError as error:
            raise BackendError(f"{self.job.side.name}: {error}") from error

    def check(self, k: int | None = None) -> np.ndarray:
        """What the model contributes to the k-th measured step from the initial noise, by default to the middle one:
        f32 [B, C, S, S].
        """
        return _array(self.ask("check" if k is None else f"check {k}"))

    def last(self) -> np.ndarray:
        """The latents after the last step of the latest round, f32 [B, C, S, S]."""
        return _array(self.ask("last"))


def _array(answer: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(answer["values"]), "<f4").reshape(answer["shape"])
