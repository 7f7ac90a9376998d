"""Every recipe of dydit trains from data in the format that its own data have, with a model of toy size.

Little else about a recipe is changed, but for lengths in iterations: the latents of ImageNet and COCO have 4x32x32
numbers, or 4x64x64 at 512 px (of an autoencoder that halves the sides), and the data sets for fine-tuning, whose
latents are smaller here, have as many classes as the recipes say.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dydit.checkpoints.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from dydit.commands.progress import Progress
from dydit.data.prepare import prepare
from dydit.data.prepare_settings import PrepareSettings
from dydit.models.config import ModelConfig, Routers, TextSpec
from dydit.models.registry import architecture_of
from dydit.models.synthetic import synthetic_model
from dydit.training.completion import data_facts
from dydit.training.recipe import Recipe, Stage
from dydit.training.recipe_files import find_recipes, read_draft, shipped_recipes
from dydit.training.start import starting_model
from dydit.training.state import read_log

TOY = {
    "dit": {"hidden_size": 32, "depth": 2, "num_heads": 2, "patch_size": 8},
    "pixart": {"hidden_size": 32, "depth": 1, "num_heads": 2, "patch_size": 8},
    "uvit": {"hidden_size": 32, "depth": 3, "num_heads": 2, "patch_size": 8},
}
LENGTHS = {"batch_size": 8, "ema_decay": 0.5, "learning_rate_warmup": 4, "ramp_hold": 2, "ramp_iterations": 8}
ITERATIONS, LEARNING_RATE = 20, 3e-3
SHARES = ("0.9", "0.8", "0.7", "0.6", "0.5", "0.4", "0.3")
SAME = {name for name in shipped_recipes() if name.startswith("dit-") and name.endswith(SHARES)}
"""Recipes that extend another one, which is trained here, by other values: see the last test."""
TRAINED = [name for name in shipped_recipes() if name not in SAME - {"dit-xl2-0.7"}]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Data in their real formats


def pictures(count: int, side: int = 24) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (side, side + 2, 3), np.uint8)) for _ in range(count)]


def image_folder(folder: Path, classes: int) -> None:
    """A folder for each class, with an image or two, at least twelve in all."""
    for number, picture in enumerate(pictures(max(classes, 12))):
        place = folder / f"class {number % classes:03d}"
        place.mkdir(parents=True, exist_ok=True)
        picture.save(place / f"{number}.jpg")


def hugging_face(folder: Path, classes: int) -> None:
    """What `save_to_disk` writes of a data set with an image and its class in a row."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed: pip install 'dydit[data]'")
    names = [f"n{number:08d}" for number in range(classes)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    rows = {"image": pictures(24), "label": [number % classes for number in range(24)]}
    datasets.Dataset.from_dict(rows, features).save_to_disk(folder)


def cifar10(folder: Path) -> None:
    inside = folder / "cifar-10-batches-bin"
    inside.mkdir(parents=True)
    rows = np.random.default_rng(0).integers(0, 256, (6, 8, 1 + 3 * 32 * 32), np.uint8)
    rows[..., 0] %= 10
    for number, name in enumerate([*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]):
        rows[number].tofile(inside / name)
    names = "airplane automobile bird cat deer dog frog horse ship truck"
    (inside / "batches.meta.txt").write_text(names.replace(" ", "\n"))


def coco(folder: Path) -> None:
    (folder / "annotations").mkdir(parents=True)
    (folder / "train2017").mkdir()
    facts: dict[str, list[dict[str, object]]] = {"images": [], "annotations": []}
    for number, picture in enumerate(pictures(12), 9):
        name = f"{number:012d}.jpg"
        picture.save(folder / "train2017" / name)
        facts["images"].append({"id": number, "file_name": name, "width": 26, "height": 24})
        texts = enumerate(("A fox in the snow.", "a photo of an owl", "red fox"))
        facts["annotations"] += [{"id": 10 * number + at, "image_id": number, "caption": text} for at, text in texts]
    (folder / "annotations" / "captions_train2017.json").write_text(json.dumps(facts))


@pytest.fixture(scope="session")
def toy_data(
    tmp_path_factory: pytest.TempPathFactory, autoencoder: Any, text_encoder: Path
) -> Callable[[str, dict[str, Any]], str]:
    """`toy_data(name, model)`: prepared data for the recipe of this name, whose model states some fields."""
    root: Path = tmp_path_factory.mktemp("recipes")
    vae: dict[str, Any] = {"vae": str(autoencoder.folder), "batch_size": 16}

    def made(key: str, write: Callable[[Path], None] | None, **settings: Any) -> str:
        if not (root / key / "data").is_dir():
            if write is not None:
                write(root / key / "source")
            stated = PrepareSettings.model_validate({"source": str(root / key / "source"), **settings})
            prepare(stated, root / key / "data", 1, Progress())
        return str(root / key / "data")

    def make(name: str, model: dict[str, Any]) -> str:
        if name in ("digits", "uvit-emoji"):
            return name.removeprefix("uvit-")
        if name == "uvit-cifar10":
            return made(name, cifar10)
        if name == "pixart-emoji":
            return made(name, None, source="emoji", limit=12, text_encoder=str(text_encoder), text_tokens=12)
        if name == "pixart-coco":
            return made(name, coco, size=64, mirror=False, text_encoder=str(text_encoder), text_tokens=12, **vae)
        if name in ("scratch", "finetune"):
            return made("own", lambda folder: image_folder(folder, 3), size=64, **vae)
        if (classes := model.get("num_classes")) is not None:
            return made(name, lambda folder: image_folder(folder, classes), size=16, mirror=False, **vae)
        side = model["input_size"]
        return made(f"imagenet-{side}", lambda folder: hugging_face(folder, 6), size=2 * side, limit=8, **vae)

    return make


@pytest.fixture(scope="session")
def toy_start(tmp_path_factory: pytest.TempPathFactory) -> Callable[[ModelConfig], Path]:
    """`toy_start(model)`: a static checkpoint for a dynamic model. A DiT has the classes of other data: twelve."""
    folder: Path = tmp_path_factory.mktemp("starts")

    def make(model: ModelConfig) -> Path:
        static = model.model_copy(update={"routers": Routers.NONE})
        static = static.with_classes(12) if model.architecture == "dit" else static
        path = folder / f"{len(list(folder.iterdir()))}.safetensors"
        save_checkpoint(path, synthetic_model(static), static)
        return path

    return make


# Training


@pytest.mark.parametrize("name", TRAINED)
def test_a_recipe_trains(
    name: str,
    run: Any,
    toy_data: Callable[..., str],
    toy_start: Callable[[ModelConfig], Path],
    tmp_path: Path,
) -> None:
    drafts = read_draft(name).values
    stated = drafts[0]["model"]
    kind, data = stated.get("architecture", "dit"), toy_data(name, stated)
    lengths = {**LENGTHS, "warmup_iterations": 3} if drafts[0].get("warmup_iterations") else LENGTHS
    toy = {f"model.{key}": value for key, value in TOY[kind].items()}
    if "num_classes" in stated and kind == "dit" and name != "digits":
        toy |= {"model.input_size": 8, "model.patch_size": 2}
    settings = {**toy, **lengths, "iterations": ITERATIONS, "learning_rate": LEARNING_RATE, "log_every": 10}
    words = [f"{key}={value}" for key, value in settings.items()]
    recipes = find_recipes(name, [*words, f"data={data}", *_sizes(name, data)])
    start, previous = [], tmp_path
    if recipes[0].stage is not Stage.STATIC:
        previous = toy_start(recipes[0].model)
        start = ["--init", previous]
    if name == "finetune":
        words = [word for word in words if not word.startswith("model.")]
    done = run("train", "--recipe", name, "--data", data, *start, "--out", tmp_path / "run", *words)
    assert done.code == 0, done.err

    folders = [tmp_path / "run"] if len(recipes) == 1 else [tmp_path / "run" / each.stage for each in recipes]
    for recipe, draft, folder in zip(recipes, drafts, folders, strict=True):
        log = read_log(folder)
        assert log[-1]["iteration"] == ITERATIONS and log[-1]["skipped"] == 0
        assert all(np.isfinite(entry[key]) for entry in log for key in ("loss", "mse", "probe_mse", "grad_norm"))
        ran = json.loads((folder / "recipe.json").read_text())
        kept = {key: value for key, value in draft.items() if key not in (*settings, "model", "data", "init")}
        assert {key: ran[key] for key in kept} == kept, "what the recipe states is what ran"
        trained = load_checkpoint(folder / "model.safetensors")
        assert trained.config.dynamic == (recipe.stage is not Stage.STATIC)
        if recipe.stage is not Stage.STATIC:
            assert log[-1]["target"] == recipe.lambda_target and 0 < log[-1]["ratio"] <= 1
            assert _moved(recipe, previous, trained)
        previous = trained.path
    model = trained.config
    assert (model.in_channels, model.input_size, model.class_names) == _facts(data, model)
    if model.text is not None:
        assert model.text == TextSpec(12, 16)
    if name == "sit-xl2":
        assert model.diffusion.prediction == "velocity"
    if start and kind == "dit":
        assert f"(12 classes) is rebuilt for {model.classes.count} classes" in done.err


def _sizes(name: str, data: str) -> list[str]:
    """What the checkpoint would decide about a model of a recipe that states none of its sizes."""
    facts = data_facts(data)
    return [f"model.in_channels={facts.shape[0]}", f"model.input_size={facts.shape[1]}"] if name == "finetune" else []


def _facts(data: str, model: ModelConfig) -> tuple[int, int, tuple[str, ...] | None]:
    facts = data_facts(data)
    named = not model.classes.unconditional and model.text is None
    return facts.shape[0], facts.shape[1], facts.class_names if named else None


def _moved(recipe: Recipe, init: Path, trained: Checkpoint) -> bool:
    """Whether every router and every block was trained: differs from what the run started with."""
    known, before = architecture_of(recipe.model), starting_model(recipe.model_copy(update={"init": str(init)}))
    state = before.state_dict()
    checked = [name for name in state if known.is_router(name) or known.is_block_matrix(name)]
    assert any(map(known.is_router, checked)) and not all(map(known.is_router, checked))
    return not any(state[name].equal(trained.state[name]) for name in checked)


def test_recipes_for_other_shares_differ_in_nothing_else() -> None:
    """So that training the recipe which they extend is proof for them as well. `dit-xl2-0.7` is trained itself."""
    assert len(SAME) == 16
    for name in sorted(SAME - {"dit-xl2-0.7"}):
        base, _, share = name.rpartition("-")
        (mine,), (other,) = read_draft(name).values, read_draft(base).values
        different = {key for key in mine if mine[key] != other.get(key)} - {"name"}
        assert set(mine) == set(other) and different <= {"lambda_target", "iterations", "grad_norm_limit"}, name
        assert mine["lambda_target"] == float(share)
        assert find_recipes(name, data_needed=False)[0].model == find_recipes(base, data_needed=False)[0].model
