"""How many threads: by the CPUs that there are, the affinity, and the quota of a control group of either version."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dydit.runtime.backends import cores
from dydit.runtime.backends.cores import available_cores, cpu_quota, instruction_sets, thread_count


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


V1 = {"cpu.cfs_quota_us": "50000\n", "cpu.cfs_period_us": "100000\n"}


@pytest.mark.parametrize(
    ("membership", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2.0),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/a/b\n", {"a/cpu.max": "150000 100000\n", "a/b/cpu.max": "max 100000\n"}, 1.5),
        ("0::/a/b\n", {"a/cpu.max": "150000 100000\n", "a/b/cpu.max": "50000 100000\n"}, 0.5),
        ("0::/not/mounted/here\n", {"cpu.max": "300000 100000\n"}, 3.0),
        ("4:cpu,cpuacct:/docker/1\n0::/\n", {f"cpu,cpuacct/docker/1/{name}": v for name, v in V1.items()}, 0.5),
        ("4:cpu,cpuacct:/docker/1\n", {f"cpu,cpuacct/{name}": v for name, v in V1.items()}, 0.5),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ("4:memory:/x\n", {"memory/x/cpu.cfs_quota_us": "1"}, None),
        ("0::/../..\n", {"cpu.max": "100000 100000"}, 1.0),
        ("0::/\n", {"cpu.max": "strange\n"}, None),
        ("0::/\n", {"cpu.max": "0 0\n"}, None),
        ("strange\n", {}, None),
        ("", {}, None),
    ],
)
def test_quotas(membership, files, quota, tmp_path):
    root = write(tmp_path / "cgroup", files)
    (tmp_path / "membership").write_text(membership)
    assert cpu_quota(tmp_path / "membership", root) == quota


def test_threads_follow_affinity_and_quota(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    for text, wanted in (("max 100000", 6), ("250000 100000", 2), ("50000 100000", 1), ("900000 100000", 6)):
        root = write(tmp_path / "cgroup", {"cpu.max": text})
        monkeypatch.setattr(cores, "cpu_quota", lambda root=root: cpu_quota(tmp_path / "none", root))
        assert available_cores() == thread_count(0) == wanted
        assert thread_count(5) == 5, "what is asked for is done"


def test_a_system_without_any_of_it(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    monkeypatch.setattr(cores, "cpu_quota", lambda: None)
    assert available_cores() == 1
    assert cpu_quota(tmp_path / "a", tmp_path / "b") is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx2 amx_bf16 avx512f\n\nflags\t\t: avx\n", ("avx2", "avx512f", "amx_bf16")),
        ("Features\t: fp asimd i8mm\n", ("asimd", "i8mm")),
        ("strange\n", ()),
        (None, ()),
    ],
)
def test_instruction_sets(text: str | None, expected: tuple[str, ...], tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    assert instruction_sets(tmp_path / "cpuinfo") == expected
