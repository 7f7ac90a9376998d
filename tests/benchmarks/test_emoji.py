"""The measures of the emoji models: the limits, the texts that are sampled, and a run on models of random weights."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from dydit.checkpoints.checkpoint import save_checkpoint
from dydit.models.synthetic import synthetic_model
from dydit.models.uvit.config import UViTConfig


@pytest.fixture
def script(load_script):
    return load_script("emoji")


def figures(**changes):
    """Figures that keep all limits, but for `changes`."""
    values = {"distance": 1.0, "ratio": 0.41, "masks": 30, "deviation": 0.03, "parity": True} | changes
    return {
        "static": {"frechet_distance": 1.0},
        "dynamic": {"frechet_distance": values["distance"]},
        "routing": {
            "flops_ratio": values["ratio"], "distinct_masks": values["masks"], "token_ratio_std": values["deviation"],
        },
        "parity": {"ok": values["parity"]},
    }  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [{}, {"distance": 1.2}, {"ratio": 0.44}, {"ratio": 0.36}, {"masks": 20}, {"deviation": 0.01}, {"parity": 0}],
)
def test_each_limit_is_missed_alone(script, change):
    missed = [name for name, holds in script.limits(figures(**change), 0.4).items() if not holds]
    assert len(missed) == len(change)


def test_the_recipe_says_what_the_flops_ratio_should_be(script):
    assert script.target_of("uvit") == 0.4
    assert script.target_of("pixart") == 0.7


def test_what_is_shown_are_captions_of_emoji(script):
    from dydit.data.small_sets import Emoji

    assert set(script.CAPTIONS) <= set(Emoji().captions)


@pytest.mark.release
def test_models_of_random_weights(script, monkeypatch, tmp_path, capsys):
    config = UViTConfig(
        input_size=32, in_channels=3, patch_size=8, hidden_size=16, depth=3, num_heads=2, num_classes=9, space="pixels",
        null_class_row=True,
    )  # fmt: skip
    dynamic, static = tmp_path / "dynamic.safetensors", tmp_path / "static.safetensors"
    save_checkpoint(dynamic, synthetic_model(config, seed=0, flops_ratio=0.4), config)
    save_checkpoint(static, synthetic_model(config.without_routers(), seed=1), config.without_routers())
    words = ["uvit", "--dynamic", dynamic, "--static", static, "--work", tmp_path / "work"]
    words += ["--json", tmp_path / "report.json", "--pictures", tmp_path, "--samples", "70", "--batch", "10"]
    words += ["--steps", "3", "--repeats", "2", "--threads", "1"]
    monkeypatch.setattr("sys.argv", ["emoji.py", *map(str, words)])
    assert script.main() == 1, "three steps have no 20 masks"
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["static"]["frechet_distance"] > 0
    assert report["parity"]["ok"] and report["latency"]["speed_up"] > 0
    assert "MISSED more than 20 distinct masks" in capsys.readouterr().out
    for name in ("emoji-uvit", "emoji-uvit-masks", "emoji-uvit-tokens"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert np.asarray(image.convert("L")).std() > 8, "not blank"
