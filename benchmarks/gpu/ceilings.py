"""The clock of a device, and the most that the device does: operations of a large product, bytes of a copy.

On a GPU, times are those between two CUDA events on the stream that does the work. On the CPU they are wall-clock time,
and say nothing about a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

WARMUP, ROUNDS = 5, 20


class Clock:
    """Milliseconds of work on a device of PyTorch, `cpu` or `cuda`."""

    def __init__(self, device: str):
        self.device = device

    def ms(self, work: Callable[[], object], stream: int | None = None, wait: Callable[[], object] | None = None):
        """The time of what `work` queues on a CUDA stream, by default PyTorch's present one; nothing else may run.

        `stream`: its handle. `wait`: on the CPU, what ends when the work is done, where it is only queued there, too.
        """
        if self.device == "cpu":
            start = time.perf_counter()
            work()
            if wait is not None:
                wait()
            return 1e3 * (time.perf_counter() - start)
        where = torch.cuda.current_stream() if stream is None else torch.cuda.ExternalStream(stream)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record(where)
        work()
        end.record(where)
        end.synchronize()
        return start.elapsed_time(end)

    def median_ms(self, work: Callable[[], object]) -> float:
        """The median of `ROUNDS` times, after `WARMUP` that do not count."""
        return float(np.median([self.ms(work) for _ in range(WARMUP + ROUNDS)][WARMUP:]))


def product(clock: Clock, dtype: str, rows: int, inner: int, columns: int) -> dict[str, Any]:
    """TFLOP/s of a product of random matrices, [rows, inner] x [inner, columns]. fp32 is not rounded to TF32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    kind = getattr(torch, dtype)
    a = torch.randn(rows, inner, device=clock.device).to(kind)
    b = torch.randn(inner, columns, device=clock.device).to(kind)
    ms = clock.median_ms(lambda: torch.mm(a, b))
    return {"shape": [rows, inner, columns], "ms": ms, "tflops": 2 * rows * inner * columns / ms / 1e9}


def copied(clock: Clock, nbytes: int) -> dict[str, Any]:
    """Bytes a second of a copy within the device's memory, read and written ones counted."""
    source = torch.randint(0, 255, (nbytes,), dtype=torch.uint8, device=clock.device)
    to = torch.empty_like(source)
    ms = clock.median_ms(lambda: to.copy_(source))
    return {"bytes": nbytes, "ms": ms, "bytes_per_second": 2e3 * nbytes / ms}


def attention(clock: Clock, dtype: str, shape: tuple[int, int, int, int]) -> dict[str, Any]:
    """TFLOP/s of fused attention on random [rows, heads, tokens, channels]."""
    rows, heads, tokens, channels = shape
    q, k, v = (torch.randn(shape, device=clock.device).to(getattr(torch, dtype)) for _ in range(3))
    ms = clock.median_ms(lambda: F.scaled_dot_product_attention(q, k, v))
    return {"shape": list(shape), "ms": ms, "tflops": 4 * rows * heads * tokens**2 * channels / ms / 1e9}
