from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dydit.diffusion.process import NoiseSchedule, Prediction, Process
from dydit.errors import ConfigError
from dydit.models.config import ModelConfig, parse_config
from dydit.training.recipe import Recipe, Stage
from dydit.training.recipe_files import find_recipes

FLOW = Process(schedule=NoiseSchedule.FLOW, prediction=Prediction.VELOCITY)


@pytest.mark.parametrize("name", ["digits", "digits-static", "digits-dynamic", "digits-settle"])
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
    ("words", "process"),
    [
        ([], Process()),
        (["model.process.prediction=v"], Process(prediction=Prediction.V)),
        (
            ["model.process.schedule=cosine", "model.process.prediction=x0"],
            Process(schedule=NoiseSchedule.COSINE, prediction=Prediction.X0),
        ),
        (["model.process.betas=[0.001, 0.03]"], Process(betas=(0.001, 0.03))),
        (["model.process.schedule=flow"], FLOW),
        (["model.process.prediction=velocity"], FLOW),
        (["model.process.schedule=flow", "model.process.prediction=velocity"], FLOW),
        (["model.process.prediction=velocity", "model.process.schedule=flow"], FLOW),
        (['model.process={"schedule": "flow"}'], FLOW),
        (["model.process=null", "model.process.schedule=vp-sde"], Process(schedule=NoiseSchedule.VP_SDE)),
    ],
)
def test_a_process_is_set_for_all_runs(words: list[str], process: Process) -> None:
    for recipe in find_recipes("digits", words):
        assert recipe.process == process and recipe.model.process == (process if words else None)
        assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_a_recipe_without_a_process_is_written_as_before_there_were_any() -> None:
    (recipe,) = find_recipes("digits-static")
    assert "process" not in recipe.model_dump_json()


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
        ("model.process.noise=1", "unknown setting 'noise'; known: schedule, prediction, betas"),
        ("model.process.schedule=fast", "model.process.schedule must be"),
        ("model.process=flow", "model.process must be an object"),
        ("model.process.betas=[0.1]", "model.process.betas"),
        ("model.routers=first-on", "does not fit"),
        ("learning_rate=nan", "learning_rate"),
        ("learning_rate=Infinity", "learning_rate"),
    ],
)
def test_a_wrong_override_is_explained(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_recipes("digits-static", [word])


def test_settings_that_fit_each_other_may_come_in_any_order() -> None:
    for words in (["model.hidden_size=36", "model.num_heads=9"], ["model.num_heads=9", "model.hidden_size=36"]):
        model = find_recipes("digits-static", words)[0].model
        assert (model.hidden_size, model.units.parts[0].group.count) == (36, 9)


def test_a_schedule_and_a_prediction_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="schedule flow cannot be combined with prediction epsilon"):
        find_recipes("digits-static", ["model.process.schedule=flow", "model.process.prediction=epsilon"])
    with pytest.raises(ConfigError, match="schedule cosine cannot be combined with prediction velocity"):
        find_recipes("digits-static", ["model.process.schedule=cosine", "model.process.prediction=velocity"])


def test_an_unknown_recipe_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"known: digits, dit-b2, .* with -static, -dynamic or"):
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


def test_a_model_of_texts_is_trained_with_captions_dropped(pixart_config: ModelConfig) -> None:
    """Dropped captions are the empty one, so that no row for "no class" is needed."""
    (recipe,) = find_recipes("digits-dynamic")
    values = {**recipe.model_dump(mode="json"), "model": pixart_config.model_dump(mode="json")}
    assert parse_config(Recipe, values).label_dropout == 0.1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["accumulate=3"], "batch_size 32 is not a multiple of 12"),
        (["accumulate=0"], "accumulate"),
        (["betas=[0.9, 1]"], "betas 0.9 and 1 are not both"),
        (["betas=[0.9]"], "betas"),
        (["adam_eps=0"], "adam_eps"),
        (['trackers=["aim"]'], "trackers"),
        (["sample_every=0"], "sample_every"),
    ],
)
def test_settings_of_the_loop_have_ranges(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_recipes("digits-static", words)


def test_settings_of_the_loop_are_set_by_words() -> None:
    words = ["betas=[0.9, 0.95]", "accumulate=4", 'trackers=["tensorboard"]', "sample_every=100", "compile=true"]
    (recipe,) = find_recipes("digits-static", words)
    assert (recipe.betas, recipe.accumulate, recipe.sample_every) == ((0.9, 0.95), 4, 100)
    assert recipe.compile and recipe.trackers == ("tensorboard",)
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
