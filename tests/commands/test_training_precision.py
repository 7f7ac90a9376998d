"""Training in bf16 says where it is slow; nothing is said elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dydit.commands import train
from dydit.runtime.backends import instruction_sets
from dydit.training.recipe_files import find_recipes

NOTE = "this CPU has no instructions for bf16: steps can take many times as long as with precision=fp32"
SMALL = ("model.depth=1", "model.hidden_size=32", "batch_size=4", "iterations=1")


@pytest.mark.parametrize(
    ("precision", "sets", "said"),
    [("bf16", ("avx2",), True), ("bf16", ("avx512_bf16",), False), ("fp32", ("avx2",), False)],
)
def test_bf16_without_instructions_is_said(
    precision: str, sets: tuple[str, ...], said: bool, run: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(instruction_sets, "instruction_sets", lambda: sets)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = ("train", "--recipe", "digits-static", f"precision={precision}", *SMALL)
    done, dry = run(*words, "--out", tmp_path / "run"), run(*words, "--dry-run")
    assert (done.code, dry.code) == (0, 0)
    assert (NOTE in done.err, NOTE in dry.out.splitlines()) == (said, said)


def test_a_gpu_multiplies_bf16(monkeypatch: Any) -> None:
    monkeypatch.setattr(instruction_sets, "instruction_sets", lambda: ("avx2",))
    for gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        assert train._speed_note(find_recipes("digits-static", ["precision=bf16"])) == ("" if gpu else NOTE)
