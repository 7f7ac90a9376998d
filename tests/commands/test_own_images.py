"""One's own images become a trained, exported and sampled model, by the commands that each one names as the next."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dydit.bundle.bundle import Bundle
from dydit.checkpoints.checkpoint import load_checkpoint
from dydit.data.prepared import PreparedData
from dydit.models.config import Space
from dydit.training.state import read_log

CLASSES = {"cat": 200, "dog": 160, "snow owl": 140}
TINY = [
    *("model.hidden_size=32", "model.depth=2", "model.num_heads=2", "model.patch_size=4", "batch_size=8"),
    *("static.iterations=20", "dynamic.iterations=40", "settle.iterations=6", "ema_decay=0.5", "log_every=5"),
    *("learning_rate=3e-3", "learning_rate_warmup=0", "router_learning_rate=10", "width_bias=1", "token_bias=1"),
    *("dynamic.ramp_hold=0", "dynamic.ramp_iterations=5", "flops_weight=20"),
]
"""The recipe `scratch` at the size of a test, in which routers learn to close gates."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """500 pictures of several shapes, of one colour for each class, with a caption beside each."""
    folder: Path = tmp_path_factory.mktemp("own") / "photos"
    rng = np.random.default_rng(0)
    for channel, (name, count) in enumerate(CLASSES.items()):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            spots = rng.integers(0, 256, (3, 4, 3), np.uint8)
            spots[..., channel] = 255
            picture = Image.fromarray(spots).resize((60 + number % 20, 50 + number % 30), Image.Resampling.NEAREST)
            picture.save(folder / name / f"{number:03d}.{'jpg' if number % 5 else 'png'}")
            (folder / name / f"{number:03d}.txt").write_text(f"a photo of {('fox', 'owl', 'snow')[channel]}")
    return folder


Follow = Callable[..., Any]


@pytest.fixture
def follow(run: Any) -> Follow:
    """`follow(done, "train", RUN=path)`: the command `dydit train` that `done` names as the next one.

    Placeholders become what they stand for; further arguments, such as overrides, come after them.
    """

    def call(done: Any, command: str, *more: object, line: int = 0, **placeholders: object) -> Any:
        assert done.code == 0, done.err
        lines = [each for each in done.out.splitlines() if each.startswith(f"Next: dydit {command} ")]
        words = [str(placeholders.get(word, word)) for word in shlex.split(lines[line].removeprefix("Next: dydit"))]
        return run(*words, *more)

    return call


def picture(folder: Path, number: int) -> np.ndarray:
    with Image.open(folder / f"{number:06d}.png") as image:
        return np.asarray(image)


def test_latents_with_classes(run: Any, follow: Follow, photos: Path, autoencoder: Any, tmp_path: Path) -> None:
    vae = autoencoder.folder
    prepared = run("prepare", photos, "--size", 16, "--vae", vae, "--out", tmp_path / "data")
    assert "500 latents of 4x8x8 in 3 classes" in prepared.out, prepared.err
    trained = follow(prepared, "train", *TINY, RUN=tmp_path / "run")
    assert trained.out.endswith(
        f"Next: dydit export {tmp_path}/run/settle/model.safetensors --vae {vae} --out BUNDLE\n"
    )
    exported = follow(trained, "export", "--steps", 4, BUNDLE=tmp_path / "bundle")
    sampled = follow(exported, "sample", SAMPLES=tmp_path / "first")
    assert sampled.code == 0, sampled.err

    assert PreparedData(tmp_path / "data").class_names == tuple(CLASSES)
    checkpoint, bundle = load_checkpoint(tmp_path / "run/settle/model.safetensors"), Bundle.open(tmp_path / "bundle")
    for model in (checkpoint.config, bundle.manifest.model):
        assert model.class_names == tuple(CLASSES) and model.dynamic
        assert (model.in_channels, model.input_size, model.classes.count, model.null_class) == (4, 8, 3, 3)
    last = read_log(tmp_path / "run/settle")[-1]
    assert last["ratio"] < 0.95 and last["probe_tokens"] < 1, "gates and tokens were switched off"
    losses = [entry["mse"] for entry in read_log(tmp_path / "run/static")]
    assert losses[-1] < losses[0]
    for path in (tmp_path / "bundle", tmp_path / "run/settle/model.safetensors"):
        assert "0 cat, 1 dog, 2 snow owl\n" in run("inspect", path).out

    labels = {"numbers": "0-2", "names": "cat, dog,snow owl", "mixed": "cat,1-2", "other": "dog"}
    for name, given in labels.items():
        done = run("sample", tmp_path / "bundle", "--labels", given, "--out", tmp_path / name)
        assert done.code == 0, done.err
    for name in ("names", "mixed"):
        for number in range(3):
            assert np.array_equal(picture(tmp_path / name, number), picture(tmp_path / "numbers", number))
    assert picture(tmp_path / "first", 0).shape == (16, 16, 3)
    assert not np.array_equal(picture(tmp_path / "other", 0), picture(tmp_path / "numbers", 0)), "the class counts"
    compared = follow(exported, "parity", PARITY=tmp_path / "parity")
    assert compared.code == 0, compared.out + compared.err

    for given, message in {
        "cat,dgo": "--labels: no class has the name 'dgo'; did you mean 'dog'?",
        "zebra": "--labels: no class has the name 'zebra'; `dydit inspect --json` lists the names",
    }.items():
        refused = run("sample", tmp_path / "bundle", "--labels", given, "--out", tmp_path / "none")
        assert refused.code == 2 and refused.err == f"dydit: error: {message}\n" and not (tmp_path / "none").exists()
    assert '"snow owl"' in run("inspect", tmp_path / "bundle", "--json").out


def test_pixels_and_a_model_that_goes_on_from_them(run: Any, follow: Follow, photos: Path, tmp_path: Path) -> None:
    prepared = run("prepare", photos, "--size", 64, "--out", tmp_path / "data")
    larger = [*TINY, "model.patch_size=16"]
    trained = follow(prepared, "train", *larger, RUN=tmp_path / "run")
    assert trained.out.endswith(f"Next: dydit export {tmp_path}/run/settle/model.safetensors --out BUNDLE\n")
    exported = follow(trained, "export", "--steps", 3, BUNDLE=tmp_path / "bundle")
    sampled = run("sample", tmp_path / "bundle", "--labels", "snow owl,0", "--out", tmp_path / "samples")
    assert sampled.code == 0, sampled.err
    assert picture(tmp_path / "samples", 1).shape == (64, 64, 3) and "VAE" not in exported.out
    assert Bundle.open(tmp_path / "bundle").manifest.model.space is Space.PIXELS

    # The other command that is named: fine-tuning of a static checkpoint, here on a part of the images.
    parts = tmp_path / "parts"
    for name in ("snow owl", "cat"):
        (parts / name).mkdir(parents=True)
        for path in sorted((photos / name).glob("00*.png")):
            (parts / name / path.name).write_bytes(path.read_bytes())
    again = run("prepare", parts, "--size", 64, "--out", tmp_path / "fewer")
    settings = [word for word in TINY if not word.startswith(("model.", "static."))]
    static = tmp_path / "run/static/model.safetensors"
    tuned = follow(again, "train", *settings, line=1, CHECKPOINT=static, RUN=tmp_path / "tuned")
    assert tuned.code == 0 and "2 rows of classes with equal names are kept" in tuned.err, tuned.err
    model = load_checkpoint(tmp_path / "tuned/settle/model.safetensors").config
    assert model.class_names == ("cat", "snow owl") and model.dynamic and model.hidden_size == 32


def test_captions_become_a_pixart(
    run: Any, follow: Follow, photos: Path, autoencoder: Any, text_encoder: Path, tmp_path: Path
) -> None:
    models = ("--vae", autoencoder.folder, "--text-encoder", text_encoder, "--text-tokens", 8)
    prepared = run("prepare", photos, "--size", 16, "--limit", 200, *models, "--out", tmp_path / "data")
    assert "200 latents of 4x8x8 in 3 classes, with captions of up to 8 tokens" in prepared.out, prepared.err
    trained = follow(prepared, "train", *TINY, RUN=tmp_path / "run")
    exported = follow(trained, "export", "--steps", 3, BUNDLE=tmp_path / "bundle")
    model = Bundle.open(tmp_path / "bundle").manifest.model
    assert model.architecture == "pixart" and model.text is not None and model.dynamic
    assert (model.text.tokens, model.text.channels, model.input_size) == (8, 16, 8)
    texts = {"TEXT_ENCODER": text_encoder, "TEXTS.npz": tmp_path / "texts.npz"}
    encoded = follow(exported, "encode", "--prompt", "the owl in snow", **texts, PROMPT="a red fox")
    followed = follow(exported, "sample", **texts, SAMPLES=tmp_path / "followed")
    assert follow(encoded, "sample", BUNDLE=tmp_path / "bundle", SAMPLES=tmp_path / "encoded").code == 0
    assert followed.code == 0, followed.err
    words = ("--prompt", "a red fox", "--prompt", "the owl in snow", "--text-encoder", text_encoder)
    asked = run("sample", tmp_path / "bundle", *words, "--out", tmp_path / "asked")
    assert asked.code == 0, asked.err
    for number in range(2):
        for name in ("encoded", "asked"):
            assert np.array_equal(picture(tmp_path / name, number), picture(tmp_path / "followed", number))
    turned = run("sample", tmp_path / "bundle", *words[2:4], *words[4:], "--out", tmp_path / "turned")
    assert turned.code == 0 and not np.array_equal(picture(tmp_path / "turned", 0), picture(tmp_path / "asked", 0))


def test_a_scale_that_was_given_for_latents_is_named_for_their_decoder(
    run: Any, follow: Follow, photos: Path, autoencoder: Any, tmp_path: Path
) -> None:
    words = ("--vae", autoencoder.folder, "--vae-scale", 0.5, "--vae-shift", -0.25)
    prepared = run("prepare", photos, "--size", 16, "--limit", 20, *words, "--out", tmp_path / "data")
    trained = follow(prepared, "train", *TINY, "static.iterations=1", "dynamic.iterations=1", RUN=tmp_path / "run")
    stated = f"--vae {autoencoder.folder} --vae-scale 0.5 --vae-shift -0.25 --out BUNDLE"
    assert trained.out.endswith(f" {tmp_path}/run/settle/model.safetensors {stated}\n"), trained.out


def test_names_where_a_bundle_has_none(run: Any, make_bundle: Any, tmp_path: Path) -> None:
    bundle = make_bundle(steps=3)
    refused = run("sample", bundle.path, "--labels", "1,cat", "--out", tmp_path / "none")
    assert refused.code == 2 and not (tmp_path / "none").exists()
    assert refused.err == "dydit: error: --labels must be integers, not 'cat': this bundle has no names of classes\n"


def test_a_static_model_and_its_routers_in_two_commands(run: Any, follow: Follow, photos: Path, tmp_path: Path) -> None:
    prepared = run("prepare", photos, "--size", 8, "--limit", 8, "--out", tmp_path / "data")
    refused = run("train", "--recipe", "finetune", "--data", tmp_path / "data", "--out", tmp_path / "run")
    assert refused.code == 2 and "--recipe scratch trains a new model" in refused.err
    assert prepared.code == 0 and not (tmp_path / "run").exists()
    tiny, data = [word for word in TINY if not word.startswith(("dynamic.", "settle."))], tmp_path / "data"
    static = run("train", "--recipe", "scratch-static", "--data", data, "--out", tmp_path / "run", *tiny)
    lengths = ("batch_size=8", "iterations=2", "ema_decay=0.5")
    tuned = follow(static, "train", *lengths, RUN=tmp_path / "tuned")
    assert f"Next: dydit export {tmp_path}/run/model.safetensors --out BUNDLE\n" in static.out
    assert tuned.code == 0 and tuned.out.count("Next: ") == 1, tuned.err
    assert load_checkpoint(tmp_path / "tuned/settle/model.safetensors").config.dynamic
