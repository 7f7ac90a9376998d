"""The process of one contender of a benchmark, as the benchmark sees it: started, asked, and its rounds.

`dydit.bench.bench_worker` is the other end.
"""

from __future__ import annotations

import base64
import re
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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
SETTLE_SECONDS = 0.05  # pause for the threads of the contender before


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


class _Kept(Strict):
    """What `Rounds` keeps of a contender in a file."""

    first_seconds: float
    counted: tuple[Round, ...] = ()


@dataclass(frozen=True)
class Facts:
    """What the process of a contender says of itself after its last round.

    `check`, `last`: as `Contender.check` and `Contender.last` give them; None unless wanted. The others: see
    `SideResult`.
    """

    loaded: Loaded
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
        return cls(contender.loaded, decided, **memory, disk_bytes=contender.disk_bytes, check=check, last=last)


class Rounds:
    """The rounds of a contender, in one process that stays, or in a new one each time.

    In `folder`, a file keeps them, with which another `Rounds` continues. `with_arrays`: whether `facts`, which the
    last round sets, are to have arrays.
    """

    facts: Facts

    def __init__(self, job: Job, folder: Path | None = None, with_arrays: bool = False):
        self.job, self._with_arrays, self._kept = job, with_arrays, _Kept(first_seconds=0)
        self._process: Contender | None = None
        name = re.sub(r"\W+", "-", job.side.name)
        self._file = None if folder is None else folder / f"{name}.json"
        if self._file is not None and self._file.is_file():
            self._kept = _Kept.model_validate_json(self._file.read_bytes())

    @property
    def counted(self) -> tuple[Round, ...]:
        """All that count, in order."""
        return self._kept.counted

    @property
    def first_seconds(self) -> float:
        """From starting the process to the end of its first round: to the first images of a run of these steps."""
        return self._kept.first_seconds

    def stay(self, stack: ExitStack) -> None:
        """Keep one process for all rounds, which ends with `stack`."""
        self._process = stack.enter_context(self.process())

    @contextmanager
    def process(self) -> Iterator[Contender]:
        """The process that stays, or else a new one for the time of the block, after a round that does not count."""
        if self._process is not None:
            yield self._process
            return
        start = time.perf_counter()
        with started(self.job) as contender:
            contender.ask("round")
            if not self.first_seconds:
                self._keep(_Kept(first_seconds=time.perf_counter() - start))
            yield contender

    def take(self, number: int, is_last: bool = False) -> None:
        """Time round `number`, unless it is kept. Those below 0 warm up, which new processes have done."""
        if self._process is None and number < 0:
            return
        with self.process() as contender:
            if number >= len(self.counted) or number < 0:
                time.sleep(SETTLE_SECONDS)
                timed = Round.model_validate(contender.ask("round"))
                if number >= 0:
                    self._keep(self._kept.model_copy(update={"counted": (*self.counted, timed)}))
            if is_last:
                self.facts = Facts.of(contender, self._with_arrays)

    def _keep(self, kept: _Kept) -> None:
        self._kept = kept
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._file, self._kept.model_dump(mode="json"))


def _array(answer: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(answer["values"]), "<f4").reshape(answer["shape"])
