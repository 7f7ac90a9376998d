"""How many CPUs this process may use, by its affinity and by the quota of its container; and what they can compute."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

PROC_CPUINFO = Path("/proc/cpuinfo")
INSTRUCTIONS = (
    *("avx", "fma", "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16", "amx_fp16"),
    *("asimd", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme"),  # Arm
)
"""Instruction sets that decide how fast matrix products are, as Linux calls them."""
PROC_CGROUP = Path("/proc/self/cgroup")
CGROUPS = Path("/sys/fs/cgroup")


def thread_count(threads: int) -> int:
    """The number of threads that `threads` asks for: 0 stands for one for each available CPU."""
    return threads or available_cores()


def available_cores() -> int:
    """CPUs that this process may use: those of its affinity, limited by its CPU quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return cores if quota is None else max(1, min(cores, math.floor(quota)))


def instruction_sets(cpuinfo: Path = PROC_CPUINFO) -> tuple[str, ...]:
    """Those of `INSTRUCTIONS` that the first CPU has; empty if the system does not report them."""
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        return ()
    listed = next((line for line in lines if line.partition(":")[0].strip() in ("flags", "Features")), "")
    flags = set(listed.partition(":")[2].split())
    return tuple(name for name in INSTRUCTIONS if name in flags)


def cpu_quota(membership: Path = PROC_CGROUP, root: Path = CGROUPS) -> float | None:
    """CPUs that the process's control group, or one above it, grants; None if no limit is known.

    Version 2 has `cpu.max` ("200000 100000": 200 ms of each 100 ms, two CPUs; or "max"), version 1 the two numbers in
    `cpu.cfs_quota_us` (-1: no limit) and `cpu.cfs_period_us`. In a container the group's path is often that of the
    host, which does not exist there; the group's own files then lie at the root.
    """
    quotas = [quota for folder in _folders(membership, root) if (quota := _quota_of(folder)) is not None]
    return min(quotas, default=None)


def _folders(membership: Path, root: Path) -> Iterator[Path]:
    """The folders of the process's CPU control group and of those above it."""
    try:
        lines = membership.read_text().splitlines()
    except (OSError, ValueError):
        lines = []
    tops = [(root, "/")]
    for line in lines:
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if not controllers:
            tops.append((root, path))
        elif "cpu" in controllers.split(","):
            tops += [(root / name, path) for name in (controllers, "cpu")]
            tops += [(root / name, "/") for name in (controllers, "cpu")]
    for top, path in tops:
        parts = [part for part in path.split("/") if part not in ("", "..")]
        yield from (top.joinpath(*parts[:count]) for count in range(len(parts) + 1))


def _quota_of(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        time, of = int(quota), int(period)
    except (OSError, ValueError):  # "max" is no number, and most groups have no such file
        return None
    return time / of if time > 0 and of > 0 else None
