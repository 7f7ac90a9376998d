"""A file that this machine cannot map or hold is not called damaged."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dydit.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from dydit.errors import CheckpointError
from dydit.models.dit.config import DiTConfig
from dydit.models.synthetic import synthetic_model

CONFIG = DiTConfig(hidden_size=384, depth=10, num_heads=8, patch_size=2, input_size=8, num_classes=10)  # 75 MB
KINDS = ("zip", "legacy", "safetensors", "own")
NO_MEMORY = 32 << 20


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, model = tmp_path_factory.mktemp("files"), synthetic_model(CONFIG)
    paths = {kind: folder / f"{kind}.pt" for kind in KINDS}
    torch.save(model.state_dict(), paths["zip"])
    torch.save(model.state_dict(), paths["legacy"], _use_new_zipfile_serialization=False)
    save_file(model.state_dict(), paths["safetensors"])
    save_checkpoint(paths["own"], model, CONFIG)
    return paths


SCRIPT = """
import os, resource, sys
import torch
from dydit.checkpoints.checkpoint import load_checkpoint

spare, *paths = sys.argv[1:]
torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
checkpoint = load_checkpoint(paths[-1])
size = next(line for line in open("/proc/self/status") if line.startswith("VmSize"))
for work in [*(lambda path=path: load_checkpoint(path) for path in paths), checkpoint.model]:
    sys.stdout.flush()
    if os.fork() == 0:
        limit = (int(size.split()[1]) << 10) + int(spare)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        try:
            work()
            print("done")
        except Exception as error:
            print(type(error).__name__, error)
        sys.stdout.flush()
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def said(files: dict[str, Path]) -> dict[str, str]:
    """What reading each file, and making the model of the last, ends in where 32 MB of address space are left.

    In a fresh process, which has no freed memory to take from, and a child of it for each.
    """
    if not sys.platform.startswith("linux"):
        pytest.skip("needs /proc and fork")
    command = [sys.executable, "-c", SCRIPT, str(NO_MEMORY), *map(str, files.values())]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(zip([*KINDS, "model"], done.stdout.splitlines(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_too_little_memory_is_not_damage(files: dict[str, Path], said: dict[str, str], kind: str) -> None:
    assert said[kind].startswith("CheckpointError") and "not enough memory" in said[kind], said
    assert "not damaged" in said[kind] and load_checkpoint(files[kind]).config == CONFIG


def test_a_model_that_does_not_fit_is_said_in_one_line(said: dict[str, str]) -> None:
    assert said["model"].startswith("CheckpointError") and "not enough memory for its weights" in said["model"], said


@pytest.mark.parametrize("kind", ["zip", "safetensors"])
def test_where_files_cannot_be_mapped_they_are_read(
    files: dict[str, Path], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("unable to mmap 1 bytes from file <x>: No such device (19)")

    monkeypatch.setattr(torch.UntypedStorage, "from_file", cannot)
    monkeypatch.setattr("safetensors.safe_open", cannot)
    expected = synthetic_model(CONFIG).state_dict()
    state = load_checkpoint(files[kind]).state
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_a_disk_that_fails_is_not_damage(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any, **options: Any) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(torch, "load", fails)
    with pytest.raises(CheckpointError, match="cannot be read: Input/output error"):
        load_checkpoint(files["zip"])


def test_a_huge_claim_in_an_old_file_is_damage(tmp_path: Path) -> None:
    """The old format says the size of a storage in advance, and memory for it is asked for before it is read."""
    torch.save({"x_embedder.proj.weight": torch.zeros(100)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    data = (tmp_path / "a.pt").read_bytes()
    claimed = data.replace(b"cpuq\x06KdN", b"cpuq\x06\x8a\x06" + (1 << 45).to_bytes(6, "little") + b"N")
    assert claimed != data
    (tmp_path / "a.pt").write_bytes(claimed)
    with pytest.raises(CheckpointError, match="is damaged or incomplete"):
        load_checkpoint(tmp_path / "a.pt")
