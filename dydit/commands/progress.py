"""How commands show their progress on standard error: a bar on a terminal, a few plain lines in a file or a pipe.

A progress is called as `progress(done, total)`, or as `progress.stage(title, done, total)` in a command that has
several stages.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
        """Report the same of the stage `title`. A new title ends the stage before."""
        if title != self._title:
            self.end_stage()
            self._title = title
        self(done, total)

    def note(self, line: str) -> None:
        """Print a line for a person while the command is at work."""

    def end_stage(self) -> None:
        """The stage is complete."""

    def close(self) -> None:
        """Leave standard error ready for what is printed next."""


class ProgressBar(Progress):
    """For a terminal: a bar, which is removed at the end."""

    def __init__(self, title: str):
        super().__init__(title)
        self._bar: Any = None

    def __call__(self, done: int, total: int, details: Any = None) -> None:
        if self._bar is not None and done < self._bar.n:
            self.end_stage()
        if self._bar is None:
            self._bar = _make_bar(self._title, done, total)
        self._bar.total = total
        self._bar.update(done - self._bar.n)
        if done >= total:
            self._bar.refresh()

    def note(self, line: str) -> None:
        self.close()
        click.echo(line, err=True)

    def end_stage(self) -> None:
        self.close()

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
    return Bar(total=total, initial=done, desc=title, bar_format=BAR, file=sys.stderr, leave=False, dynamic_ncols=True)


class ProgressLines(Progress):
    """For a file or a pipe: a line when a stage begins, one every 30 seconds, and one of 100 % when it ends."""

    def __init__(self, title: str):
        super().__init__(title)
        self._done = self._total = self._first = 0
        self._started = self._shown = 0.0
        self._is_open = False  # whether a stage has begun and its line of 100 % is still to come

    def __call__(self, done: int, total: int, details: Any = None) -> None:
        now = time.monotonic()
        if done < self._done:
            self.end_stage()
        begins = not self._is_open
        if begins and self._total and done >= total:
            return  # the line of 100 % is there already
        if begins:
            self._first, self._started, self._is_open = done, now, True
        self._done, self._total = done, total
        if done >= total:
            self._complete()
        elif begins or now - self._shown >= LINE_SECONDS:
            self._shown = now
            left = ""
            if self._first < done:
                left = f", {duration((now - self._started) * (total - done) / (done - self._first))} left"
            self.note(f"{self._title}: {done}/{total} ({100 * done // total} %){left}")

    def note(self, line: str) -> None:
        click.echo(line, err=True)

    def end_stage(self) -> None:
        self._complete()
        self._done = self._total = 0

    def _complete(self) -> None:
        if self._is_open:
            self.note(f"{self._title}: {self._total}/{self._total} (100 %)")
            self._is_open = False


@contextmanager
def show_progress(title: str) -> Iterator[Progress]:
    """Progress on standard error for the time of a block; nothing with `--quiet`."""
    if click.get_current_context().ensure_object(Settings).quiet:
        yield Progress()
        return
    progress = ProgressBar(title) if sys.stderr.isatty() else ProgressLines(title)
    try:
        yield progress
        progress.end_stage()
    finally:
        progress.close()
