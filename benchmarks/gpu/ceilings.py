"""The two ceilings of a device: a large matrix product, and a large copy within its memory; by PyTorch.

Warm-up first, then the median of single times. The product is square, 2*n^3 operations; of several sizes the best
counts. A copy reads and writes: twice its size in bytes. Products in fp32 are in fp32, not in TF32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from clock import clock_of, each_ms

from dydit.errors import one_line

WARMUP, ROUNDS = 5, 20
SIZES = {"cuda": (8192, 16384), "cpu": (192, 256)}
COPIED = {"cuda": (1 << 28, 1 << 30), "cpu": (1 << 25, 1 << 26)}  # bytes
TYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
Emit = Callable[[str, Any], None]


def measure(device: str, emit: Emit) -> None:
    """Emit TFLOP/s of each type and GB/s of a copy; a type that fails says why, and the others go on."""
    for name, dtype in TYPES.items():
        emit(f"product {name}", _tried(lambda dtype=dtype: _product(device, dtype)))
    emit("copy", _tried(lambda: _copy(device)))


def _tried(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return work()
    except (RuntimeError, AssertionError) as error:  # what PyTorch throws for want of memory, kernels, a device
        return {"error": one_line(error)[:300]}


def _median(device: str, work: Callable[[], Any]) -> float:
    each_ms(device, [work] * WARMUP)
    return float(np.median(each_ms(device, [work] * ROUNDS)))


def _product(device: str, dtype: str) -> dict[str, Any]:
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    tried = {}
    for n in SIZES[device]:
        a, b = (torch.randn(n, n, device=device).to(getattr(torch, dtype)) for _ in range(2))
        out = torch.empty_like(a)
        ms = _median(device, lambda a=a, b=b, out=out: torch.mm(a, b, out=out))
        tried[n] = {"n": n, "ms": ms, "tflops": 2 * n**3 / ms / 1e9}
    return {**_best(tried, "tflops"), "tried": list(tried.values()), **_how(device)}


def _copy(device: str) -> dict[str, Any]:
    import torch

    tried = {}
    for size in COPIED[device]:
        source = torch.zeros(size, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        ms = _median(device, lambda source=source, target=target: target.copy_(source))
        tried[size] = {"bytes": size, "ms": ms, "gb_per_s": 2 * size / ms / 1e6}
    return {**_best(tried, "gb_per_s"), "tried": list(tried.values()), **_how(device)}


def _best(tried: dict[int, dict[str, Any]], figure: str) -> dict[str, Any]:
    return max(tried.values(), key=lambda each: each[figure])


def _how(device: str) -> dict[str, Any]:
    return {"clock": clock_of(device), "warmup": WARMUP, "rounds": ROUNDS, "statistic": "median"}
