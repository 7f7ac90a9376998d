"""Times of work on a device: CUDA events where PyTorch has them, else the host's clock after waiting for the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

EVENTS, WALL = "CUDA events", "host clock"


def each_ms(device: str, work: Sequence[Callable[[], Any]]) -> list[float]:
    """Milliseconds of each piece of work, queued one after another; the device is idle before and after."""
    if device == "cpu":
        times = []
        for piece in work:
            start = time.perf_counter()
            piece()
            times.append(1e3 * (time.perf_counter() - start))
        return times
    import torch

    marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(work) + 1)]
    torch.cuda.synchronize()
    marks[0].record()
    for piece, mark in zip(work, marks[1:], strict=True):
        piece()
        mark.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairwise(marks)]


def clock_of(device: str) -> str:
    """What `each_ms` reads."""
    return WALL if device == "cpu" else EVENTS
