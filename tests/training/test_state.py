from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dydit.errors import CheckpointError, ConfigError, OutputError
from dydit.models.config import ModelConfig
from dydit.models.dit.model import DiT
from dydit.training.loop import make_optimizer
from dydit.training.recipe import Recipe
from dydit.training.state import (
    Counters,
    append_log,
    claim_folder,
    load_state,
    read_log,
    save_state,
    states,
    truncate_log,
)

Make = Callable[..., Recipe]
Randomised = Callable[..., DiT]


def test_a_folder_is_claimed_once(tmp_path: Path, small_recipe: Make) -> None:
    recipe = small_recipe()
    claim_folder(tmp_path / "a" / "run", recipe, resume=False)
    with pytest.raises(OutputError, match=r"not empty.*--resume"):
        claim_folder(tmp_path / "a" / "run", recipe, resume=False)
    claim_folder(tmp_path / "a" / "run", recipe, resume=True)


def test_what_a_killed_write_left_does_not_count(tmp_path: Path, small_recipe: Make) -> None:
    (tmp_path / ".recipe.json.abc.part").write_text("{")
    claim_folder(tmp_path, small_recipe(), resume=True)
    assert (tmp_path / "recipe.json").is_file()


def test_another_recipe_is_refused_naming_what_differs(
    tmp_path: Path, small_recipe: Make, dynamic_config: ModelConfig
) -> None:
    claim_folder(tmp_path, small_recipe(), resume=False)
    other = small_recipe(seed=5, stage="dynamic", model=dynamic_config)
    with pytest.raises(ConfigError) as caught:
        claim_folder(tmp_path, other, resume=True)
    text = str(caught.value)
    assert "seed (0 there, 5 asked for)" in text and "model.routers (none there, first-on asked for)" in text
    assert "iterations" not in text


def test_a_start_is_known_by_its_content(tmp_path: Path, small_recipe: Make) -> None:
    for name, content in (("a", "x"), ("b", "x"), ("c", "y")):
        (tmp_path / name).write_text(content)
    claim_folder(tmp_path / "run", small_recipe(init=str(tmp_path / "a")), resume=False)
    claim_folder(tmp_path / "run", small_recipe(init=str(tmp_path / "b")), resume=True)
    with pytest.raises(ConfigError, match="init"):
        claim_folder(tmp_path / "run", small_recipe(init=str(tmp_path / "c")), resume=True)


def test_a_folder_of_something_else_is_not_resumed(tmp_path: Path, small_recipe: Make) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(OutputError, match="holds no run"):
        claim_folder(tmp_path, small_recipe(), resume=True)
    (tmp_path / "recipe.json").write_text("{")
    with pytest.raises(OutputError, match="damaged"):
        claim_folder(tmp_path, small_recipe(), resume=True)


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
    save_state(tmp_path, counters, model, ema, optimizer)
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
        save_state(tmp_path, Counters(iteration=iteration), *parts)
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
    save_state(tmp_path, Counters(iteration=8), model, ema, optimizer)
    path = states(tmp_path)[-1]
    tensors = path / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="state-00000008 cannot be read"):
        load_state(path, model, ema, optimizer)


def test_the_log_is_cut_where_the_state_stands(tmp_path: Path) -> None:
    for iteration in (3, 6, 9):
        append_log(tmp_path, {"iteration": iteration, "loss": 0.1 * iteration})
    whole = (tmp_path / "log.jsonl").read_text()
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"iteration": 12, "lo')  # killed while writing
    assert [entry["iteration"] for entry in read_log(tmp_path)] == [3, 6, 9]
    truncate_log(tmp_path, 8)
    assert (tmp_path / "log.jsonl").read_text() == "".join(whole.splitlines(keepends=True)[:2])
    append_log(tmp_path, json.loads(whole.splitlines()[2]))
    assert (tmp_path / "log.jsonl").read_text() == whole
