from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dydit.errors import CheckpointError, OutputError
from dydit.models.config import ModelConfig
from dydit.models.dit.model import DiT
from dydit.training.optimizer import make_optimizer
from dydit.training.recipe import Recipe
from dydit.training.state import (
    Counters,
    append_log,
    load_state,
    read_log,
    save_state,
    state_tensors,
    states,
    truncate_log,
)

Make = Callable[..., Recipe]
Randomised = Callable[..., DiT]


def trained(config: ModelConfig, recipe: Recipe, randomised: Randomised) -> tuple[DiT, DiT, torch.optim.AdamW]:
    model, ema = randomised(config, seed=1), randomised(config, seed=2)
    optimizer = make_optimizer(model, recipe)
    for _ in range(2):
        model(torch.randn(2, 1, 16, 16), torch.tensor([1, 2]), torch.tensor([1, 2])).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, ema, optimizer


def test_a_state_comes_back_whole(
    tmp_path: Path, static_config: ModelConfig, small_recipe: Make, randomised: Randomised
) -> None:
    model, ema, optimizer = trained(static_config, small_recipe(), randomised)
    counters = Counters(iteration=8, skipped=1, skipped_in_a_row=1, seconds=1.5, sums={"loss": 0.1 + 0.2}, summed=2)
    save_state(tmp_path, counters, state_tensors(model, ema, optimizer))
    other, other_ema = DiT(static_config), DiT(static_config)
    other_optimizer = make_optimizer(other, small_recipe())
    assert load_state(states(tmp_path)[-1], other, other_ema, other_optimizer) == counters
    for one, two in ((model, other), (ema, other_ema)):
        assert all(value.equal(two.state_dict()[name]) for name, value in one.state_dict().items())
    moments = optimizer.state_dict()["state"]
    assert len(moments) > 10
    for index, entry in other_optimizer.state_dict()["state"].items():
        assert set(entry) == {"step", "exp_avg", "exp_avg_sq"} and float(entry["step"]) == 2
        assert all(value.equal(moments[index][key]) for key, value in entry.items())


def test_only_the_newest_state_is_kept(
    tmp_path: Path, static_config: ModelConfig, small_recipe: Make, randomised: Randomised
) -> None:
    parts = trained(static_config, small_recipe(), randomised)
    for iteration in (4, 100_000_000, 8):  # sorted by number, not by name
        save_state(tmp_path, Counters(iteration=iteration), state_tensors(*parts))
        assert [int(path.name[6:]) for path in states(tmp_path)] == [iteration]


def test_a_half_removed_state_is_not_a_state(tmp_path: Path) -> None:
    (tmp_path / "state-00000004").mkdir()
    (tmp_path / "state-00000008").mkdir()
    (tmp_path / "state-00000008" / "state.json").write_text("{}")
    (tmp_path / "state-old").mkdir()
    assert [path.name for path in states(tmp_path)] == ["state-00000008"]


def test_a_damaged_state_is_explained(
    tmp_path: Path, static_config: ModelConfig, small_recipe: Make, randomised: Randomised
) -> None:
    model, ema, optimizer = trained(static_config, small_recipe(), randomised)
    save_state(tmp_path, Counters(iteration=8), state_tensors(model, ema, optimizer))
    path = states(tmp_path)[-1]
    tensors, counters = path / "tensors.safetensors", path / "state.json"
    whole, said = tensors.read_bytes(), counters.read_text()

    def refused(words: str) -> None:
        with pytest.raises(CheckpointError, match=words) as caught:
            load_state(path, model, ema, optimizer)
        assert "state-00000008" in str(caught.value) and "\n" not in str(caught.value)

    for damaged in (whole[:-10], b"", whole[: len(whole) // 2], whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]):
        tensors.write_bytes(damaged)
        refused("cannot be read .*; restore it from a copy, or remove it")
    tensors.unlink()
    refused("cannot be read")
    tensors.write_bytes(whole)
    for text in ("", "{", "[]", "{}x", said.replace('"iteration"', '"iterations"')):
        counters.write_text(text)
        refused("cannot be read")
    counters.write_text(said.replace('"format": 1', '"format": 2'))
    refused("was written by another version of dydit")
    counters.write_text(said)
    load_state(path, model, ema, optimizer)


def test_a_state_of_before_formats_is_read(
    tmp_path: Path, static_config: ModelConfig, small_recipe: Make, randomised: Randomised
) -> None:
    model, ema, optimizer = trained(static_config, small_recipe(), randomised)
    save_state(tmp_path, Counters(iteration=8), state_tensors(model, ema, optimizer))
    file = states(tmp_path)[-1] / "state.json"
    values = json.loads(file.read_text())
    file.write_text(
        json.dumps({k: values[k] for k in values if k not in ("format", "sha256", "planned", "made_longer_at")})
    )
    assert load_state(states(tmp_path)[-1], model, ema, optimizer) == Counters(iteration=8)


def test_the_log_is_cut_where_the_state_stands(tmp_path: Path) -> None:
    for iteration in (3, 6, 9):
        append_log(tmp_path, {"iteration": iteration, "loss": 0.1 * iteration})
    whole = (tmp_path / "log.jsonl").read_text()
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"iteration": 12, "lo')  # killed while writing
    assert [entry["iteration"] for entry in read_log(tmp_path)] == [3, 6, 9]
    truncate_log(tmp_path, 8, 1)
    assert (tmp_path / "log.jsonl").read_text() == "".join(whole.splitlines(keepends=True)[:2])
    append_log(tmp_path, json.loads(whole.splitlines()[2]))
    assert (tmp_path / "log.jsonl").read_text() == whole


def test_a_line_of_a_runs_end_goes_where_the_run_gets_longer(tmp_path: Path) -> None:
    for iteration in (3, 6, 7):
        append_log(tmp_path, {"iteration": iteration})
    truncate_log(tmp_path, 7, log_every=3)
    assert [entry["iteration"] for entry in read_log(tmp_path)] == [3, 6]


@pytest.mark.parametrize("line", ["nonsense", '{"iter', "[1]", "{}", '{"iteration": "3"}', "\udc80"])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    append_log(tmp_path, {"iteration": 3})
    with open(tmp_path / "log.jsonl", "ab") as file:
        file.write(line.encode("utf-8", "surrogateescape") + b"\n")
    with pytest.raises(OutputError, match=r"line 2 of .*log\.jsonl is damaged .*; remove that line and run again"):
        read_log(tmp_path)
