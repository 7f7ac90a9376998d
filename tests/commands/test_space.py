"""Latents of three channels are never saved as pictures where anything states that they are latents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dydit.bundle.bundle import Bundle
from dydit.checkpoints.checkpoint import load_checkpoint
from dydit.checkpoints.pipeline_folder import space_of_folder
from dydit.models.config import Space, parse_config
from dydit.models.dit.config import DiTConfig
from dydit.runtime.images.pixels import PictureFormat, picture_format


@pytest.fixture(scope="module")
def three(make_checkpoint, small_config) -> Path:
    """A checkpoint of three channels, which states nothing."""
    return make_checkpoint(small_config.model_copy(update={"in_channels": 3})).path


@pytest.fixture(scope="module")
def vq(tmp_path_factory, traces) -> Path:
    """An autoencoder with a codebook, whose latents have three channels; pictures of 16 pixels. Traced once."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'dydit[vae]'")
    import torch

    torch.manual_seed(6)
    vae = diffusers.VQModel(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=3,
        num_vq_embeddings=16,
        norm_num_groups=4,
        scaling_factor=1.0,
    )
    folder = tmp_path_factory.mktemp("vq") / "vqvae"
    vae.save_pretrained(folder)
    return folder


def sizes(**changes: Any) -> dict[str, Any]:
    return {"hidden_size": 64, "depth": 1, "num_heads": 4, "patch_size": 2, "input_size": 8, **changes}


@pytest.mark.parametrize(
    ("channels", "space", "pixels", "assumed", "words"),
    [
        (1, None, True, False, "pixels, grey"),
        (2, None, False, False, "latents"),
        (3, None, True, True, "pixels, RGB; assumed because of 3 channels"),
        (3, "pixels", True, False, "pixels, RGB"),
        (3, "latents", False, False, "latents"),
        (1, "latents", False, False, "latents"),
        (4, None, False, False, "latents"),
        (16, None, False, False, "latents"),
    ],
)
def test_what_samples_are(channels, space, pixels, assumed, words) -> None:
    config = DiTConfig(**sizes(in_channels=channels, space=space))
    assert (config.samples_pixels, config.space_is_assumed) == (pixels, assumed)
    assert config.space_words.startswith(words) and ("assumed" in config.space_words) == assumed


def test_a_configuration_that_states_nothing_reads_and_writes_as_before() -> None:
    """So that digests of older bundles hold, and older programs read newer checkpoints of most models."""
    config = DiTConfig(**sizes())
    assert "space" not in config.model_dump() and "space" not in config.model_dump_json()
    stated = config.stating(Space.LATENTS, decoded=False)
    assert json.loads(stated.model_dump_json())["space"] == "latents"
    assert parse_config(DiTConfig, json.loads(stated.model_dump_json())) == stated
    assert stated != config and stated.sizes == config.sizes
    assert config.stating(None, decoded=True) == config, "of four channels nothing has to be stated"


def inspected(run: Any, path: Path) -> str:
    return next(line for line in run("inspect", path).out.splitlines() if line.startswith("samples "))


def test_nothing_stated_is_said(run, three: Path, tmp_path: Path) -> None:
    done = run("export", three, "--steps", 2, "--out", tmp_path / "bundle")
    assert (
        "The samples are assumed to be RGB pixels, because they have 3 channels. If they are latents, export with "
        in done.out
    )
    for path in (three, tmp_path / "bundle"):
        assert "pixels, RGB; assumed because of 3 channels" in inspected(run, path)
    assert "space" not in json.loads((tmp_path / "bundle" / "manifest.json").read_text())["model"]


def test_stated_latents_are_not_saved_as_pictures(run, three: Path, vq: Path, tmp_path: Path) -> None:
    bundle, out = tmp_path / "bundle", tmp_path / "out"
    done = run("export", three, "--steps", 2, "--space", "latents", "--out", bundle)
    assert done.code == 0 and "assumed" not in done.out
    assert picture_format(Bundle.open(bundle).manifest) is None and inspected(run, bundle).endswith("  latents")
    assert run("sample", bundle, "--labels", "0,1", "--out", out).code == 0
    assert sorted(path.name for path in out.iterdir()) == ["latents.npz", "samples.json"]
    assert run("parity", bundle, "--against", three, "--out", tmp_path / "parity").code == 0, "the same architecture"
    # What was sampled becomes pictures by either way.
    assert run("decode", out, "--vae", vq, "--out", tmp_path / "decoded").code == 0
    assert run("attach-vae", bundle, "--vae", vq).code == 0
    assert run("sample", bundle, "--labels", "0,1", "--out", tmp_path / "pictures").code == 0
    for name in ("000000.png", "000001.png", "grid.png"):
        assert (tmp_path / "pictures" / name).read_bytes() == (tmp_path / "decoded" / name).read_bytes()


def test_a_decoder_states_latents(run, three: Path, vq: Path, tmp_path: Path) -> None:
    done = run("export", three, "--steps", 2, "--vae", vq, "--out", tmp_path / "bundle")
    assert done.code == 0 and "a codebook of 16" in done.out, done.err
    manifest = Bundle.open(tmp_path / "bundle").manifest
    assert manifest.model.space is Space.LATENTS and picture_format(manifest) == PictureFormat(3, 16, True)


def test_an_assumed_bundle_becomes_one_of_latents_with_a_decoder(run, three: Path, vq: Path, tmp_path: Path) -> None:
    """As bundles were before anything could be stated."""
    bundle = tmp_path / "bundle"
    assert run("export", three, "--steps", 2, "--out", bundle).code == 0
    assert run("attach-vae", bundle, "--vae", vq).code == 0
    assert picture_format(Bundle.open(bundle).manifest) == PictureFormat(3, 16, True)


def test_convert_states_it_for_good(run, three: Path, tmp_path: Path) -> None:
    latents, again = tmp_path / "latents.safetensors", tmp_path / "again.safetensors"
    assert run("convert", three, "--space", "latents", "--out", latents).code == 0
    assert run("convert", latents, "--out", again).code == 0
    assert load_checkpoint(again).config.space is Space.LATENTS
    assert run("export", again, "--steps", 2, "--out", tmp_path / "bundle").code == 0
    assert Bundle.open(tmp_path / "bundle").manifest.model.space is Space.LATENTS
    done = run("export", again, "--steps", 2, "--space", "pixels", "--out", tmp_path / "pixels")
    assert done.code == 0 and Bundle.open(tmp_path / "pixels").manifest.model.samples_pixels, "the option counts"


def test_a_pipeline_with_an_autoencoder_samples_latents(tmp_path: Path) -> None:
    transformer, index = tmp_path / "transformer", tmp_path / "model_index.json"
    transformer.mkdir()
    assert space_of_folder(tmp_path) is None and space_of_folder(transformer) is None
    for text, space in (
        ('{"vae": ["diffusers", "AutoencoderKL"]}', Space.LATENTS),
        ('{"vqvae": ["diffusers", "VQModel"]}', Space.LATENTS),
        ('{"vae": [null, null]}', None),
        ('{"scheduler": ["diffusers", "DDPMScheduler"]}', None),
        ("[]", None),
        ("{", None),
    ):
        index.write_text(text)
        assert space_of_folder(tmp_path) is space and space_of_folder(transformer) is space
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text("{}")
    assert space_of_folder(tmp_path) is Space.LATENTS and space_of_folder(transformer) is Space.LATENTS


def test_pixels_of_the_shipped_recipe_are_pixels() -> None:
    from dydit.training.recipe_files import find_recipes

    assert all(recipe.model.samples_pixels and not recipe.model.space_is_assumed for recipe in find_recipes("digits"))


def test_a_pixel_model_without_a_learned_variance(make_checkpoint, make_bundle, small_config) -> None:
    from dydit.runtime.pipeline import DyDiTPipeline

    checkpoint = make_checkpoint(small_config.model_copy(update={"in_channels": 3, "learn_sigma": False}))
    with DyDiTPipeline.from_bundle(make_bundle(checkpoint, steps=2).path) as pipe:
        picture = np.asarray(pipe([1], seed=0).images[0])
    assert picture.shape == (8, 8, 3) and picture.std() > 5
