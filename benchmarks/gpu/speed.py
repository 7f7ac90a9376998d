"""Times sides of one way and batch beside each other, in one process, taking turns round by round.

Every side is opened and makes two rounds, of which the first does not count; what was measured is told at once, so that
a side that brings the process down takes only itself along. Then the sides take turns. A side that fails while others
are open (most likely for want of memory) is tried once more with the device to itself. Device memory is what the driver
says to be in use after a side's first rounds, less what was before it was opened: weights, activations, and what the
library keeps for itself. On a slow device there is not the time for all rounds: those that there are count, and where
there is one alone, it is the figure, without warm-up, and is said to be so.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from facts import device_memory
from settings import Settings, Work
from sides import Side, open_side

from dydit.errors import UnavailableError, one_line

Emit = Callable[[str, Any], None]
SHARE = 0.9
"""Of a cell's time, what may be spent before its process has to end."""


class _Running:
    """A side that is open, and what it has shown so far."""

    def __init__(self, settings: Settings, work: Work, way: str, name: str, batch: int, alone: bool, deadline: float):
        self.name, before = name, used_memory(settings)
        start = time.perf_counter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            self.side: Side = open_side(settings, work, way, name, batch)
            self.load_seconds = time.perf_counter() - start
            began = time.perf_counter()
            first = self.side.round()
            self.round_seconds = time.perf_counter() - began
        self.warnings = sorted(
            {one_line(each.message)[:300] for each in caught if isinstance(each.message, UserWarning)}
        )
        self.first_ms, self.rounds = float(np.mean(first)), list[list[float]]()
        self.alone, self._repeated_before = alone, self.side.repeated
        self.warm = time.monotonic() + self.round_seconds < deadline
        if self.warm:
            self.turn()
        else:
            self.rounds.append(first)
        after = used_memory(settings)
        self.memory = None if before is None or after is None else max(0, after - before)

    def turn(self) -> None:
        """One more round."""
        self.rounds.append(self.side.round())

    def to_json(self) -> dict[str, Any]:
        """What there is, as plain data."""
        means = [float(np.mean(each)) for each in self.rounds]
        return {
            "ms": float(np.median(means)),
            "round_ms": means,
            "step_ms": np.median(np.asarray(self.rounds), axis=0).tolist() if self.side.steps <= 50 else None,
            "steps": self.side.steps,
            "warmup": int(self.warm),
            "statistic": "median over rounds of the mean step",
            "clock": self.side.clock,
            "first_round_ms": self.first_ms,
            "load_seconds": self.load_seconds,
            "memory_bytes": self.memory,
            "repeated_steps": self.side.repeated - self._repeated_before,
            "alone": self.alone,
            "warnings": self.warnings,
        }


def measure(
    settings: Settings, work: Work, emit: Emit, way: str, sides: Sequence[str], batch: int, seconds: float
) -> None:
    """Emit each side's figures, again after each of its rounds, or why it has none; no round is begun that would not
    end within `seconds`.
    """
    deadline = time.monotonic() + SHARE * seconds
    running: list[_Running] = []
    again: list[str] = []
    for name in sides:
        try:
            running.append(_Running(settings, work, way, name, batch, False, deadline))
            emit(name, running[-1].to_json())
        except UnavailableError as error:
            emit(name, {"not_run": one_line(error)})
        except Exception as error:  # whatever a library throws is the answer of this side, and the others go on
            emit(name, {"error": _text(error)})
            if running:
                again.append(name)
        release(settings)
    for _ in range(settings.repeats - 1):
        for each in list(running):
            if time.monotonic() + each.round_seconds > deadline:
                continue
            try:
                each.turn()
                emit(each.name, each.to_json())
            except Exception as error:  # as above; what it has shown before stays, with this remark
                emit(each.name, {**each.to_json(), "stopped": _text(error)})
                running.remove(each)
    while running:
        running.pop().side.close()
        release(settings)
    for name in again:
        _alone(settings, work, emit, way, name, batch, deadline)


def _alone(settings: Settings, work: Work, emit: Emit, way: str, name: str, batch: int, deadline: float) -> None:
    try:
        only = _Running(settings, work, way, name, batch, True, deadline)
        for _ in range(settings.repeats - 1):
            if time.monotonic() + only.round_seconds < deadline:
                only.turn()
        emit(name, only.to_json())
        only.side.close()
    except Exception as error:  # as in `measure`
        emit(name, {"error": _text(error)})
    release(settings)


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)[:300]}"


def used_memory(settings: Settings) -> int | None:
    """Bytes of device memory in use, by whomever; None on the CPU, or where the driver does not tell."""
    if settings.dry_run or (memory := device_memory()) is None:
        return None
    return memory[1] - memory[0]


def release(settings: Settings) -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if not settings.dry_run:
        import sys

        if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_available():
            torch.cuda.empty_cache()
