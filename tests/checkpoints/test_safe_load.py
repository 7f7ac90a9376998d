from __future__ import annotations

import argparse
import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from dydit.checkpoints.checkpoint import load_checkpoint
from dydit.checkpoints.containers import Container, container_of
from dydit.checkpoints.safe_load import listed, plain_tensors, read_safetensors, read_torch, shown
from dydit.errors import CheckpointError
from dydit.models.dit.config import DiTConfig
from dydit.models.dit.model import DiT

CONFIG = DiTConfig(hidden_size=32, depth=1, num_heads=4, patch_size=2, input_size=8, num_classes=10)


class Command:
    """A pickle of it runs a shell command wherever it is loaded."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self) -> object:
        return os.system, (self.command,)


class Unknown:
    """A class that this project does not know."""


def read(path: Path) -> object:
    return read_torch(path, container_of(path))


@pytest.mark.parametrize("unsafe_default", [False, True])
@pytest.mark.parametrize("place", ["opt", "args", "model", "ema"])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_runs_a_command_is_refused_and_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, legacy: bool, unsafe_default: bool
) -> None:
    if unsafe_default:  # a setting that people use to get old code to load
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    proof, path = tmp_path / "proof", tmp_path / "evil.pt"
    attack = Command(f"touch {proof}")
    content = {"ema": DiT(CONFIG).state_dict(), "opt": {}, "args": argparse.Namespace()}
    content[place] = argparse.Namespace(data=attack) if place == "args" else {"x": attack}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    assert not proof.exists()
    message = str(caught.value)
    assert message.startswith(f"{path}: holds more than tensors (posix.system); such a file can run code")
    assert "\n" not in message
    pickle.loads(pickle.dumps(attack))  # the attack is real
    assert proof.exists()


@pytest.mark.parametrize("protocol", range(6))
def test_a_bare_pickle_is_refused_and_does_not_run(tmp_path: Path, protocol: int) -> None:
    proof, path = tmp_path / "proof", tmp_path / "evil.pt"
    path.write_bytes(pickle.dumps({"x": Command(f"touch {proof}")}, protocol))
    with pytest.raises(CheckpointError):
        load_checkpoint(path)
    assert not proof.exists()


def test_a_class_that_is_not_allowed_is_named(tmp_path: Path) -> None:
    torch.save({"ema": {}, "args": argparse.Namespace(sizes=Unknown())}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"holds more than tensors \(.*Unknown\).*torch\.save\(model\.state_dict"):
        read(tmp_path / "a.pt")


def test_only_the_namespace_is_allowed_and_only_while_reading(tmp_path: Path) -> None:
    torch.save({"args": argparse.Namespace(lr=1e-4, sizes=[1, 2])}, tmp_path / "a.pt")
    assert vars(read(tmp_path / "a.pt")["args"]) == {"lr": 1e-4, "sizes": [1, 2]}  # type: ignore[index]
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def contents() -> dict[str, bytes]:
    zipped, legacy = io.BytesIO(), io.BytesIO()
    torch.save({"ema": DiT(CONFIG).state_dict()}, zipped)
    torch.save({"ema": DiT(CONFIG).state_dict()}, legacy, _use_new_zipfile_serialization=False)
    tensors = save(DiT(CONFIG).state_dict(), {"format": "dydit", "version": "1", "config": CONFIG.model_dump_json()})
    return {"zip": zipped.getvalue(), "legacy": legacy.getvalue(), "safetensors": tensors}


CONTENTS = contents()


@pytest.mark.parametrize("kind", CONTENTS)
def test_whole_files_load(tmp_path: Path, kind: str) -> None:
    (tmp_path / "whole").write_bytes(CONTENTS[kind])
    assert load_checkpoint(tmp_path / "whole").config == CONFIG


@pytest.mark.parametrize("kind", CONTENTS)
@pytest.mark.parametrize("part", [0, 1, 3, 8, 9, 100, 0.1, 0.5, 0.9, 0.999, -1])
def test_truncated_files_are_refused(tmp_path: Path, kind: str, part: float) -> None:
    data, path = CONTENTS[kind], tmp_path / "part"
    path.write_bytes(data[: part if isinstance(part, int) else int(part * len(data))])
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 300 + len(str(path))
    if part == 0:
        assert message == f"{path}: is empty; copy or download it again"
    elif part == 0.5:
        assert "is damaged or incomplete" in message


@pytest.mark.parametrize("kind", CONTENTS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_damaged_files_load_or_are_refused(
    tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject
) -> None:
    content = bytearray(CONTENTS[kind])
    for _ in range(data.draw(st.integers(1, 8))):
        region = data.draw(st.sampled_from([200, 2000, len(content) - 1]))
        at = data.draw(st.integers(0, region))
        content[-1 - at if data.draw(st.booleans()) else at] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "file"
    path.write_bytes(content)
    try:
        load_checkpoint(path)
    except CheckpointError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error)


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        (b"<!DOCTYPE html><html>", "is a web page or XML"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer, not the file itself"),
        (struct.pack("<Q", 1 << 60) + b"{" + b" " * 100, "cannot be read as a safetensors file"),
        (struct.pack("<Q", 8) + b"{broken}", "cannot be read as a safetensors file"),
        (struct.pack("<Q", 100_000) + b"{" * 100_000, "cannot be read as a safetensors file"),
        (b"PK\x03\x04" + bytes(100), "cannot be read as a torch.save file"),
        (b"\x80\x02}q\x00.", "is a plain pickle, which can run code"),
        (b"\x80\xff}q", "is neither a torch.save file nor a safetensors file"),
        (b"\x80", "is neither a torch.save file nor a safetensors file"),
        (CONTENTS["legacy"][:15] + b"\x80\x02.", "cannot be read as a torch.save file from before PyTorch 1.6"),
    ],
)
def test_files_of_other_kinds(tmp_path: Path, start: bytes, expected: str) -> None:
    (tmp_path / "x.pt").write_bytes(start)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / "x.pt")
    assert expected in str(caught.value)


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_a_torch_file_with_the_name_of_another_format(tmp_path: Path, kind: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(CONTENTS[kind])
    with pytest.raises(CheckpointError, match=r"not safetensors; rename it to \.pt"):
        load_checkpoint(tmp_path / "x.safetensors")


def test_a_flipped_byte_is_seen_by_the_checksums_of_the_archive(tmp_path: Path) -> None:
    state, path = DiT(CONFIG).state_dict(), tmp_path / "a.pt"
    torch.save(state, path)
    data, weights = bytearray(path.read_bytes()), state["blocks.0.mlp.fc1.weight"].numpy().tobytes()
    data[data.index(weights) + 1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="is damaged or incomplete"):
        load_checkpoint(path)


@pytest.mark.parametrize("change", [lambda data: data[:-4], lambda data: data + bytes(4), lambda data: b""])
def test_a_record_of_another_size_than_its_storage_is_damage(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    """Mapped, PyTorch would take the bytes that follow, without a word."""
    torch.save(DiT(CONFIG).state_dict(), tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as whole, zipfile.ZipFile(tmp_path / "b.pt", "w") as other:
        for item in whole.infolist():
            data = whole.read(item)
            other.writestr(item.filename, change(data) if item.filename.endswith("/data/3") else data)
    with pytest.raises(CheckpointError, match="is damaged or incomplete"):
        load_checkpoint(tmp_path / "b.pt")


def test_an_archive_without_checksums_is_read(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    try:
        torch.serialization.set_crc32_options(False)
        torch.save(DiT(CONFIG).state_dict(), tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    assert load_checkpoint(tmp_path / "a.pt").config == CONFIG


def test_a_pickle_of_a_newer_protocol_is_not_called_damaged(tmp_path: Path) -> None:
    torch.save({"ema": DiT(CONFIG).state_dict()}, tmp_path / "a.pt", pickle_protocol=5)
    with pytest.raises(CheckpointError, match=r"holds more than tensors \(Unsupported operand.*torch\.save\(model"):
        load_checkpoint(tmp_path / "a.pt")


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    torch.save({"ema": {"x": torch.zeros(1 << 20)}}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for item in plain.infolist():
            bomb.writestr(item.filename, plain.read(item))
    with pytest.raises(CheckpointError, match="is a compressed zip archive"):
        read(tmp_path / "bomb.pt")


def test_tensors_that_claim_more_than_the_file_holds_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "vast.pt"
    torch.save({"x_embedder.proj.weight": torch.zeros(1).expand(1 << 20, 1 << 20)}, path)
    with pytest.raises(CheckpointError, match="describes 4398046511104 bytes of weights in a file of"):
        load_checkpoint(path)


def test_weights_are_mapped_from_the_file_and_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"x": torch.zeros(1 << 22)}, path)
    read(path)
    before = resident()
    tensors = [read(path)["x"] for _ in range(8)]  # type: ignore[index]
    assert resident() - before < (1 << 24)
    assert all(tensor.shape == (1 << 22,) for tensor in tensors)


def resident() -> int:
    """Bytes of this process that are in memory and belong to no file."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("needs /proc")
    return int(next(line for line in status.read_text().splitlines() if line.startswith("RssAnon")).split()[1]) << 10


def test_safetensors_metadata(tmp_path: Path) -> None:
    save_file({"a": torch.arange(4.0)}, tmp_path / "a")
    assert container_of(tmp_path / "a") is Container.SAFETENSORS
    tensors, metadata = read_safetensors(tmp_path / "a")
    assert tensors["a"].tolist() == [0, 1, 2, 3] and metadata == {}


def test_plain_tensors_keeps_dense_floats_only() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    plain = plain_tensors({"p": parameter, "h": torch.ones(2, dtype=torch.bfloat16)}, size=12)
    assert not plain["p"].requires_grad and plain["p"].data_ptr() == parameter.data_ptr()
    for value in (torch.ones(2, device="meta"), torch.ones(2).to_sparse(), torch.nn.Buffer(torch.ones(2, dtype=int))):
        with pytest.raises(CheckpointError, match="w"):
            plain_tensors({"w": value}, size=100)
    vast = torch.zeros(1).expand(1 << 15, 1 << 15)  # 4 GiB in fp32, of four bytes
    assert plain_tensors({"w": vast}, size=4)["w"].shape == vast.shape
    with pytest.raises(CheckpointError, match="describes 4294967336 bytes of weights in a file of 4 bytes"):
        plain_tensors({"w": vast, "h": torch.ones(10, dtype=torch.bfloat16)}, size=4)


def test_names_in_messages_are_short_and_printable() -> None:
    assert listed(["a", "b", "c"]) == "a, b, c" and listed("abcde") == "a, b, c and 2 more"
    assert shown("a\nb\x1b[31m") == "'a\\nb\\x1b[31m'" and len(shown("x" * 10_000)) == 80
