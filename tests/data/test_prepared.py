"""What `dydit prepare` stores is what training reads, in any split of the batch; damage is one line."""

from __future__ import annotations

import itertools
import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file, save_file

from dydit.commands.progress import Progress
from dydit.data.dataset import EncodedCaptions, Examples
from dydit.data.dataset_folder import check_files, read_info
from dydit.data.opened import Unlabelled, data_for, open_data
from dydit.data.prepare import prepare
from dydit.data.prepare_settings import PrepareSettings
from dydit.data.prepared import PreparedData
from dydit.data.shard_writer import ShardWriter, shard_bytes
from dydit.diffusion.process import Process
from dydit.errors import ConfigError
from dydit.models.config import ModelConfig, Space
from dydit.training.draws import Batch, BatchSource

COUNT, TOKENS, SCALE = 13, 12, 0.18215
TEXTS = ("a fox", "the owl in the snow", "red", "a photo of a red fox in the green snow")


def generators(indices: Any, seed: int = 0) -> list[np.random.Generator]:
    return [np.random.default_rng([seed, int(each)]) for each in indices]


def captions_of(number: int) -> list[str]:
    return [TEXTS[(number + at) % 4] for at in range(1 + number % 3)]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random images of 16x16 in three classes, with one to three captions."""
    folder: Path = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(7)
    for number in range(COUNT):
        path = folder / f"c{number % 3}" / f"{number:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(path)
        path.with_suffix(".txt").write_text("\n".join(captions_of(number)))
    return folder


def prepared(images: Path, out: Path, **changes: Any) -> PreparedData:
    values = {"source": str(images), "size": 16, "shard_size": 5, "batch_size": 3, **changes}
    prepare(PrepareSettings.model_validate(values), out, 1, Progress())
    return PreparedData(out)


@pytest.fixture(scope="module")
def pixels(images: Path, tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return prepared(images, tmp_path_factory.mktemp("pixels") / "data")


@pytest.fixture(scope="module")
def latents(
    images: Path, tmp_path_factory: pytest.TempPathFactory, autoencoder: Any, text_encoder: Path
) -> PreparedData:
    models = {"vae": str(autoencoder.folder), "text_encoder": str(text_encoder), "text_tokens": TOKENS}
    return prepared(images, tmp_path_factory.mktemp("latents") / "data", **models)


def original(images: Path) -> list[np.ndarray]:
    """Pixels uint8 [3, 16, 16] in the order of the source: by class, then by name."""
    return [np.asarray(Image.open(path)).transpose(2, 0, 1) for path in sorted(images.glob("*/*.png"))]


def equal(one: Examples, other: Examples) -> bool:
    both = [(one.images, other.images), (one.labels, other.labels)]
    if one.captions is not None and other.captions is not None:
        both += [(one.captions.embeddings, other.captions.embeddings), (one.captions.mask, other.captions.mask)]
    return all(np.array_equal(*pair) for pair in both) and (one.captions is None) == (other.captions is None)


def joined(parts: list[Examples]) -> Examples:
    captions = None
    if parts[0].captions is not None:
        embeddings = np.concatenate([each.captions.embeddings for each in parts if each.captions is not None])
        captions = EncodedCaptions(embeddings, np.concatenate([each.captions.mask for each in parts if each.captions]))
    images, labels = (np.concatenate([getattr(each, name) for each in parts]) for name in ("images", "labels"))
    return Examples(images, labels, captions)


def test_pixels_are_those_of_the_images(images: Path, pixels: PreparedData) -> None:
    assert (len(pixels), pixels.shape, pixels.space, pixels.classes) == (COUNT, (3, 16, 16), Space.PIXELS, 3)
    assert pixels.class_names == ("c0", "c1", "c2") and pixels.text is None and len(pixels.info.shards) == 3
    everything = np.arange(COUNT)
    examples = pixels.batch(everything, generators(everything))
    mirrored = [each.random() < 0.5 for each in generators(everything)]
    assert any(mirrored) and not all(mirrored)
    for found, image, turned in zip(examples.images, original(images), mirrored, strict=True):
        wanted = image.astype(np.float32) / np.float32(127.5) - 1
        assert np.array_equal(found, wanted[..., ::-1] if turned else wanted)
    assert examples.labels.tolist() == [0] * 5 + [1] * 4 + [2] * 4 and examples.images.dtype == np.float32


def test_without_mirroring(images: Path, tmp_path: Path) -> None:
    data = prepared(images, tmp_path / "data", mirror=False)
    examples = data.batch(np.arange(COUNT), generators(range(COUNT)))
    assert np.array_equal(examples.images, np.stack(original(images)).astype(np.float32) / np.float32(127.5) - 1)


def test_classes_that_are_not_mirrored_are_not(tmp_path: Path) -> None:
    data = prepared(Path("emoji"), tmp_path / "data", size=None, shard_size=1000)
    ours, theirs = (each.batch(np.arange(1906), generators(range(1906))) for each in (data, open_data("emoji")))
    assert np.array_equal(ours.images, theirs.images) and np.array_equal(ours.labels, theirs.labels)


def test_latents_are_drawn_from_the_moments_of_the_autoencoder(
    images: Path, latents: PreparedData, autoencoder: Any
) -> None:
    import torch

    assert (latents.shape, latents.space) == ((4, 8, 8), Space.LATENTS)
    everything = np.arange(COUNT)
    found = latents.batch(everything, generators(everything)).images
    turned = []
    for index, image in enumerate(original(images)):
        (generator,) = generators([index])
        turned.append(generator.random() < 0.5)
        form = image[:, :, ::-1] if turned[-1] else image
        with torch.no_grad():
            pixels = torch.from_numpy(form.astype(np.float32) / 127.5 - 1)[None]
            drawn = autoencoder.module.encode(pixels).latent_dist
        generator.integers(len(captions_of(sorted(range(COUNT), key=lambda number: (number % 3, number))[index])))
        noise = generator.standard_normal((4, 8, 8), np.float32)
        wanted = SCALE * (drawn.mean[0].numpy() + drawn.std[0].numpy() * noise)
        np.testing.assert_allclose(found[index], wanted, rtol=2e-3, atol=2e-3)
    assert any(turned) and not all(turned) and found.std() > 0.01


def test_captions_are_what_the_text_encoder_gives(latents: PreparedData, text_encoder: Path) -> None:
    from dydit.runtime.prompts import TextEncoder

    rows, _ = TextEncoder(text_encoder).embed(TEXTS, TOKENS)
    order = sorted(range(COUNT), key=lambda number: (number % 3, number))
    chosen = set()
    for seed in range(6):
        captions = latents.batch(np.arange(COUNT), generators(range(COUNT), seed)).captions
        assert captions is not None and captions.embeddings.shape == (COUNT, TOKENS, 16)
        assert captions.embeddings.dtype == np.float32 and captions.mask.dtype == bool
        for index, number in enumerate(order):
            (generator,) = generators([index], seed)
            generator.random()
            mine = captions_of(number)
            at = int(generator.integers(len(mine)))
            chosen.add((number, at))
            wanted = rows[TEXTS.index(mine[at])]
            assert captions.mask[index].tolist() == [place < len(wanted) for place in range(TOKENS)]
            np.testing.assert_allclose(captions.embeddings[index][: len(wanted)], wanted, rtol=1e-3, atol=1e-3)
            assert (captions.embeddings[index][len(wanted) :] == 0).all()
    assert len(chosen) > COUNT, "images with several captions are read with each of them"
    empty = latents.no_caption()
    (wanted,), _ = TextEncoder(text_encoder).embed([""], TOKENS)
    assert empty.mask[0].tolist() == [True] + [False] * (TOKENS - 1)
    np.testing.assert_allclose(empty.embeddings[0, :1], wanted, rtol=1e-3, atol=1e-3)


@settings(max_examples=40)
@given(st.lists(st.integers(0, COUNT - 1), min_size=1, max_size=12), st.data(), st.integers(0, 99))
def test_any_split_of_a_batch_gives_the_same_examples(
    pixels: PreparedData, latents: PreparedData, indices: list[int], data: st.DataObject, seed: int
) -> None:
    cuts = sorted({0, len(indices), *data.draw(st.sets(st.integers(0, len(indices)), max_size=4))})
    for each in (pixels, latents):
        whole = each.batch(np.array(indices), generators(range(len(indices)), seed))
        parts = [
            each.batch(np.array(indices[a:b]), generators(range(len(indices)), seed)[a:b])
            for a, b in itertools.pairwise(cuts)
        ]
        assert equal(whole, joined(parts))


@settings(max_examples=30)
@given(st.lists(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=3), min_size=1, max_size=9))
def test_unpadded_captions_are_read_as_they_were_encoded(tmp_path_factory: Any, captions: list[list[str]]) -> None:
    """Each caption has a row of its own letter, as often as the letter's place in the alphabet."""

    class Letters:
        def encode(self, texts: list[str], progress: Any = None) -> tuple[list[np.ndarray], int]:
            return [np.full((ord(each) - 96, 2), ord(each), np.float16) for each in texts], 0

    writer = ShardWriter(None, mirrored=False, batch_size=4)
    for each in captions:
        writer.add(np.zeros((1, 2, 2), np.uint8), 0, tuple(each))
    tensors, _ = writer.contents(Letters(), lambda done, total: None)  # type: ignore[arg-type]
    assert len(tensors["tokens"]) == len({text for each in captions for text in each}) + 1, "each is stored once"
    folder = tmp_path_factory.mktemp("letters")
    write_folder(folder, tensors, len(captions))
    data = PreparedData(folder)
    seen: list[set[str]] = [set() for _ in captions]
    for seed in range(24):
        found = data.batch(np.arange(len(captions)), generators(range(len(captions)), seed)).captions
        assert found is not None
        for index, (embeddings, mask) in enumerate(zip(found.embeddings, found.mask, strict=True)):
            letter = chr(int(embeddings[0, 0]))
            count = ord(letter) - 96
            assert (embeddings[:count] == ord(letter)).all() and (embeddings[count:] == 0).all()
            assert mask.tolist() == [True] * count + [False] * (6 - count)
            seen[index].add(letter)
    assert seen == [set(each) for each in captions]


def write_folder(folder: Path, tensors: dict[str, np.ndarray], count: int) -> None:
    """A folder of one shard of grey 2x2 images with captions of up to six tokens of two channels."""
    files = {"shard-00000.safetensors": tensors, "no_caption.safetensors": {"embeddings": np.ones((1, 2), np.float16)}}
    stored = []
    for name, content in files.items():
        data = shard_bytes(content)
        (folder / name).write_bytes(data)
        stored.append({"file": name, "images": count, "bytes": len(data), "sha256": "0" * 64})
    captions = {"encoder": "letters", "tokens": 6, "channels": 2, "no_caption": {**stored[1], "images": 0}}
    facts = {"space": "pixels", "shape": [1, 2, 2], "classes": 1, "mirrored": False, "source": "letters"}
    (folder / "dataset.json").write_text(json.dumps({**facts, "captions": captions, "shards": stored[:1]}))


def test_batches_of_several_processes_are_one_and_drop_captions(latents: PreparedData) -> None:
    def batch(process: int, processes: int) -> Batch:
        return BatchSource(latents, 5, 16, 0.5, 3, Process(), process, processes).batch(2)

    whole, parts = batch(0, 1), [batch(process, 4) for process in range(4)]
    assert whole.captions is not None
    for name in ("x0", "labels", "times", "noise"):
        assert np.array_equal(getattr(whole, name), np.concatenate([getattr(each, name) for each in parts]))
    embeddings = [each.captions.embeddings for each in parts if each.captions is not None]
    assert np.array_equal(whole.captions.embeddings, np.concatenate(embeddings))
    dropped, empty = whole.labels == 3, latents.no_caption()
    assert 0 < dropped.sum() < 16
    assert (whole.captions.embeddings[dropped] == empty.embeddings).all()
    assert (whole.captions.mask[dropped] == empty.mask).all()
    assert (whole.captions.mask[~dropped].sum(1) > 1).all()


def test_data_go_to_other_processes(latents: PreparedData) -> None:
    latents.batch(np.array([1]), generators([1]))
    again = pickle.loads(pickle.dumps(latents))
    assert equal(*(each.batch(np.array([2, 12]), generators([2, 12])) for each in (latents, again)))


@pytest.fixture
def copy(latents: PreparedData, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    shutil.copytree(latents.folder, folder)
    return folder


def changed(folder: Path, name: str, **tensors: np.ndarray | None) -> None:
    """Write a shard again with other tensors, and its size into dataset.json, as if it belonged there."""
    contents = {**load_file(folder / name), **tensors}
    save_file({key: each for key, each in contents.items() if each is not None}, folder / name)
    info = json.loads((folder / "dataset.json").read_text())
    for stored in (*info["shards"], info["captions"]["no_caption"]):
        stored["bytes"] = (folder / stored["file"]).stat().st_size
    (folder / "dataset.json").write_text(json.dumps(info))


def test_damage_is_one_line(copy: Path) -> None:
    shard = copy / "shard-00001.safetensors"
    data = shard.read_bytes()
    check_files(copy, read_info(copy))
    shard.write_bytes(data[:-3])
    with pytest.raises(
        ConfigError, match=r"shard-00001\.safetensors has [\d,]+ bytes; expected [\d,]+: it was changed"
    ):
        PreparedData(copy)
    shard.unlink()
    with pytest.raises(
        ConfigError, match=r"shard-00001\.safetensors is missing; remove .* and run dydit prepare again"
    ):
        PreparedData(copy)
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    PreparedData(copy)
    with pytest.raises(ConfigError, match=r"shard-00001\.safetensors was changed: its SHA-256 differs"):
        check_files(copy, read_info(copy))
    shard.write_bytes(b"\xff" * len(data))
    with pytest.raises(ConfigError, match=r"shard-00001\.safetensors cannot be read as safetensors"):
        PreparedData(copy)
    (copy / "dataset.json").write_text('{"format": 2}')
    with pytest.raises(ConfigError, match=r"dataset\.json: .*format must be 1"):
        PreparedData(copy)
    (copy / "dataset.json").unlink()
    with pytest.raises(ConfigError, match=r"holds no prepared data \(dataset\.json is missing\)"):
        open_data(str(copy))


def headers() -> Iterator[tuple[str, dict[str, np.ndarray | None], str]]:
    name = "shard-00000.safetensors"
    yield name, {"moments": None}, "has no moments"
    yield name, {"moments": np.zeros((5, 1, 8, 8, 8), np.float16)}, r"has moments of F16 \[5, 1, 8, 8, 8\]; expected"
    yield name, {"labels": np.zeros(5, np.int32)}, r"has labels of I32 \[5\]; expected I64 \[5\]"
    yield name, {"labels": np.full(5, 3)}, r"has labels outside of 0\.\.2"
    yield name, {"captions": np.array([0, 1, 2, 3, 4, 99])}, "has captions that contradict each other"
    yield name, {"captions": np.zeros(6, np.int64)}, "has captions that contradict each other"
    yield name, {"tokens": np.array([0, 99])}, "has captions that contradict each other"
    yield name, {"numbers": np.zeros((1, 1), np.int64)}, "has numbers of I64"
    yield name, {"embeddings": np.zeros((3, 16), np.float16)}, r"has embeddings of F16 \[3, 16\]; expected F16"
    yield "no_caption.safetensors", {"embeddings": np.zeros((1, 15), np.float16)}, r"expected float16 \[tokens, 16\]"
    yield "no_caption.safetensors", {"embeddings": None, "x": np.zeros(1)}, "has no embeddings"


@pytest.mark.parametrize(("name", "tensors", "words"), list(headers()))
def test_a_changed_header_is_one_line(copy: Path, name: str, tensors: dict[str, Any], words: str) -> None:
    changed(copy, name, **tensors)
    with pytest.raises(ConfigError, match=words) as caught:
        PreparedData(copy)
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_data_are_checked_against_the_model(
    pixels: PreparedData, latents: PreparedData, static_config: ModelConfig, pixart_config: ModelConfig
) -> None:
    one, other = str(pixels.folder), str(latents.folder)
    classes = static_config.model_copy(update={"in_channels": 3, "num_classes": 3})
    assert isinstance(data_for(one, classes), PreparedData)
    unconditional = classes.model_copy(update={"num_classes": 1, "null_class_row": False})
    assert isinstance(data_for(one, unconditional), Unlabelled)
    with pytest.raises(ConfigError, match="3 classes, but the model has 2"):
        data_for(one, classes.model_copy(update={"num_classes": 2}))
    of_latents = static_config.model_copy(update={"in_channels": 4, "input_size": 8, "num_classes": 5})
    data = data_for(other, of_latents)
    assert data.text is None and data.batch(np.array([3]), generators([3])).captions is None

    padded = data_for(other, pixart_config.model_copy(update={"text_tokens": 20}))
    few, many = (each.batch(np.arange(5), generators(range(5))).captions for each in (latents, padded))
    assert few is not None and many is not None and many.embeddings.shape == (5, 20, 16)
    assert np.array_equal(many.embeddings[:, :TOKENS], few.embeddings) and not many.mask[:, TOKENS:].any()
    assert padded.no_caption().mask.shape == (1, 20)
    with pytest.raises(
        ConfigError, match="captions of up to 12 tokens, but the model takes 11; prepare it with --text-t"
    ):
        data_for(other, pixart_config.model_copy(update={"text_tokens": 11}))
    with pytest.raises(ConfigError, match="captions of 16 channels, but the model takes 17"):
        data_for(other, pixart_config.model_copy(update={"caption_channels": 17}))
    with pytest.raises(ConfigError, match="has no encoded captions, but texts condition the model"):
        data_for(one, pixart_config.model_copy(update={"in_channels": 3, "input_size": 16}))
