"""What the start and the data decide about a model that its recipe does not state."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dydit.checkpoints.checkpoint import save_checkpoint
from dydit.diffusion.process import NoiseSchedule, Process
from dydit.errors import CheckpointError, ConfigError
from dydit.models.config import ModelConfig, Routers, Space, TextSpec
from dydit.models.registry import architecture
from dydit.models.synthetic import synthetic_model
from dydit.training.completion import DataFacts, complete_model, data_facts, require_fit
from dydit.training.recipe import Recipe, Stage
from dydit.training.recipe_files import find_recipes

PHOTOS = DataFacts((3, 32, 32), 3, ("cat", "dog", "bird"), space=Space.PIXELS)
LATENTS = DataFacts((4, 8, 8), 7, space=Space.LATENTS)


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., str]:
    def make(config: ModelConfig, name: str = "start.safetensors") -> str:
        save_checkpoint(tmp_path / name, synthetic_model(config), config)
        return str(tmp_path / name)

    return make


def completed(stated: dict[str, Any], stage: str, start: ModelConfig | None, data: DataFacts | None) -> ModelConfig:
    kind: Any = ModelConfig
    model: ModelConfig = kind.model_validate(complete_model(stated, stage, start, data))
    return model


def test_a_checkpoint_and_data_are_all_that_fine_tuning_needs(static_config: ModelConfig, start: Any) -> None:
    recipes = find_recipes("finetune", [f"init={start(static_config)}", "data=digits"])
    assert [recipe.stage for recipe in recipes] == [Stage.DYNAMIC, Stage.SETTLE]
    for recipe in recipes:
        assert recipe.model == static_config.model_copy(update={"routers": Routers.FIRST_ON})


def test_the_classes_are_those_of_the_data(static_config: ModelConfig, small_config: ModelConfig, start: Any) -> None:
    (recipe, _) = find_recipes(
        "finetune", [f"init={start(static_config.model_copy(update={'num_classes': 1000}))}", "data=digits"]
    )
    assert recipe.model.classes.count == 10
    (stated, _) = find_recipes("finetune", [f"init={recipe.init}", "data=digits", "model.num_classes=12"])
    assert stated.model.classes.count == 12
    named = small_config.model_copy(update={"class_names": tuple("abcdefg")})
    assert completed({}, "dynamic", named, LATENTS).class_names == tuple("abcdefg"), "of as many classes"
    assert completed({}, "dynamic", named, None) == named
    pixels = named.model_copy(update={"in_channels": 3, "input_size": 32})
    model = completed({}, "dynamic", pixels, PHOTOS)
    assert (model.classes.count, model.class_names) == (3, ("cat", "dog", "bird"))
    without = DataFacts((3, 32, 32), 3)
    assert completed({}, "dynamic", pixels, without).class_names is None, "names of other classes"


def test_the_data_decide_what_nothing_else_states() -> None:
    sizes = {"hidden_size": 32, "depth": 2, "num_heads": 4, "patch_size": 4}
    model = completed(sizes, "static", None, PHOTOS)
    assert (model.in_channels, model.input_size, model.classes.count) == (3, 32, 3)
    assert model.space is Space.PIXELS, "three channels could be latents"
    assert completed({**sizes, "patch_size": 2}, "static", None, LATENTS).space is None, "four channels are latents"
    grey_latents = DataFacts((1, 32, 32), 3, space=Space.LATENTS)
    assert completed(sizes, "static", None, grey_latents).space is Space.LATENTS
    assert completed({**sizes, "input_size": 16}, "static", None, PHOTOS).input_size == 16
    uvit = {**sizes, "architecture": "uvit", "learn_sigma": False, "depth": 3}
    assert completed(uvit, "static", None, PHOTOS).classes.unconditional, "unless a U-ViT's classes are stated"
    assert completed({**uvit, "null_class_row": True}, "static", None, PHOTOS).classes.count == 3
    texts = DataFacts((4, 8, 8), 0, text=TextSpec(20, 384))
    pixart = {"architecture": "pixart", "hidden_size": 48, "depth": 2, "num_heads": 4}
    assert completed(pixart, "static", None, texts).text == TextSpec(20, 384)


def test_facts_of_data_reach_the_recipe() -> None:
    sizes = ["model.hidden_size=32", "model.depth=2", "model.num_heads=2", "model.patch_size=4", "data=emoji"]
    (recipe,) = find_recipes("dit-s2", [*sizes, "model.input_size=32"])
    assert (recipe.model.in_channels, recipe.model.classes.count, recipe.model.space) == (3, 9, Space.PIXELS)
    assert recipe.model.class_names is not None and "Flags" in recipe.model.class_names
    facts = data_facts("digits")
    assert (facts.shape, facts.classes, facts.class_names, facts.text) == ((1, 16, 16), 10, None, None)


@pytest.mark.parametrize("routers", [Routers.NONE, Routers.FIRST_ON, Routers.ALL_ROUTED])
def test_routers_are_those_of_the_stage_and_the_start(small_config: ModelConfig, routers: Routers) -> None:
    config = small_config.model_copy(update={"routers": routers})
    dynamic = Routers.FIRST_ON if routers is Routers.NONE else routers
    assert completed({}, "dynamic", config, None).routers is dynamic
    assert completed({}, "settle", config, None).routers is dynamic
    assert completed({}, "static", config, None).routers is Routers.NONE
    assert completed({"routers": "all-routed"}, "dynamic", config, None).routers is Routers.ALL_ROUTED


def test_an_unconditional_model_drops_no_labels(start: Any) -> None:
    config: Any = architecture("uvit").config
    model = config(
        hidden_size=32, depth=3, num_heads=4, patch_size=4, input_size=16, in_channels=1, routers=Routers.NONE
    )
    (recipe, _) = find_recipes("finetune", [f"init={start(model)}", "data=digits"])
    assert recipe.model.classes.unconditional and recipe.label_dropout == 0
    assert recipe.model.architecture == "uvit" and recipe.model.dynamic
    with pytest.raises(ConfigError, match="label_dropout needs a model with a null class"):
        find_recipes("finetune", [f"init={start(model)}", "data=digits", "label_dropout=0.1"])


def test_a_start_of_another_architecture_decides_nothing(small_config: ModelConfig) -> None:
    stated = {"architecture": "uvit", "hidden_size": 32, "depth": 3, "num_heads": 4, "patch_size": 2, "input_size": 8}
    model = completed({**stated, "learn_sigma": False}, "dynamic", small_config, None)
    assert (model.hidden_size, model.classes.unconditional) == (32, True)


def test_the_process_is_not_decided_here(static_config: ModelConfig, start: Any) -> None:
    """It is taken when the run starts, where a contradiction is explained."""
    init = start(static_config.model_copy(update={"process": Process(schedule=NoiseSchedule.COSINE)}))
    (recipe, _) = find_recipes("finetune", [f"init={init}", "data=digits"])
    assert recipe.model.process is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            DataFacts((3, 16, 16), 10),
            r"mine has images of \(3, 16, 16\), but the model takes \(1, 16, 16\); give",
        ),
        (DataFacts((1, 32, 32), 10), r"images of \(1, 32, 32\)"),
        (DataFacts((1, 16, 16), 11), "data mine has 11 classes, but the model has 10"),
        (DataFacts((1, 16, 16), 10, space=Space.LATENTS), "data mine holds latents, but the model is one of pixels"),
    ],
)
def test_a_contradiction_is_one_line(static_config: ModelConfig, data: DataFacts, message: str) -> None:
    model = static_config.model_copy(update={"space": Space.PIXELS})
    with pytest.raises(ConfigError, match=message):
        require_fit(model, data, "mine")
    require_fit(model, DataFacts((1, 16, 16), 9), "mine")


def test_texts_that_do_not_fit(pixart_config: ModelConfig) -> None:
    assert pixart_config.text is not None
    shape = (pixart_config.in_channels, pixart_config.input_size, pixart_config.input_size)
    tokens, channels = pixart_config.text.tokens, pixart_config.text.channels
    require_fit(pixart_config, DataFacts(shape, 0, text=TextSpec(tokens, channels)), "mine")
    with pytest.raises(ConfigError, match="has no texts, but the model is conditioned by texts"):
        require_fit(pixart_config, DataFacts(shape, 5), "mine")
    for text in (TextSpec(tokens + 1, channels), TextSpec(tokens, channels + 1)):
        with pytest.raises(ConfigError, match=f"data mine has texts of {text.tokens} tokens with {text.channels}"):
            require_fit(pixart_config, DataFacts(shape, 0, text=text), "mine")


def test_a_start_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist; recipe finetune takes the sizes of its model from init"):
        find_recipes("finetune", [f"init={tmp_path / 'none.pt'}", "data=digits"])
    (tmp_path / "bad.pt").write_bytes(b"nothing of the kind")
    with pytest.raises(CheckpointError, match=r"bad\.pt: is neither a torch\.save file nor"):
        find_recipes("finetune", [f"init={tmp_path / 'bad.pt'}", "data=digits"])
    (recipe,) = find_recipes("digits-dynamic", [f"init={tmp_path / 'none.pt'}"])
    assert isinstance(recipe, Recipe), "refused when the run starts"
    with pytest.raises(ConfigError, match="unknown data 'nothing'; known: digits, emoji"):
        find_recipes("digits", ["data=nothing"])
