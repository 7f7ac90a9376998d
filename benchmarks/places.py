"""What the benchmarks of this folder share: a folder to work in, and a line that says how far they are."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path


def progress(title: str) -> Callable[[int, int], None]:
    """A line on standard error."""
    start = time.monotonic()

    def tick(done: int, total: int) -> None:
        print(f"\r{title}: {done}/{total}, {time.monotonic() - start:.0f} s", end="", file=sys.stderr)
        if done == total:
            print(file=sys.stderr)

    return tick


@contextlib.contextmanager
def workplace(given: Path | None) -> Iterator[Path]:
    """A folder for what is made: the one given, which stays, or a temporary one."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given
        return
    with tempfile.TemporaryDirectory() as work:
        yield Path(work)
