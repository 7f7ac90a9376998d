"""Where a side's time goes: the kernels of one round, by PyTorch's profiler, which sees those of every library.

It notes what CUDA's own tracing reports for the process, so ONNX Runtime's and TensorRT's kernels are among them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from settings import Settings, Work
from sides import open_side

from dydit.errors import UnavailableError

TOP = 15
Emit = Callable[[str, Any], None]


def profile(settings: Settings, work: Work, emit: Emit, way: str, side: str, batch: int) -> None:
    """Emit the `TOP` kernels by time (on the CPU: PyTorch's operations), their share of all, and their calls."""
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as traced

    emit("of", {"way": way, "side": side, "batch": batch})
    opened = open_side(settings, work, way, side, batch)
    for _ in range(2):
        opened.round()
    kinds = [ProfilerActivity.CPU, *([] if settings.dry_run else [ProfilerActivity.CUDA])]
    with traced(activities=kinds) as watched:
        opened.round()
    rows = []
    for each in watched.key_averages():
        on_device = each.device_type == torch.autograd.DeviceType.CUDA
        if on_device == settings.dry_run:
            continue
        microseconds = each.self_cpu_time_total if settings.dry_run else _device_time(each)
        if microseconds > 0:
            rows.append({"kernel": each.key[:200], "calls": each.count, "ms": microseconds / 1e3})
    if not rows:
        raise UnavailableError("PyTorch's profiler saw no kernel of it")
    total = sum(row["ms"] for row in rows)
    rows.sort(key=lambda row: -row["ms"])
    for row in rows:
        row["share"] = row["ms"] / total
    emit("kernels", rows[:TOP])
    emit(
        "total", {"ms": total, "steps": opened.steps, "kernels": len(rows), "calls": sum(row["calls"] for row in rows)}
    )
    emit("what", "operations of PyTorch on the CPU" if settings.dry_run else "CUDA kernels and copies")
    opened.close()


def _device_time(event: Any) -> float:
    """Microseconds on the device; older releases have another name for it."""
    value = getattr(event, "self_device_time_total", None)
    return float(event.self_cuda_time_total if value is None else value)
