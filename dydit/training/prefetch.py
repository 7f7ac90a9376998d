"""Draws the next batch in a thread while the current one is trained. What is drawn does not change."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from dydit.training.draws import Batch, BatchSource


class Prefetch:
    """The batches of a source, in `parts` parts each, up to iteration `end`, each drawn while the one before is used.

    A context manager, whose end waits for the batch that is being drawn, and drops it.
    """

    def __init__(self, source: BatchSource, parts: int, end: int):
        self.source, self.parts, self.end = source, parts, end
        self._executor = ThreadPoolExecutor(1, "dydit-batches")
        self._ahead: tuple[int, Future[Batch]] | None = None

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown(cancel_futures=True)

    def batch(self, iteration: int, part: int) -> Batch:
        """Part `part` of iteration `iteration`. What drawing it raised, if it did, is raised here."""
        index = iteration * self.parts + part
        future = self._ahead[1] if self._ahead is not None and self._ahead[0] == index else self._draw(index)
        batch = future.result()
        more = index + 1 < self.end * self.parts
        self._ahead = (index + 1, self._draw(index + 1)) if more else None
        return batch

    def _draw(self, index: int) -> Future[Batch]:
        return self._executor.submit(self.source.batch, *divmod(index, self.parts), self.parts)
