"""Recipe files: what they may state, how they extend each other, and the recipes that come with dydit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dydit.diffusion.process import NoiseSchedule, Prediction
from dydit.errors import ConfigError
from dydit.models.config import Routers
from dydit.models.dit.config import preset
from dydit.training.recipe import Recipe, Stage
from dydit.training.recipe_files import FOLDER, descriptions, find_recipes, read_draft, recipe_text, shipped_recipes

NO_TEXTS = "a model that texts condition cannot be trained"
DIGITS = {
    "data": "digits",
    "batch_size": 32,
    "learning_rate": 1e-3,
    "learning_rate_schedule": "cosine",
    "learning_rate_warmup": 100,
    "clip_norm": 1.0,
    "ema_decay": 0.998,
}
DIGITS_MODEL = {
    "architecture": "dit",
    "hidden_size": 128,
    "depth": 6,
    "num_heads": 8,
    "patch_size": 2,
    "input_size": 16,
    "in_channels": 1,
    "num_classes": 10,
}
DIGITS_ROUTERS = {
    "learning_rate": 5e-4,
    "router_learning_rate": 10.0,
    "width_bias": 5.0,
    "token_bias": 3.0,
    "token_weight": 10.0,
    "token_target": 0.6,
    "token_spread": 0.1,
}
DYNAMIC = {**DIGITS, **DIGITS_ROUTERS, "model": {**DIGITS_MODEL, "routers": "first-on"}}
SETTLED = {"iterations": 1200, "ramp_iterations": 0, "ramp_hold": 0, "ema_decay": 0.99}
EXPECTED: dict[str, dict[str, Any]] = {
    "static": {**DIGITS, "model": {**DIGITS_MODEL, "routers": "none"}, "iterations": 8000},
    "dynamic": {**DYNAMIC, "iterations": 4000, "noise_anneal": 0.2},
    "settle": {**DYNAMIC, **SETTLED},
}


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return str(folder / name)


SMALL = """
data = "digits"
iterations = 5
[model]
hidden_size = 32
depth = 2
num_heads = 4
patch_size = 4
[dynamic]
"""


# The recipes of dydit


@pytest.mark.parametrize("stage", EXPECTED)
def test_the_digits_are_trained_as_ever(stage: str) -> None:
    expected = Recipe.model_validate({"name": f"digits-{stage}", "stage": stage, **EXPECTED[stage]})
    assert find_recipes(f"digits-{stage}") == (expected,)
    assert expected in find_recipes("digits")


def test_the_recipes_of_the_paper_are_there() -> None:
    small = {f"dit-{size}2-{share}" for size in "sb" for share in ("0.9", "0.8", "0.7", "0.5", "0.4", "0.3")}
    large = {f"dit-xl2-{share}" for share in ("0.7", "0.6", "0.5", "0.3")}
    data = {f"dit-s2-{name}" for name in ("food-101", "artbench-10", "stanford-cars", "cub-200")}
    more = {
        "digits",
        "finetune",
        "scratch",
        "dit-xl2-imagenet-10-percent",
        "dit-xl2-512",
        "uvit-cifar10",
        "pixart-coco",
        "sit-xl2",
    }
    assert small | large | data | more | {"dit-s2", "dit-b2", "dit-xl2"} <= set(shipped_recipes())
    for name in small | large:
        assert read_draft(name).values[0]["lambda_target"] == float(name.rpartition("-")[2])


@pytest.mark.parametrize("name", sorted(path.name.removesuffix(".toml") for path in FOLDER.iterdir()))
def test_every_recipe_is_valid(name: str) -> None:
    assert 20 < len(descriptions()[name]) < 110 and recipe_text(name)
    for run in read_draft(name).values:
        assert run["name"] == f"{name}-{run['stage']}" and run["iterations"] > 0
    try:
        needed = {"finetune": ["model.preset=S/2"], "scratch": ["data=emoji"]}.get(name, [])
        recipes = find_recipes(name, needed, data_needed=False)
    except ConfigError as error:
        assert NO_TEXTS in str(error) and name.startswith("pixart")
        return
    for recipe in recipes:
        assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
        assert recipe.model.dynamic == (recipe.stage is not Stage.STATIC)


def test_what_the_recipes_train() -> None:
    (xl,) = find_recipes("dit-xl2-0.7", data_needed=False)
    assert xl.model == preset("XL/2") and (xl.lambda_target, xl.iterations, xl.warmup_iterations) == (
        0.7,
        150000,
        30000,
    )
    assert (xl.learning_rate, xl.ramp_iterations, xl.grad_norm_limit) == (2.5e-5, 5000, 50)
    (large,) = find_recipes("dit-xl2-512", data_needed=False)
    assert large.model == preset("XL/2", 64)
    (food,) = find_recipes("dit-s2-food-101", data_needed=False)
    assert food.model == preset("S/2", num_classes=101) and food.iterations == 50000
    (uvit,) = find_recipes("uvit-cifar10", data_needed=False)
    assert round(uvit.model.macs / 1e9, 2) == 11.34 and uvit.model.classes.unconditional and uvit.lambda_target == 0.4
    assert (uvit.betas, uvit.weight_decay, uvit.process.schedule) == ((0.99, 0.999), 0.03, NoiseSchedule.VP_SDE)
    (sit,) = find_recipes("sit-xl2", data_needed=False)
    assert sit.process.prediction is Prediction.VELOCITY and sit.model.sizes == preset("XL/2").sizes
    (pixart,) = read_draft("pixart-coco").values
    assert pixart["model"]["architecture"] == "pixart" and pixart["lambda_target"] == 0.7


def test_a_recipe_of_foreign_data_asks_for_it() -> None:
    with pytest.raises(ConfigError, match="recipe dit-s2 trains on data of yours; give it with --data PATH"):
        find_recipes("dit-s2")
    with pytest.raises(ConfigError, match="does not state the sizes of its model; give the checkpoint"):
        find_recipes("finetune", ["data=digits"])
    with pytest.raises(ConfigError, match="recipe scratch takes the size of images from the data; give them with"):
        find_recipes("scratch", data_needed=False)
    with pytest.raises(ConfigError, match="recipe scratch trains on data of yours; give it with --data PATH"):
        find_recipes("scratch")


def test_a_new_model_needs_nothing_but_data() -> None:
    recipes = find_recipes("scratch", ["data=emoji"])
    assert [each.stage for each in recipes] == list(Stage)
    sizes = preset("S/2", 32, in_channels=3, num_classes=9, routers=Routers.NONE)
    assert recipes[0].model.sizes == sizes.sizes
    (described,) = find_recipes("scratch-static", ["model.input_size=32"], data_needed=False)
    assert described.model.sizes == preset("S/2", routers=Routers.NONE).sizes


# Files


def test_a_file_of_the_user(tmp_path: Path) -> None:
    (recipe,) = find_recipes(write(tmp_path, "mine.toml", SMALL), ["seed=3"])
    assert (recipe.name, recipe.stage, recipe.seed, recipe.iterations) == ("mine-dynamic", Stage.DYNAMIC, 3, 5)
    # What neither the file nor a checkpoint states is decided by the data.
    assert (recipe.model.input_size, recipe.model.in_channels, recipe.model.classes.count) == (16, 1, 10)


def test_a_file_is_named_by_a_path_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "mine.toml", SMALL)
    monkeypatch.chdir(tmp_path)
    assert find_recipes("mine.toml") == find_recipes("./mine.toml")
    with pytest.raises(ConfigError, match="unknown recipe 'mine'"):
        find_recipes("mine")
    with pytest.raises(ConfigError, match=r"recipe none\.toml cannot be read: No such file"):
        find_recipes("none.toml")


def test_what_is_read_later_replaces_what_was_read_before(tmp_path: Path) -> None:
    write(tmp_path, "base.toml", 'extends = "digits"\nlearning_rate = 2e-4\n[settle]\nseed = 1\n[model]\ndepth = 4\n')
    child = write(tmp_path, "child.toml", 'extends = "./base.toml"\nseed = 2\n[static]\niterations = 7\n')
    static, dynamic, settle = find_recipes(child)
    assert [each.learning_rate for each in (static, dynamic, settle)] == [2e-4] * 3, "also over digits' [dynamic]"
    assert [each.seed for each in (static, dynamic, settle)] == [2] * 3, "also over [settle] of base.toml"
    assert (static.iterations, dynamic.iterations) == (7, 4000)
    assert {each.model.depth for each in (static, dynamic, settle)} == {4}
    assert static.name == "child-static"


def test_runs_come_in_the_order_of_training(tmp_path: Path) -> None:
    file = write(tmp_path, "mine.toml", f"{SMALL}[settle]\nramp_hold = 0\n[static]\n")
    assert [recipe.stage for recipe in find_recipes(file)] == list(Stage)
    assert [recipe.model.routers for recipe in find_recipes(file)] == [Routers.NONE, *[Routers.FIRST_ON] * 2]


def test_a_preset_is_of_its_architecture(tmp_path: Path) -> None:
    text = 'data = "digits"\niterations = 1\nlabel_dropout = 0\n[static]\n[model]\narchitecture = "{}"\npreset = "{}"\n'
    with pytest.raises(ConfigError, match=r"mine\.toml: unknown preset 'XL/3'; expected one of: S/2"):
        find_recipes(write(tmp_path, "mine.toml", text.format("dit", "XL/3")))
    with pytest.raises(ConfigError, match=r"unknown preset 'S/2'; expected one of: cifar10-S/2"):
        find_recipes(write(tmp_path, "mine.toml", text.format("uvit", "S/2")))
    with pytest.raises(ConfigError, match="unknown architecture 'vit'"):
        find_recipes(write(tmp_path, "mine.toml", text.format("vit", "S/2")))
    (larger,) = find_recipes("dit-s2", ["model.preset=B/2", "model.depth=3"], data_needed=False)
    assert (larger.model.hidden_size, larger.model.depth) == (768, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "iteration = 5\n[static]\n",
            r"bad\.toml: unknown setting 'iteration'; known: description, extends.*iterations",
        ),
        (
            "[dynamic]\niteration = 5\n",
            r"bad\.toml: \[dynamic\]: unknown setting 'iteration'; known: model.*iterations",
        ),
        ("[model]\ndeep = 5\n", r"bad\.toml: unknown field model\.deep; known: preset.*depth"),
        ("[static.model]\ndeep = 5\n", r"bad\.toml: \[static\]: unknown field model\.deep"),
        ('[model]\narchitecture = "dit"\nconv = true\n', r"unknown field model\.conv; known: preset"),
        ("static = 5\n", r"bad\.toml: static must be a table of settings, \[static\]"),
        ("model = 5\n[static]\n", r"bad\.toml: model must be a table of fields, \[model\]"),
        ("description = 5\n[static]\n", r"bad\.toml: description must be text"),
        ("name = 'x'\n[static]\n", r"unknown setting 'name'"),
        ("seed = 1\n", r"bad\.toml: the recipe has no run; add a table \[static\], \[dynamic\] or \[settle\]"),
        ("seed = \n", r"bad\.toml: is not a TOML file \(.*line 1"),
        ("extends = 'nothing'\n", r"bad\.toml: extends 'nothing', which does not exist; known: digits,.* or the path"),
        ("extends = './nothing.toml'\n", r"bad\.toml: extends './nothing.toml', which does not exist$"),
        (SMALL.replace("iterations = 5", "iterations = 0"), r"bad\.toml: iterations must be greater than 0, not 0"),
        (SMALL.replace("depth = 2", "depth = 'x'"), r"bad\.toml: model\.depth must be a whole number"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        find_recipes(write(tmp_path, "bad.toml", text))
    assert "\n" not in str(caught.value)


def test_a_cycle_is_refused(tmp_path: Path) -> None:
    first = write(tmp_path, "a.toml", "extends = './b.toml'\n[static]\n")
    write(tmp_path, "b.toml", "extends = './a.toml'\n")
    with pytest.raises(
        ConfigError, match=r"extend each other: \S+a\.toml extends \S+b\.toml extends \S+a\.toml; remove"
    ):
        find_recipes(first)
    with pytest.raises(ConfigError, match="extend each other"):
        find_recipes(write(tmp_path, "self.toml", "extends = './self.toml'\n"))


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"bad\.toml: is not a TOML file"):
        find_recipes(str(tmp_path / "bad.toml"))


@given(st.sampled_from(["static", "dynamic", "settle"]), st.integers(1, 10**6))
def test_an_override_of_a_run_leaves_the_others(stage: str, iterations: int) -> None:
    plain, changed = find_recipes("digits"), find_recipes("digits", [f"{stage}.iterations={iterations}"])
    for before, after in zip(plain, changed, strict=True):
        same = before.stage != stage
        assert after == (before if same else before.model_copy(update={"iterations": iterations}))


def test_paths_are_text_whatever_they_look_like(tmp_path: Path) -> None:
    (recipe,) = find_recipes("digits-dynamic", ["init=5"])
    assert recipe.init == "5"


# The command


def test_recipes_are_listed_and_shown(run: Any, tmp_path: Path) -> None:
    listed = run("train", "--list-recipes")
    assert listed.code == 0 and len(listed.out.splitlines()) == len(shipped_recipes())
    assert max(map(len, listed.out.splitlines())) < 140
    shown = run("train", "--show-recipe", "digits")
    assert shown.code == 0 and shown.out == (FOLDER / "digits.toml").read_text()
    copied = find_recipes(write(tmp_path, "digits.toml", shown.out))
    assert copied == find_recipes("digits")
    unknown = run("train", "--show-recipe", "digit")
    assert unknown.code == 2 and "unknown recipe 'digit'" in unknown.err
