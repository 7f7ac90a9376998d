"""How far a search for layers is, and how long it may take."""

from __future__ import annotations

from collections.abc import Callable

from dydit.words import counted, duration

Progress = Callable[[int, int], None]


def estimate_text(runs: int, steps: int, images: int, total: int, seconds: float) -> str:
    """A line before a search: `total` steps of a batch at most, of `seconds` each, most in `runs` whole runs."""
    return (
        f"Search for layers: at most {counted(runs, 'run')} of {counted(steps, 'step')} with "
        f"{counted(images, 'image')} each, and the measuring of single layers: {counted(total, 'step')} of a batch, "
        f"{seconds:.2g} s each, so about {duration(seconds * total)} at most; a stopped search goes on where it was"
    )


class Ticks:
    """Counts steps of batches."""

    def __init__(self, progress: Progress | None, total: int):
        self._progress, self._done, self._total = progress, 0, total

    def __call__(self, steps: int) -> None:
        self._done += steps
        if self._progress:
            self._progress(min(self._done, self._total), self._total)

    def remain(self, steps: int) -> None:
        """So many are left: the bisection may have asked less than it could."""
        self._total = self._done + steps

    def finish(self) -> None:
        """Nothing is left."""
        if self._progress and self._done < self._total:
            self._progress(self._total, self._total)
