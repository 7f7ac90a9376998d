"""How long commands show their progress on standard error: a line that is written over on a terminal, lines in a log.

Both are called as `progress(done, total)`, or `progress.stage(title, done, total)` in a command of several stages.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from dydit.words import duration

REDRAW_SECONDS = 0.1
"""How often a terminal's line is written over, at most."""
LOG_SECONDS = 30.0
"""How often a log gets a line."""
LOG_MARK_SECONDS = 2.0
"""The least time between two lines of a log; a tenth of the work that took longer has a line."""


class Progress:
    """Counts what is done and estimates the time that is left; a subclass decides when to show it, and where."""

    def __init__(self, title: str):
        self._title, self._total = title, 0
        self._started, self._first = time.monotonic(), 0

    def __call__(self, done: int, total: int, details: Mapping[str, Any] | None = None) -> None:
        """Take note that `done` of `total` are done. A new total, or fewer done than before, starts another count."""
        now = time.monotonic()
        another = total != self._total or done < self._first
        if another:
            self._total, self._started, self._first = total, now, done
        if self._due(now, done, total, another):
            self._show(self._text(now, done, total))

    def stage(self, title: str, done: int, total: int) -> None:
        """The same, for one of several stages."""
        if title != self._title:
            self._title, self._total = title, 0
        self(done, total)

    def close(self) -> None:
        """Leave standard error as it should be for what follows."""

    def _text(self, now: float, done: int, total: int) -> str:
        text = f"{self._title}: {done}/{total} ({100 * done // max(1, total)} %)"
        if self._first < done < total:
            text += f", {duration((now - self._started) * (total - done) / (done - self._first))} left"
        return text

    def _due(self, now: float, done: int, total: int, another: bool) -> bool:
        raise NotImplementedError

    def _show(self, text: str) -> None:
        raise NotImplementedError


class ProgressLine(Progress):
    """For a terminal: one line that is written over, and wiped at the end."""

    def __init__(self, title: str):
        super().__init__(title)
        self._shown, self._width = 0.0, 0

    def close(self) -> None:
        sys.stderr.write("\r" + " " * self._width + "\r")
        sys.stderr.flush()

    def _due(self, now: float, done: int, total: int, another: bool) -> bool:
        if done < total and now - self._shown < REDRAW_SECONDS:
            return False
        self._shown = now
        return True

    def _show(self, text: str) -> None:
        sys.stderr.write(f"\r{text:<{self._width}}")
        sys.stderr.flush()
        self._width = len(text)


class ProgressLog(Progress):
    """For a log file or a pipe: a line once work has begun, then one at every tenth of it or every half minute."""

    def __init__(self, title: str):
        super().__init__(title)
        self._logged, self._tenth, self._logged_title = self._started, 0, ""

    def _due(self, now: float, done: int, total: int, another: bool) -> bool:
        tenth, waited = 10 * done // max(1, total), now - self._logged
        if another:
            self._tenth = tenth
        is_mark = tenth > self._tenth and waited >= LOG_MARK_SECONDS
        if self._title == self._logged_title and waited < LOG_SECONDS and not is_mark:
            return False
        self._logged, self._tenth, self._logged_title = now, tenth, self._title
        return True

    def _show(self, text: str) -> None:
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
