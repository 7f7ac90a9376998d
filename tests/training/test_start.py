"""What a run starts from: new class tables, one of several weights, and routers that are not trained."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dydit.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from dydit.errors import CheckpointError, ConfigError
from dydit.models.config import ModelConfig, Routers
from dydit.models.dynamic import DynamicModel
from dydit.models.registry import architecture_of
from dydit.models.synthetic import recorded_pass, synthetic_model
from dydit.models.transformer.states import rebuilt_class_table
from dydit.models.uvit.config import UViTConfig
from dydit.training.gates import achieved_ratio
from dydit.training.losses import ProcessTensors
from dydit.training.objective import Inputs, Objective
from dydit.training.recipe import Recipe, Stage
from dydit.training.sequence import train_sequence
from dydit.training.start import kept_classes, start_note, starting_model
from dydit.training.trainer import make_optimizer, train
from tests.fixtures.training import gumbel

Make = Callable[..., Recipe]
Save = Callable[..., str]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    def make(config: ModelConfig, name: str = "start.safetensors") -> str:
        save_checkpoint(tmp_path / name, synthetic_model(config, flops_ratio=0.6), config)
        return str(tmp_path / name)

    return make


@pytest.fixture
def from_static(small_recipe: Make, static_config: ModelConfig, dynamic_config: ModelConfig, save: Save) -> Make:
    init = save(static_config, "static.safetensors")

    def make(**changes: object) -> Recipe:
        return small_recipe(**{"stage": "dynamic", "model": dynamic_config, "init": init, **changes})

    return make


def named(config: ModelConfig, names: str) -> ModelConfig:
    return config.with_classes(len(names)).model_copy(update={"class_names": tuple(names)})


# Classes


def table_of(model: DynamicModel) -> torch.Tensor:
    return next(value for name, value in model.state_dict().items() if "embedding_table" in name or "label_emb" in name)


@given(st.lists(st.none() | st.integers(0, 4), min_size=1, max_size=9), st.booleans(), st.integers(0, 9))
def test_kept_rows_are_kept_and_others_are_new(kept: list[int | None], null: bool, seed: int) -> None:
    table = torch.arange(24.0).view(6, 4) + 100
    new = rebuilt_class_table(table, kept, 5 if null else None, 0.02, torch.Generator().manual_seed(seed))
    assert new.shape == (len(kept) + null, 4)
    for row, old in zip(new, kept, strict=False):
        assert row.equal(table[old]) if old is not None else row.abs().max() < 1
    assert not null or new[-1].equal(table[5])


def test_equal_names_are_equal_classes(static_config: ModelConfig) -> None:
    few, many = named(static_config, "abc"), named(static_config, "xcba")
    assert kept_classes(few, many) == [None, 2, 1, 0]
    assert kept_classes(many, few) == [3, 2, 1]
    assert kept_classes(few, few) is None
    assert kept_classes(few, named(static_config, "cab")) == [2, 0, 1], "as many, in another order"
    assert kept_classes(few, few.with_classes(3)) is None, "as many, and no names that could differ"
    assert kept_classes(few.with_classes(3), few) is None
    assert kept_classes(few, static_config) == [None] * 10
    assert kept_classes(named(static_config, "aab"), named(static_config, "ba")) == [2, 0], "the first of equal names"


UVIT = UViTConfig(
    hidden_size=32,
    depth=3,
    num_heads=4,
    patch_size=4,
    input_size=16,
    in_channels=1,
    num_classes=3,
    null_class_row=True,
    routers=Routers.NONE,
)


@pytest.mark.parametrize("kind", ["dit", "uvit"])
def test_a_class_table_is_rebuilt(kind: str, small_recipe: Make, static_config: ModelConfig, save: Save) -> None:
    config = named(UVIT if kind == "uvit" else static_config, "abc")
    wanted = named(config, "xcb").model_copy(update={"routers": Routers.FIRST_ON})
    recipe = small_recipe(stage="dynamic", model=wanted, init=save(config))
    old, new = table_of(load_checkpoint(str(recipe.init)).model()), table_of(starting_model(recipe))
    assert new[1].equal(old[2]) and new[2].equal(old[1]) and new[3].equal(old[3]), "names, and no class"
    assert not any(new[0].equal(row) for row in old)
    assert new.equal(table_of(starting_model(recipe))), "drawn from the seed"
    assert not new.equal(table_of(starting_model(recipe.model_copy(update={"seed": 1}))))
    assert "(3 classes) is rebuilt for 3 classes: 2 rows of classes with equal names are kept; the row" in start_note(
        recipe
    )
    larger = recipe.model_copy(update={"model": wanted.with_classes(5)})
    assert len(table_of(starting_model(larger))) == 6
    assert "is rebuilt for 5 classes: all of its rows for classes are new; the row for no class is kept" in start_note(
        larger
    )
    spread = 1.0 if kind == "uvit" else 0.02
    drawn = table_of(starting_model(recipe.model_copy(update={"model": wanted.with_classes(400)})))[:-1]
    assert float(drawn.std()) == pytest.approx(spread, rel=0.05), "as the architecture initializes it"


def test_other_sizes_are_refused_as_before(small_recipe: Make, static_config: ModelConfig, save: Save) -> None:
    deeper = static_config.with_classes(3).model_copy(update={"depth": 3})
    with pytest.raises(ConfigError, match="other sizes than that of the recipe: depth 2, not 3"):
        starting_model(small_recipe(model=deeper, init=save(static_config)))
    assert start_note(small_recipe(model=static_config, init=save(static_config))) == ""


def test_a_model_of_texts_has_no_classes(pixart_config: ModelConfig) -> None:
    with pytest.raises(ConfigError, match="no classes that could be changed"):
        pixart_config.with_classes(3)


def test_fine_tuning_on_other_classes_is_one_command(
    run: Any, tmp_path: Path, static_config: ModelConfig, save: Save
) -> None:
    init = save(static_config.with_classes(1000))
    short = ["iterations=4", "batch_size=4", "log_every=2"]
    done = run("train", "--recipe", "finetune", "--init", init, "--data", "digits", *short, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    assert "(1,000 classes) is rebuilt for 10 classes" in done.err
    for stage in ("dynamic", "settle"):
        config = load_checkpoint(tmp_path / "run" / stage / "model.safetensors").config
        assert config.dynamic and config.classes.count == 10


# Which weights


def test_a_run_starts_from_the_average_or_from_the_weights(
    tmp_path: Path, small_recipe: Make, static_config: ModelConfig, dynamic_config: ModelConfig
) -> None:
    states = {each: dict(synthetic_model(static_config, len(each)).state_dict()) for each in ("ema", "model")}
    path = tmp_path / "both.pt"
    torch.save({**states, "args": argparse.Namespace(num_heads=4)}, path)
    for weights, read in (("ema", "ema"), ("model", "model"), (None, "ema")):
        start = starting_model(small_recipe(init=str(path), init_weights=weights)).state_dict()
        assert all(value.equal(start[name]) for name, value in states[read].items())
    runs = [
        small_recipe(init=str(path), init_weights="model", iterations=2),
        small_recipe(stage="dynamic", model=dynamic_config, iterations=2),
    ]
    results = train_sequence(runs, tmp_path / "runs")
    assert [result.summary["recipe"]["init_weights"] for result in results] == ["model", None], (
        "of the first run's start"
    )
    save_checkpoint(tmp_path / "own.safetensors", states["ema"], static_config)
    with pytest.raises(CheckpointError, match="holds no weights ema"):
        starting_model(small_recipe(init=str(tmp_path / "own.safetensors"), init_weights="ema"))


# Routers that are not trained


def routers_of(model: DynamicModel) -> dict[str, torch.Tensor]:
    known = architecture_of(model.config)
    return {name: value for name, value in model.named_parameters() if known.is_router(name)}


def decisions(model: DynamicModel, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Gates of units and tokens at inference, and the FLOPs ratio, for images at all times."""
    generator, config = torch.Generator().manual_seed(seed), model.config
    x = torch.randn(64, config.in_channels, config.input_size, config.input_size, generator=generator)
    _, recording = recorded_pass(model.eval(), x, torch.arange(64) * 15, torch.arange(64) % 10)
    gates = recording.decisions()
    return gates.units, gates.tokens, float(achieved_ratio(config, gates).mean())


@pytest.mark.parametrize("routed", ["width", "tokens"])
def test_unwanted_routers_are_open_and_fixed(from_static: Make, routed: str) -> None:
    recipe = from_static(routed=routed, width_bias=0.0, token_bias=0.0)
    model = starting_model(recipe)
    units, tokens, _ = decisions(model)
    assert bool(tokens.all()) == (routed == "width") and bool(units.all()) == (routed == "tokens")
    noisy = gumbel(model.config, 64)
    x = torch.randn(64, 1, 16, 16)
    model(x, torch.arange(64) * 15, torch.arange(64) % 10, noisy)
    gates = noisy.decisions()
    fixed, free = (gates.tokens, gates.units) if routed == "width" else (gates.units, gates.tokens)
    assert fixed.eq(1).all() and not free.eq(1).all() and free.requires_grad and not fixed.requires_grad
    trained = {id(each) for group in make_optimizer(model, recipe).param_groups for each in group["params"]}
    assert {value.requires_grad for value in routers_of(model).values()} == {True, False}
    assert all((id(value) in trained) == value.requires_grad for value in routers_of(model).values())


@pytest.mark.parametrize("target", [0.4, 0.6])
def test_random_routers_keep_about_the_target(from_static: Make, target: float) -> None:
    model = starting_model(from_static(random_routers=True, lambda_target=target))
    units, tokens, ratio = decisions(model)
    assert abs(ratio - target) < 0.15
    assert 0.1 < float(tokens.mean()) < 0.95 and float(units.std(0).max()) > 0.3, "they differ over tokens and times"
    assert not any(value.requires_grad for value in routers_of(model).values())
    with pytest.raises(ValueError, match="random_routers draws all routers; set routed to both, not width"):
        from_static(random_routers=True, routed="width")


def test_fixed_routers_are_no_way_to_the_target(from_static: Make) -> None:
    """The FLOPs loss would otherwise change what they read."""
    recipe = from_static(random_routers=True, lambda_target=0.3)
    model = starting_model(recipe)
    objective = Objective(model, recipe, ProcessTensors.of(recipe.process))
    x = torch.randn(8, 1, 16, 16)
    batch = Inputs(x, torch.arange(8) * 100, torch.arange(8), torch.randn_like(x), gate_seed=0, first=0)
    parts = objective(batch, 0)
    assert parts["flops"] > 0 and not parts["flops"].requires_grad and parts["loss"].requires_grad


@pytest.mark.parametrize("changes", [{"routed": "width"}, {"routed": "tokens"}, {"random_routers": True}])
def test_fixed_routers_survive_training_and_export(
    run: Any, tmp_path: Path, from_static: Make, changes: dict[str, Any]
) -> None:
    recipe = from_static(**changes, width_bias=0.5, token_bias=0.5, iterations=6, save_every=3, learning_rate=1e-2)
    start = starting_model(recipe)
    result = train(recipe, tmp_path / "run")
    resumed = train(recipe.model_copy(update={"iterations": 9}), tmp_path / "run", resume=True)
    assert resumed.summary["iterations"] == 9
    end = load_checkpoint(result.model).state
    changed = {name: not value.equal(end[name]) for name, value in start.named_parameters()}
    routers = routers_of(start)
    assert any(value for name, value in changed.items() if name not in routers)
    assert all(changed[name] == value.requires_grad for name, value in routers.items())
    assert run("export", result.model, "--steps", 3, "--max-subnets", 2, "--out", tmp_path / "bundle").code == 0
    held = run("parity", tmp_path / "bundle", "--against", result.model, "--out", tmp_path / "parity")
    assert held.code == 0, held


def test_random_routers_are_drawn_once(tmp_path: Path, from_static: Make, small_recipe: Make) -> None:
    recipe = from_static(random_routers=True, iterations=2)
    settled = recipe.model_copy(update={"stage": Stage.SETTLE, "name": "settled", "init": None, "seed": 5})
    first, second = train_sequence([recipe, settled], tmp_path / "runs")
    before, after = (routers_of(load_checkpoint(each.model).model()) for each in (first, second))
    assert all(value.equal(after[name]) for name, value in before.items())
    again = recipe.model_copy(update={"init": str(first.model)})
    with pytest.raises(ConfigError, match=r"random_routers adds routers to a static model, but init .* has its own"):
        starting_model(again)
