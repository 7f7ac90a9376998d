"""The progress of a search for layers, and how long it may take."""

from __future__ import annotations

from collections.abc import Callable

from dydit.words import counted, duration

Progress = Callable[[int, int], None]


def estimate_text(runs: int, steps: int, images: int, total: int, seconds: float) -> str:
    """The line before a search: at most `total` steps of a batch of `seconds` each, most of them in `runs` whole
    runs."""
    return (
        f"Search for layers: at most {counted(runs, 'run')} of {counted(steps, 'step')} with "
        f"{counted(images, 'image')} each, and measurements of single layers: {counted(total, 'step')} of a batch at "
        f"{seconds:.2g} s each, so at most about {duration(seconds * total)}; an interrupted search continues"
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
        """Set the number of steps that are left: the bisection may have needed fewer than it could."""
        self._total = self._done + steps

    def finish(self) -> None:
        """Report that nothing is left."""
        if self._progress and self._done < self._total:
            self._progress(self._total, self._total)
