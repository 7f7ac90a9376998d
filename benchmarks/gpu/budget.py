"""What one process measures in a time budget, part by part: results that a kill cannot lose, and who gets how long.

The file is complete after every measurement:

    {"version": 1, "dry_run": false, "settings": {...}, "machine": {...}, "parts": {NAME: PART, ...}}

A PART is {"status", "seconds", "reason" of one that failed or was cut off, "results": {NAME: figures}}. A status of
"running" in a file that nobody writes any more is that of the part that was killed.
"""

from __future__ import annotations

import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import Any

from ceilings import Clock
from pydantic import Field
from tasks import Settings

from dydit.errors import DyditError, one_line
from dydit.files import write_json
from dydit.reports.results import Machine

LEAST_SECONDS = 3
"""With less than this left of all the time no part starts."""


class NineSettings(Settings):
    """Sizes of a run. `loop_steps`: steps of a whole run in the device loop. `subnets`: merged subnetworks.

    `measured`: steps of a round of the model in PyTorch. `steps`: those of a run to which times are extrapolated.
    """

    loop_steps: int = Field(default=50, ge=2)
    subnets: int = Field(default=16, ge=1)


class State(StrEnum):
    """How far a part is."""

    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CUT = "cut off"
    LEFT = "left"


class OutOfTime(BaseException):
    """A part ran longer than it may. No `Exception`, so that no library takes it for one of its own."""


@dataclass
class Context:
    """What the parts of a run share.

    `folder`: for files that are of no use afterwards. `reference`: the file that parity is held against; None: it is
    made. `made`: what a part leaves for later ones, by name.
    """

    settings: NineSettings
    out: Path
    folder: Path
    deadline: float
    reference: Path | None = None
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    made: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=lambda: Machine.here().to_json())
    part: str = ""
    end: float = 0.0

    @property
    def clock(self) -> Clock:
        """The clock of the device."""
        return Clock(self.settings.device)

    @property
    def dry(self) -> bool:
        """Whether nothing runs on a GPU."""
        return self.settings.gpu is None

    @property
    def left(self) -> float:
        """Seconds that the present part may still use."""
        return self.end - time.monotonic()

    def results(self, part: str) -> dict[str, Any]:
        """The results of a part, as far as they are known."""
        return self.parts.get(part, {}).get("results", {})

    def emit(self, name: str, value: Any) -> None:
        """Keep a result of the present part: it is in the file when this returns."""
        self.parts[self.part]["results"][name] = value
        self.save()

    def save(self) -> None:
        """Write the file, all of it or nothing."""
        values = {"version": 1, "dry_run": self.dry, "settings": self.settings.model_dump(mode="json")}
        write_json(self.out, {**values, "machine": self.machine, "parts": self.parts})


@dataclass(frozen=True)
class Part:
    """A part of the run: what it does, the seconds after which it starts no measurement, and those that it may add."""

    name: str
    run: Callable[[Context], None]
    seconds: float
    grace: float = 15.0


def run_parts(context: Context, parts: Sequence[Part]) -> None:
    """Run part after part. One that fails, or that has to be cut off, costs no other."""
    for part in parts:
        start, remaining = time.monotonic(), context.deadline - time.monotonic()
        entry = context.parts[part.name] = {"status": State.RUNNING, "seconds": 0.0, "results": {}}
        if remaining < LEAST_SECONDS:
            entry |= {"status": State.LEFT, "reason": "all the time was used up before"}
            context.save()
            continue
        context.part, context.end = part.name, start + min(part.seconds, remaining)
        context.save()
        try:
            with cut_off_after(min(part.seconds + part.grace, remaining)):
                part.run(context)
            entry["status"] = State.DONE
        except OutOfTime as error:
            entry |= {"status": State.CUT, "reason": str(error)}
        except Exception as error:  # a part that fails is a result
            traceback.print_exc()
            name = "" if isinstance(error, DyditError) else f"{type(error).__name__}: "
            entry |= {"status": State.FAILED, "reason": f"{name}{one_line(error)[:400]}"}
        entry["seconds"] = round(time.monotonic() - start, 2)
        context.save()
        print(f"{part.name}: {entry['status']}, {entry['seconds']:.0f} s", file=sys.stderr, flush=True)


@contextmanager
def cut_off_after(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` in the block after some seconds, as soon as Python gets to run."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise OutOfTime(f"cut off after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
