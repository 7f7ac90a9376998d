"""Dry runs: what they say about every recipe, and that they write nothing. (XL models are counted, not made.)"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from dydit.checkpoints.checkpoint import save_checkpoint
from dydit.errors import ConfigError
from dydit.models.config import ModelConfig, Routers
from dydit.models.dit.config import preset
from dydit.models.registry import architecture
from dydit.models.synthetic import synthetic_model
from dydit.training.dry_run import StepTime, describe, measured_step, memory, parameters
from dydit.training.recipe import Recipe
from dydit.training.recipe_files import find_recipes, shipped_recipes

NO_TEXTS = "a model that texts condition cannot be trained"


def known_step(recipe: Recipe) -> StepTime:
    """A step of a tenth of the model in a thousandth of a second."""
    return StepTime(1e-3, 2, recipe.model.macs // 10, "a machine")


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_recipe_has_a_dry_run(name: str) -> None:
    try:
        needed = {"finetune": ["model.preset=S/2"], "scratch": ["model.input_size=32"]}.get(name, [])
        recipes = find_recipes(name, needed, data_needed=False)
    except ConfigError as error:
        assert NO_TEXTS in str(error) and name.startswith("pixart")
        return
    lines = describe(recipes, known_step)
    text = "\n".join(lines)
    assert ("not given (--data PATH)" in text) == (name not in ("digits", "uvit-emoji"))
    assert all(run.name in text and f"{run.iterations:,} iterations" in text for run in recipes)
    assert all(
        word in text for word in ("parameters", "G multiply-adds", "EMA", "moments", "estimated from steps of 2")
    )
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize(
    ("model", "count"),
    [(preset("S/2"), 33_120_740), (preset("B/2"), 131_158_964), (preset("XL/2"), 678_424_644)],
)
def test_parameters_are_those_of_published_models(model: ModelConfig, count: int) -> None:
    assert parameters(model) == count


def test_parameters_are_those_of_the_model(small_config: ModelConfig, pixart_config: ModelConfig) -> None:
    for config in (small_config, pixart_config):
        model = architecture(config.architecture).masked(config)
        assert parameters(config) == sum(value.numel() for value in model.state_dict().values())


def test_memory_grows_with_batch_depth_and_weights() -> None:
    (recipe,) = find_recipes("dit-s2", data_needed=False)
    needed = memory(recipe)
    assert needed.weights == 4 * 33_120_740 and needed.total == 5 * needed.weights + needed.activations
    # Per token and block: at least the inputs of its layers, which have 1 + 1 + 1 + 4 times the channels.
    assert needed.activations > 256 * 12 * 256 * 7 * 384 * 4
    fewer = memory(recipe.model_copy(update={"batch_size": 128}))
    assert fewer.activations == pytest.approx(needed.activations / 2, rel=1e-6)
    (deep,) = find_recipes("dit-s2", ["model.depth=24"], data_needed=False)
    assert 1.9 < memory(deep).activations / needed.activations < 2
    (half,) = find_recipes("dit-s2", ["precision=bf16"], data_needed=False)
    assert memory(half).activations < needed.activations


def test_the_time_is_that_of_all_images() -> None:
    recipes = find_recipes("digits", ["batch_size=8", "iterations=100", "dynamic.warmup_iterations=50"])
    static, dynamic, settle = (known_step(run).of(run) for run in recipes)
    assert math.isclose(static, 800 * 1e-3 * 10, rel_tol=1e-3)
    assert math.isclose(settle, static) and math.isclose(dynamic, 1.5 * static)


@pytest.mark.parametrize("kind", ["dit", "uvit"])
def test_a_step_is_measured(kind: str, small_recipe: Any, static_config: ModelConfig) -> None:
    sizes = {"hidden_size": 32, "num_heads": 4, "patch_size": 4, "input_size": 16, "in_channels": 1, "num_classes": 10}
    more = {"learn_sigma": False, "null_class_row": True} if kind == "uvit" else {}
    model = architecture(kind).config.model_validate({**sizes, **more, "depth": 5, "routers": Routers.FIRST_ON})
    step = measured_step(small_recipe(stage="dynamic", model=model, token_weight=1.0))
    assert step.seconds > 0 and step.blocks == (3 if kind == "uvit" else 2) and "CPU" in step.device
    assert step.macs < model.macs


def test_the_command_says_and_writes_nothing_else(run: Any, tmp_path: Path, static_config: ModelConfig) -> None:
    init = tmp_path / "start.safetensors"
    config = static_config.with_classes(12)
    save_checkpoint(init, synthetic_model(config), config)
    before = sorted(tmp_path.iterdir())
    call = ["train", "--recipe", "finetune", "--init", init, "--dry-run"]
    done = run(*call)
    assert done.code == 0, done.err
    assert "data    not given (--data PATH); the recipe takes 1x16x16, 12 classes" in done.out.splitlines()
    done = run(*call, "--data", "digits", "--out", tmp_path / "out", "settle.iterations=100")
    assert "data    digits: 1,797 images of 1x16x16, 10 classes" in done.out.splitlines()
    assert f"start   the class table of {init} (12 classes) is rebuilt for 10 classes" in done.out
    assert "finetune-settle: 100 iterations of 64 images, 3.56 epochs" in done.out
    assert sorted(tmp_path.iterdir()) == before
    assert run("train", "--recipe", "finetune", "--init", init).code == 2, "--out is missing"
