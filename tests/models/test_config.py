"""Sizes, presets and what is refused."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from dydit.errors import ConfigError
from dydit.models.config import Routers, parse_config
from dydit.models.dit.config import DiTConfig, preset

VALID = {"hidden_size": 64, "depth": 2, "num_heads": 4, "patch_size": 2, "input_size": 8}


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("S/2", (384, 12, 6, 2, 256, 64, 256)),
        ("B/4", (768, 12, 12, 4, 64, 64, 256)),
        ("L/2", (1024, 24, 16, 2, 256, 64, 256)),
        ("DiT-XL/2", (1152, 28, 16, 2, 256, 72, 288)),
        ("DyDiT-S/8", (384, 12, 6, 8, 16, 64, 256)),
    ],
)
def test_presets(name, sizes):
    config = preset(name)
    seen = (config.hidden_size, config.depth, config.num_heads, config.patch_size, config.tokens)
    assert (*seen, config.head_dim, config.group_dim) == sizes
    assert (config.in_channels, config.out_channels, config.num_classes, config.null_class) == (4, 8, 1000, 1000)
    assert config.mlp_hidden == 4 * config.hidden_size == config.group_dim * config.num_heads
    assert config.token_router_hidden == config.hidden_size // 16


def test_preset_at_512_pixels_and_with_changes():
    config = preset("XL/2", 64, learn_sigma=False, routers="none")
    assert config.tokens == 1024 and config.out_channels == 4
    assert not config.dynamic


@pytest.mark.parametrize("name", ["", "XL", "XL/3", "M/2", "xl/2", "S/2/2", "S/"])
def test_unknown_presets_name_the_known(name):
    with pytest.raises(ConfigError, match=r"^unknown preset .*; expected one of: S/2, S/4, S/8, B/2"):
        preset(name)


def test_router_layouts():
    config = DiTConfig.model_validate(VALID)
    assert config.routers is Routers.FIRST_ON and config.dynamic
    static = config.without_routers()
    assert not static.dynamic and static == config.model_copy(update={"routers": Routers.NONE})


def test_small_models_have_a_token_router_too():
    assert DiTConfig.model_validate({**VALID, "hidden_size": 8}).token_router_hidden == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 5}, "hidden_size 64 is not a multiple of num_heads 5"),
        ({"patch_size": 3}, "input_size 8 is not a multiple of patch_size 3"),
        ({"hidden_size": 6, "num_heads": 3}, "hidden_size 6 is not a multiple of 4"),
        ({"depth": 0}, "depth must be greater than 0"),
        ({"depth": "two"}, "depth must be a whole number"),
        ({"heads": 4}, "heads is not a known setting"),
        ({"routers": "some"}, "routers must be 'none', 'first-on' or 'all-routed'"),
    ],
)
def test_bad_values_are_refused_in_one_line(change, message):
    with pytest.raises(ConfigError) as caught:
        parse_config(DiTConfig, {**VALID, **change})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_bad_field_is_named():
    with pytest.raises(ConfigError, match=r"^hidden_size must .*; depth must .*; patch_size is missing"):
        parse_config(DiTConfig, {"hidden_size": 0, "depth": -1, "num_heads": 1, "input_size": 4})


def test_is_immutable_and_hashable():
    config = DiTConfig.model_validate(VALID)
    with pytest.raises(ValidationError, match="frozen"):
        config.depth = 3
    assert len({config, DiTConfig.model_validate(VALID), config.without_routers()}) == 2


def test_survives_json():
    config = preset("B/2", 64, routers=Routers.ALL_ROUTED)
    assert DiTConfig.model_validate_json(config.model_dump_json()) == config
