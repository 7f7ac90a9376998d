from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dydit.errors import ConfigError
from dydit.training.recipe import RECIPES, Recipe, Stage, find_recipes


@pytest.mark.parametrize("name", RECIPES)
def test_every_named_recipe_is_valid_and_survives_json(name: str) -> None:
    for recipe in find_recipes(name):
        assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_digits_is_its_stages_in_order() -> None:
    assert [recipe.stage for recipe in find_recipes("digits")] == [Stage.STATIC, Stage.DYNAMIC, Stage.SETTLE]
    alone = [find_recipes(f"digits-{stage}") for stage in Stage]
    assert find_recipes("digits") == tuple(recipe for (recipe,) in alone)


def test_overrides_reach_one_run_or_all_of_them() -> None:
    static, dynamic, settle = find_recipes(
        "digits", ["seed=7", "static.iterations=5", "dynamic.model.depth=2", "learning_rate_schedule=constant"]
    )
    assert static.seed == dynamic.seed == settle.seed == 7
    assert static.iterations == 5 != dynamic.iterations
    assert dynamic.model.depth == 2 != static.model.depth
    assert static.learning_rate_schedule == dynamic.learning_rate_schedule == "constant"
    # Overriding leaves the presets as they were.
    assert find_recipes("digits")[0].iterations != 5


def test_a_text_setting_may_look_like_anything() -> None:
    (recipe,) = find_recipes("digits-dynamic", ["init=/tmp/a=b.safetensors"])
    assert recipe.init == "/tmp/a=b.safetensors"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("iteration=5", "known: name, stage.*iterations"),
        ("model.deep=5", "known: architecture, hidden_size, depth"),
        ("seed.x=5", "no settings of its own"),
        ("iterations", "key=value"),
        ("iterations=0", "iterations"),
        ("iterations=many", "iterations"),
        ("batch_size=6", "multiple of 4"),
        ("dynamic.seed=1", "has no dynamic run"),
        ("model.routers=first-on", "does not fit"),
        ("learning_rate=nan", "learning_rate"),
        ("learning_rate=Infinity", "learning_rate"),
    ],
)
def test_a_wrong_override_is_explained(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_recipes("digits-static", [word])


def test_an_unknown_recipe_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="digits-static, digits-dynamic, digits"):
        find_recipes("imagenet")


def test_a_recipe_cannot_be_changed() -> None:
    (recipe,) = find_recipes("digits-static")
    with pytest.raises(ValidationError):
        recipe.seed = 1  # type: ignore[misc]


def test_target_is_held_then_falls_linearly_then_stays() -> None:
    (recipe,) = find_recipes("digits-dynamic", ["lambda_target=0.5", "ramp_hold=100", "ramp_iterations=1000"])
    assert [recipe.target(i) for i in (0, 99)] == [1.0, 1.0]
    assert recipe.target(500) == 0.75
    assert [recipe.target(i) for i in (1000, 2999)] == [0.5, 0.5]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2999), st.floats(0.1, 1), st.integers(0, 2000), st.floats(0, 1))
def test_target_and_noise_never_rise(iteration: int, target: float, ramp: int, anneal: float) -> None:
    (recipe,) = find_recipes(
        "digits-dynamic",
        [f"lambda_target={target}", f"ramp_iterations={ramp}", f"noise_anneal={anneal}", "iterations=3001"],
    )
    assert 1 >= recipe.target(iteration) >= recipe.target(iteration + 1) >= target
    assert 1 >= recipe.gate_noise(iteration) >= recipe.gate_noise(iteration + 1) >= 0


def test_gate_noise_is_gone_at_the_last_iteration() -> None:
    (recipe,) = find_recipes("digits-dynamic", ["noise_anneal=0.2", "iterations=1000"])
    assert recipe.gate_noise(0) == recipe.gate_noise(790) == 1
    assert recipe.gate_noise(999) == 0
    assert recipe.gate_noise(899) == pytest.approx(0.5)
