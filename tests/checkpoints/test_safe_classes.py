"""Harmless classes in training arguments: what is allowed by name is read as plain data, and can do nothing."""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import enum
import fractions
import pathlib
import pickle
import types
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dydit.checkpoints.checkpoint import load_checkpoint
from dydit.checkpoints.containers import container_of
from dydit.checkpoints.safe_classes import ALLOWED, Inert
from dydit.checkpoints.safe_load import read_torch
from dydit.errors import CheckpointError
from dydit.models.dit.config import DiTConfig
from dydit.models.synthetic import synthetic_model

CONFIG = DiTConfig(hidden_size=32, depth=1, num_heads=4, patch_size=2, input_size=4, num_classes=10)


class Kind(enum.Enum):
    """A class of the script that saved a file, which nobody else can read."""

    A = 1


HARMLESS = {
    "posix": pathlib.PurePosixPath("/data/imagenet"),
    "path": Path("runs/1"),
    "windows": pathlib.PureWindowsPath("C:\\data"),
    "float64": np.float64(1.5),
    "float32": np.float32(0.1),
    "int64": np.int64(7),
    "bool": np.bool_(True),
    "dtype": np.dtype("float32"),
    "class": np.float16,
    "array": np.arange(6.0),
    "strings": np.array(["a", "b"]),
    "tensor dtype": torch.bfloat16,
    "device": torch.device("cuda:0"),
    "size": torch.Size([1, 2]),
    "time": datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
    "delta": datetime.timedelta(seconds=3),
    "decimal": decimal.Decimal("1.5"),
    "fraction": fractions.Fraction(1, 3),
    "uuid": uuid.UUID(int=5),
    "default": collections.defaultdict(list, {"a": 1}),
    "counter": collections.Counter("aab"),
    "namespace": types.SimpleNamespace(a=1),
    "set": {1, 2},
    "complex": 1j,
    "type": int,
    "nested": {"a": [Path("x"), (np.int64(3), {"b": np.float32(2)})]},
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", HARMLESS)
def test_training_arguments_with_harmless_classes(tmp_path: Path, name: str, legacy: bool) -> None:
    state = synthetic_model(CONFIG).state_dict()
    content = {"ema": state, "args": argparse.Namespace(thing=HARMLESS[name], num_classes=10)}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    checkpoint = load_checkpoint(tmp_path / "a.pt")
    assert checkpoint.config == CONFIG and checkpoint.notes == ()


def read_back(tmp_path: Path, value: object) -> Any:
    torch.save({"x": value}, tmp_path / "a.pt")
    return read_torch(tmp_path / "a.pt", container_of(tmp_path / "a.pt"))["x"]


@pytest.mark.parametrize("kind", ["f2", "f4", "f8", ">f4", "i1", "i2", "i4", ">i8", "u1", "u8"])
def test_numpy_scalars_keep_their_value(tmp_path: Path, kind: str) -> None:
    assert read_back(tmp_path, np.array([77], kind)[0]) == 77
    assert read_back(tmp_path, np.bool_(False)) is False


def test_conventions_are_read_through_the_classes(tmp_path: Path) -> None:
    state = synthetic_model(CONFIG).state_dict()
    torch.save({"ema": state, "args": argparse.Namespace(num_classes=np.int64(11))}, tmp_path / "a.pt")
    assert not load_checkpoint(tmp_path / "a.pt").config.null_class_row
    torch.save({"ema": state, "args": types.SimpleNamespace(prediction="score")}, tmp_path / "b.pt")
    with pytest.raises(CheckpointError, match="prediction score"):
        load_checkpoint(tmp_path / "b.pt")


def test_other_classes_are_refused_and_their_author_is_told_what_to_do(tmp_path: Path) -> None:
    torch.save({"ema": {}, "args": argparse.Namespace(kind=Kind.A)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / "a.pt")
    message = str(caught.value)
    assert "Kind" in message and "torch.save(model.state_dict(), PATH)" in message and "safetensors" in message


def called(name: str, *arguments: object) -> bytes:
    """A pickle that calls the allowed `name` with `arguments`."""
    module, _, function = name.rpartition(".")
    return b"c" + module.encode() + b"\n" + function.encode() + b"\n" + pickle.dumps(arguments, 2)[2:-1] + b"R"


@pytest.mark.parametrize("name", [name for _, name in ALLOWED])
def test_no_allowed_name_leads_to_the_real_class_or_touches_anything(tmp_path: Path, name: str) -> None:
    """Whatever it is called with: it opens nothing, allocates nothing, and gives plain data."""
    (stand_in,) = [each for each, known in ALLOWED if known == name]
    assert stand_in is argparse.Namespace or stand_in.__module__ == "dydit.checkpoints.safe_classes"
    victim = tmp_path / "victim"
    vast = (1 << 40,)
    for arguments in ((), (str(victim), "w"), (vast, "f8"), (1 << 40,), ("O", b"cos\nsystem\n"), ([], {}, None)):
        try:
            made = stand_in(*arguments)
        except TypeError:
            assert stand_in is argparse.Namespace  # which takes no arguments by position
            continue
        assert isinstance(made, Inert | str | int | float | bool | dict | argparse.Namespace)
    assert not victim.exists()


def test_an_allowed_class_cannot_be_made_to_hold_another(tmp_path: Path) -> None:
    """`BUILD` sets the state of an object; of a stand-in it is data, attributes that look like code included."""

    class Evil:
        def __reduce__(self) -> Any:
            return np.ndarray, ((1 << 40,),), {"__class__": "os", "__reduce__": "x"}

    torch.save({"x": Evil()}, tmp_path / "a.pt")
    made = read_torch(tmp_path / "a.pt", container_of(tmp_path / "a.pt"))["x"]
    assert type(made) is Inert and made.arguments == ((1 << 40,),)
