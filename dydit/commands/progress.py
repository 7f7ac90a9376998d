"""How commands show their progress on standard error: a bar on a terminal, a few plain lines in a file or a pipe.

A progress is called as `progress(done, total)`, or as `progress.stage(title, done, total)` in a command that has
several stages.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import click

from dydit.commands.group import Settings
from dydit.words import duration

LINE_SECONDS = 30.0
"""Seconds between two lines of one stage where there is no terminal."""
BAR = "{desc}: {percentage:3.0f} %|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"


class Progress:
    """Progress that is not shown, as with `--quiet`; the base class of those that are."""

    def __init__(self, title: str = ""):
        self._title = title

    def __call__(self, done: int, total: int, details: Any = None) -> None:
        """Report that `done` of `total` are done. A smaller `done` than before starts a new count."""

    def stage(self, title: str, done: int, total: int) -> None:
        """Report the same of the stage `title`. Stages may take turns."""
        self._title = title
        self(done, total)

    def note(self, line: str) -> None:
        """Print a line for a person while the command is at work."""

    def complete(self) -> None:
        """Report that all stages are complete."""

    def close(self) -> None:
        """Leave standard error ready for what is printed next."""


class ProgressBar(Progress):
    """For a terminal: a bar, which is removed at the end."""

    def __init__(self, title: str):
        super().__init__(title)
        self._bar: Any = None

    def __call__(self, done: int, total: int, details: Any = None) -> None:
        if self._bar is not None and (self._bar.desc != self._title or done < self._bar.n):
            self.close()
        if self._bar is None:
            self._bar = _make_bar(self._title, done, total)
        self._bar.total = total
        self._bar.update(done - self._bar.n)
        if done >= total:
            self._bar.refresh()

    def note(self, line: str) -> None:
        self.close()
        click.echo(line, err=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _make_bar(title: str, done: int, total: int) -> Any:
    from tqdm import tqdm

    class Bar(tqdm):
        # tqdm's thread and its lock between processes are not needed, and would be in the way of processes that fork.
        monitor_interval = 0

    Bar.set_lock(threading.RLock())
    return Bar(
        total=total,
        initial=done,
        desc=title,
        bar_format=BAR,
        file=sys.stderr,
        leave=False,
        ncols=_columns(),
        nrows=20,  # there is one bar; with the height of a terminal that states none, tqdm would hide it
    )


def _columns() -> int:
    """The width of a line on the terminal; 79 for a terminal that states none."""
    try:
        return (os.get_terminal_size(sys.stderr.fileno()).columns or 80) - 1
    except (OSError, ValueError):
        return 79


@dataclass
class _Count:
    """What is done of a stage. `first` were done when it began, at the time `started`; the last line is of `shown`."""

    first: int
    started: float
    done: int = 0
    total: int = 0
    shown: float = 0.0
    is_complete: bool = False  # whether its line of 100 % was printed


class ProgressLines(Progress):
    """For a file or a pipe: a line when a stage begins, one every 30 seconds, and one of 100 % when it ends."""

    def __init__(self, title: str):
        super().__init__(title)
        self._counts: dict[str, _Count] = {}

    def __call__(self, done: int, total: int, details: Any = None) -> None:
        now, title = time.monotonic(), self._title
        count = self._counts.get(title)
        if count is not None and done < count.done:
            self._complete(title, count)
        begins = count is None or done < count.done or (count.is_complete and done < total)
        if count is None or begins:
            count = self._counts[title] = _Count(done, now)
        count.done, count.total = done, total
        if done >= total:
            self._complete(title, count)
        elif begins or now - count.shown >= LINE_SECONDS:
            count.shown = now
            left = ""
            if count.first < done:
                left = f", {duration((now - count.started) * (total - done) / (done - count.first))} left"
            self.note(f"{title}: {done}/{total} ({100 * done // total} %){left}")

    def note(self, line: str) -> None:
        click.echo(line, err=True)

    def complete(self) -> None:
        for title, count in self._counts.items():
            self._complete(title, count)

    def _complete(self, title: str, count: _Count) -> None:
        if not count.is_complete:
            count.is_complete = True
            self.note(f"{title}: {count.total}/{count.total} (100 %)")


@contextmanager
def show_progress(title: str) -> Iterator[Progress]:
    """Progress on standard error for the time of a block; nothing with `--quiet`."""
    if click.get_current_context().ensure_object(Settings).quiet:
        yield Progress()
        return
    progress = ProgressBar(title) if sys.stderr.isatty() else ProgressLines(title)
    try:
        yield progress
        progress.complete()
    finally:
        progress.close()
