"""The process of one contender of a benchmark, as the benchmark sees it: started, asked, and what is noted of it.

`dydit.bench.bench_worker` is the other end.
"""

from __future__ import annotations

import base64
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dydit.bench.timing import Decided, Job, Loaded, Round
from dydit.child_process import ChildDiedError, ChildProcess
from dydit.errors import BackendError, DyditError, UnavailableError
from dydit.files import write_json
from dydit.reports.bench_report import SideKind
from dydit.validation import Strict

WORKER = [sys.executable, "-m", "dydit.bench.bench_worker"]


class Contender:
    """The process of a contender; it loads when this object is made."""

    def __init__(self, job: Job, process: ChildProcess):
        self.job, self._process = job, process
        self.loaded = Loaded.model_validate(self.ask(job.model_dump_json()))

    def ask(self, line: str) -> dict[str, Any]:
        """Send a line and wait for the answer."""
        try:
            return self._process.ask(line)
        except (ChildDiedError, UnavailableError):
            raise
        except DyditError as error:
            raise BackendError(f"{self.job.side.name}: {error}") from error

    def round(self) -> Round:
        """Time one round."""
        return Round.model_validate(self.ask("round"))

    def check(self, k: int | None = None) -> np.ndarray:
        """What the model contributes to the k-th measured step from the initial noise, by default to the middle one:
        f32 [B, C, S, S].
        """
        return _array(self.ask("check" if k is None else f"check {k}"))

    def last(self) -> np.ndarray:
        """The latents after the last step of the latest round, f32 [B, C, S, S]."""
        return _array(self.ask("last"))

    @property
    def disk_bytes(self) -> int | None:
        """Bytes of the files that it loads; None if a script does not say which."""
        side = self.job.side
        path = Path((side.checkpoint if side.kind is SideKind.SCRIPT else side.path) or "")
        if side.kind is SideKind.SCRIPT and not (side.checkpoint and path.exists()):
            return None
        files = [each for each in path.rglob("*") if each.is_file()] if path.is_dir() else [path]
        return sum(each.stat().st_size for each in files)


@contextmanager
def started(job: Job) -> Iterator[Contender]:
    """The loaded process of a contender, which ends with the block."""
    command = [sys.executable, job.side.path] if job.side.kind is SideKind.SCRIPT else WORKER
    with ChildProcess(command, f"runs {job.side.name!r}", job.threads) as process:
        yield Contender(job, process)


@contextmanager
def warmed(job: Job, record: Record, rounds: int) -> Iterator[Contender]:
    """The process of a contender, as `started`, after `rounds` rounds that do not count; `record` notes the first."""
    start = time.perf_counter()
    with started(job) as contender:
        for _ in range(rounds):
            contender.round()
            record.begin(time.perf_counter() - start, contender.loaded)
        yield contender


@dataclass(frozen=True)
class Facts:
    """What the process of a contender says of itself after its last round.

    `check`, `last`: as `Contender.check` and `Contender.last` give them; None unless wanted. The others: see
    `SideResult`.
    """

    decided: Decided
    peak_bytes: int
    settled_bytes: int | None
    disk_bytes: int | None
    check: np.ndarray | None
    last: np.ndarray | None

    @classmethod
    def of(cls, contender: Contender, with_arrays: bool) -> Facts:
        """The facts of a process. Memory comes first, because the untimed round after it loads more."""
        memory, check, last = contender.ask("memory"), None, None
        if with_arrays:
            check, last = contender.check(), contender.last()
        decided = Decided.model_validate(contender.ask("decided"))
        return cls(decided, **memory, disk_bytes=contender.disk_bytes, check=check, last=last)


class Start(Strict):
    """How a contender started the first time, with nothing compiled before.

    `seconds`: from starting the process to the end of its first round: to the first images of a run of these steps.
    """

    seconds: float
    loaded: Loaded


class _Kept(Strict):
    """What `Record` keeps in a file."""

    start: Start | None = None
    counted: tuple[Round, ...] = ()


class Record:
    """The counted rounds of a contender, and how it started. In `folder`, a file keeps them, with which another
    `Record` continues.
    """

    def __init__(self, name: str, folder: Path | None = None):
        self._kept = _Kept()
        self._file = None if folder is None else folder / (re.sub(r"\W+", "-", name) + ".json")
        if self._file is not None and self._file.is_file():
            self._kept = _Kept.model_validate_json(self._file.read_bytes())

    @property
    def counted(self) -> tuple[Round, ...]:
        """All rounds that count, in order."""
        return self._kept.counted

    @property
    def start(self) -> Start:
        """How it started; it has to have begun."""
        assert self._kept.start is not None
        return self._kept.start

    def begin(self, seconds: float, loaded: Loaded) -> None:
        """Note how it started, unless that is known."""
        if self._kept.start is None:
            self._keep(start=Start(seconds=seconds, loaded=loaded))

    def add(self, counted: Round) -> None:
        """Note a round that counts."""
        self._keep(counted=(*self.counted, counted))

    def _keep(self, **changes: Any) -> None:
        self._kept = self._kept.model_copy(update=changes)
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._file, self._kept.model_dump(mode="json"))


def _array(answer: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(answer["values"]), "<f4").reshape(answer["shape"])
