"""Decodes images in several processes, in the order in which they were asked for."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dydit.child_process import end_with
from dydit.data.images import Crop, UnreadableError, read_pixels
from dydit.data.sources.source import Record
from dydit.errors import BackendError

AT_ONCE = 8
"""Images that a process gets at once."""
AHEAD = 4
"""Times as many that wait for each process."""


@dataclass(frozen=True)
class Decoding:
    """What images become: uint8 [channels, size, size]."""

    size: int
    channels: int
    crop: Crop


class Decoder:
    """Decodes images in `workers` processes; one: in this process. As a context manager it ends them."""

    def __init__(self, decoding: Decoding, workers: int):
        self._decoding, self._workers, self._pool = decoding, workers, None
        if workers > 1:
            self._pool = ProcessPoolExecutor(
                workers, multiprocessing.get_context("spawn"), initializer=_start, initargs=(os.getpid(),)
            )

    def decoded(self, records: Iterable[Record]) -> Iterator[tuple[Record, np.ndarray | str]]:
        """The records in their order, each with its pixels or the reason why it has none."""
        groups = _groups(records)
        if self._pool is None:
            for group in groups:
                yield from zip(group, _decode([each.image for each in group], self._decoding), strict=True)
            return
        waiting: deque[tuple[tuple[Record, ...], Future[list[np.ndarray | str]]]] = deque()
        try:
            for group in groups:
                waiting.append((group, self._pool.submit(_decode, [each.image for each in group], self._decoding)))
                if len(waiting) >= AHEAD * self._workers:
                    yield from _received(waiting)
            while waiting:
                yield from _received(waiting)
        except BrokenProcessPool as error:
            raise BackendError(
                "a process that decodes images was ended, which can mean that memory ran out; use fewer --workers"
            ) from error

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _groups(records: Iterable[Record]) -> Iterator[tuple[Record, ...]]:
    """The records, in tuples of `AT_ONCE`."""
    remaining = iter(records)
    while group := tuple(itertools.islice(remaining, AT_ONCE)):
        yield group


def _received(
    waiting: deque[tuple[tuple[Record, ...], Future[list[np.ndarray | str]]]],
) -> Iterator[tuple[Record, np.ndarray | str]]:
    group, future = waiting.popleft()
    yield from zip(group, future.result(), strict=True)


def _start(parent: int) -> None:
    """Start a process: ^C reaches the parent alone, and the process ends with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        end_with(parent)


def _decode(images: list[Path | bytes | np.ndarray], decoding: Decoding) -> list[np.ndarray | str]:
    """The pixels of each image, or the reason why it has none."""
    outcomes: list[np.ndarray | str] = []
    for image in images:
        try:
            outcomes.append(read_pixels(image, decoding.size, decoding.channels, decoding.crop))
        except UnreadableError as error:
            outcomes.append(str(error))
    return outcomes
