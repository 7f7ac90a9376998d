"""A model without a row for no class, from its checkpoint to images: without guidance it runs, else it is refused."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dydit.bundle.bundle import Bundle
from dydit.checkpoints.checkpoint import Checkpoint, load_checkpoint
from dydit.diffusion.samplers import SamplerConfig
from dydit.errors import ConfigError
from dydit.models.config import ModelConfig, parse_config
from dydit.models.dit.config import DiTConfig
from dydit.models.synthetic import synthetic_model
from dydit.parity.reference import Images, Reference
from dydit.runtime.pipeline import DyDiTPipeline
from dydit.training.recipe import Recipe
from dydit.training.recipe_files import find_recipes
from tests.fixtures.packages import OPENVINO_AT_RELEASE

REFUSED = "needs a null class, which this model does not have"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, small_config: ModelConfig) -> Checkpoint:
    config = small_config.model_copy(update={"null_class_row": False})
    path = tmp_path_factory.mktemp("no-null") / "a.pt"
    arguments = argparse.Namespace(num_classes=7, class_dropout_prob=0.0)
    torch.save({"ema": synthetic_model(config).state_dict(), "args": arguments}, path)
    loaded = load_checkpoint(path)
    assert loaded.config == config and len(loaded.state["y_embedder.embedding_table.weight"]) == 7
    return loaded


@pytest.fixture(scope="module")
def bundle(checkpoint: Checkpoint, make_bundle: Callable[..., Bundle]) -> Bundle:
    return make_bundle(checkpoint, steps=4)


@pytest.mark.parametrize("backend", ["onnxruntime", "torch", OPENVINO_AT_RELEASE])
def test_every_class_is_sampled_without_guidance(checkpoint: Checkpoint, bundle: Bundle, backend: str) -> None:
    labels = [0, 6]
    with DyDiTPipeline.from_bundle(bundle.path, backend) as pipe:
        latents = pipe(labels, guidance_scale=1, seed=3, output_type="latent").latents
        for scale in (0.0, 4.0):
            with pytest.raises(ConfigError, match=REFUSED):
                pipe(labels, guidance_scale=scale, output_type="latent")
        with pytest.raises(ConfigError, match=r"label 7 is outside 0\.\.6"):
            pipe([7], guidance_scale=1, output_type="latent")
    reference = Reference(checkpoint.model(), SamplerConfig(steps=4), cfg_channels=3)
    expected = reference.run(Images(tuple(labels), seed=3, cfg_scale=1)).latents[-1]
    assert np.abs(latents - expected).max() < 1e-3 * np.abs(expected).max()
    assert np.abs(latents[0] - latents[1]).max() > 1e-2


def test_guidance_is_refused_wherever_it_is_taken(
    checkpoint: Checkpoint, bundle: Bundle, tmp_path: Path, run: Callable[..., Any]
) -> None:
    out, path = tmp_path / "out", checkpoint.path
    for command in (
        ("sample", bundle.path, "--labels", "0", "--out", out),
        ("parity", bundle.path, "--against", path, "--out", out),
        ("bench", bundle.path, "--out", out),
        ("calibrate", path, "--out", out, "--steps", 4),
    ):
        result = run(*command)
        assert result.code == 2 and REFUSED in result.err and result.err.count("\n") == 1, (command, result)
        assert not out.exists()
    with pytest.raises(ConfigError, match=REFUSED):
        Reference(checkpoint.model(), SamplerConfig(steps=2), cfg_channels=3).run(Images((0,), cfg_scale=2.0))


def test_the_commands_run_without_guidance(
    checkpoint: Checkpoint, bundle: Bundle, tmp_path: Path, run: Callable[..., Any]
) -> None:
    path = bundle.path
    plain = ("--labels", "0,6", "--cfg-scale", 1)
    sampled = run("sample", path, *plain, "--out", tmp_path / "samples")
    assert sampled.code == 0, sampled.err
    compared = run("parity", path, "--against", checkpoint.path, *plain, "--every", 4, "--out", tmp_path / "parity")
    assert compared.code == 0, compared
    told = run("inspect", path)
    assert told.code == 0 and "7 classes, no null class, so no guidance" in told.out
    assert json.loads((path / "manifest.json").read_text())["model"]["null_class_row"] is False


def test_a_table_without_the_row_is_named_when_it_is_read(tmp_path: Path, run: Callable[..., Any]) -> None:
    config = DiTConfig(hidden_size=32, depth=1, num_heads=4, patch_size=2, input_size=4, num_classes=10)
    torch.save(synthetic_model(config).state_dict(), tmp_path / "a.pt")
    assumed = run("inspect", tmp_path / "a.pt")
    assert (
        "\nassumed " in assumed.out
        and "10 classes" in assumed.out
        and "if all of them are classes, give --num-classes 11" in assumed.out
    )
    told = run("inspect", tmp_path / "a.pt", "--num-classes", 11)
    assert "11 classes, no null class" in told.out
    assert not any(line.startswith("assumed") for line in told.out.splitlines())
    exported = run("export", tmp_path / "a.pt", "--steps", 2, "--out", tmp_path / "b")
    assert "the last of the 11 rows" in exported.out
    wrong = run("export", tmp_path / "a.pt", "--num-classes", 5, "--out", tmp_path / "c")
    assert wrong.code == 2 and "a class table of 11 rows, but --num-classes says 5 classes" in wrong.err


def test_files_and_bundles_of_before_are_read_and_written_as_they_were(small_config: ModelConfig) -> None:
    assert "null_class_row" not in small_config.model_dump() and "null_class_row" not in small_config.model_dump_json()
    without = small_config.model_copy(update={"null_class_row": False})
    assert parse_config(DiTConfig, without.model_dump()) == without != small_config
    assert parse_config(DiTConfig, small_config.model_dump()) == small_config
    assert without.classes.rows == small_config.classes.rows - 1 == 7


def test_a_recipe_drops_no_labels_without_the_row() -> None:
    (recipe,) = find_recipes("digits-static", ["model.null_class_row=false", "label_dropout=0"])
    assert not recipe.model.null_class_row
    with pytest.raises(ConfigError, match=r"label_dropout needs a model with a null class"):
        find_recipes("digits-static", ["model.null_class_row=false"])
    assert Recipe.model_validate(recipe.model_dump()) == recipe
