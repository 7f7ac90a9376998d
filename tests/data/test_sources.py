"""Each kind of source, from a handful of files in its real format."""

from __future__ import annotations

import json
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dydit.data.images import Crop, read_pixels
from dydit.data.sources.opened import SourceKind, kind_of, open_source
from dydit.data.sources.source import Choices, Record, Source
from dydit.errors import BackendError, ConfigError


def image(value: int, side: int = 8) -> Image.Image:
    return Image.new("RGB", (side, side), (value, 255 - value, 7))


def save(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image(value).save(path)


def records(source: Source) -> list[Record]:
    return [source.record(index) for index in range(len(source))]


def values(source: Source) -> list[int]:
    """The first byte of each image: what `image` was made from."""
    return [int(read_pixels(each.image, 8, 3, Crop.CENTER)[0, 0, 0]) for each in records(source)]


def opened(path: object, kind: str | None = None, **choices: str) -> Source:
    return open_source(str(path), None if kind is None else SourceKind(kind), Choices(**choices))


def test_folders_are_classes(tmp_path: Path) -> None:
    for number, name in enumerate(("dog/b.png", "dog/a.png", "cat/deep/er/c.PNG", "cat/.hidden.png", ".git/x/y.png")):
        save(tmp_path / name, 10 * number)
    (tmp_path / "dog" / "notes.md").write_text("not an image")
    source = opened(tmp_path)
    assert [each.name for each in records(source)] == ["cat/deep/er/c.PNG", "dog/a.png", "dog/b.png"]
    assert [each.label for each in records(source)] == [0, 1, 1] and source.class_names == ("cat", "dog")
    assert values(source) == [20, 10, 0] and source.size is None and not source.captioned


def test_a_flat_folder_has_no_classes(tmp_path: Path) -> None:
    for value in (3, 1, 2):
        save(tmp_path / "train" / f"{value}.png", value)
    source = opened(tmp_path / "train")
    assert values(source) == [1, 2, 3] and (source.classes, source.class_names) == (1, None)
    assert values(opened(tmp_path, split="train")) == [1, 2, 3]
    with pytest.raises(ConfigError, match="has no folder test"):
        opened(tmp_path, split="test")
    save(tmp_path / "4.png", 4)
    with pytest.raises(ConfigError, match=r"holds images \(4\.png\) beside folders of images \(train\)"):
        opened(tmp_path)


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    save(tmp_path / "elsewhere" / "a.png", 5)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cat").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "up").symlink_to(tmp_path / "data")
    assert [each.name for each in records(opened(tmp_path / "data"))] == ["cat/a.png"]


def test_names_may_be_any_bytes(tmp_path: Path) -> None:
    save(tmp_path / os.fsdecode(b"caf\xe9") / os.fsdecode(b"\xff.png"), 6)
    source = opened(tmp_path)
    assert source.class_names == ("caf\\udce9",) and source.record(0).name == "caf\\udce9/\\udcff.png"
    assert values(source) == [6]


def test_captions_beside_images_and_in_metadata(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        save(tmp_path / f"{name}.png", 1)
    (tmp_path / "a.txt").write_text(" a fox \n\nthe fox\n")
    (tmp_path / "b.txt").write_text("an owl")
    source = opened(tmp_path)
    assert source.captioned and [each.captions for each in records(source)] == [("a fox", "the fox"), ("an owl",), ()]
    lines = [{"file_name": "a.png", "text": "one"}, {"file_name": "c.png", "text": ["two", "three"], "other": "x"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    assert [each.captions for each in records(opened(tmp_path))] == [("one",), (), ("two", "three")]
    assert [each.captions for each in records(opened(tmp_path, caption_column="other"))] == [(), (), ("x",)]
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": 3}\n')
    with pytest.raises(ConfigError, match=r"metadata\.jsonl, line 1, text, is no text"):
        opened(tmp_path)
    (tmp_path / "metadata.jsonl").write_text("[]\n")
    with pytest.raises(ConfigError, match="line 1, is no JSON object with a file_name"):
        opened(tmp_path)


def coco(folder: Path, splits: tuple[str, ...] = ("val2017",)) -> None:
    for split in splits:
        for number in (9, 4):
            save(folder / split / f"{number:012d}.png", number)
        texts = [(3, 9, "an owl. "), (1, 4, "a fox"), (2, 9, "the owl")]
        facts = {
            "images": [{"id": number, "file_name": f"{number:012d}.png"} for number in (9, 4)],
            "annotations": [{"id": a, "image_id": image, "caption": text} for a, image, text in texts],
        }
        (folder / "annotations").mkdir(exist_ok=True)
        (folder / "annotations" / f"captions_{split}.json").write_text(json.dumps(facts))


def test_coco(tmp_path: Path) -> None:
    coco(tmp_path)
    source = opened(tmp_path)
    assert values(source) == [4, 9] and source.captioned and source.classes == 1
    assert [each.captions for each in records(source)] == [("a fox",), ("the owl", "an owl.")]
    coco(tmp_path, ("train2017", "val2017"))
    with pytest.raises(ConfigError, match="has the splits train2017, val2017; give --split"):
        opened(tmp_path)
    assert values(opened(tmp_path, split="train2017")) == [4, 9]
    (tmp_path / "val2017").rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match=r"has no folder val2017 with the images of captions_val2017\.json"):
        opened(tmp_path, split="val2017")
    (tmp_path / "annotations" / "captions_val2017.json").write_text('{"images": [{}], "annotations": []}')
    with pytest.raises(ConfigError, match="cannot be read as COCO captions"):
        opened(tmp_path, split="val2017")


def cifar(folder: Path) -> None:
    folder.mkdir()
    for number in range(6):
        name = "test_batch.bin" if number == 5 else f"data_batch_{number + 1}.bin"
        rows = [
            bytes([(number + row) % 10]) + bytes([10 * number + row] * 1024) + bytes(2048) for row in range(2 + number)
        ]
        (folder / name).write_bytes(b"".join(rows))
    (folder / "batches.meta.txt").write_text("\n".join(f"name{number}" for number in range(10)) + "\n\n")


def test_cifar_10(tmp_path: Path) -> None:
    cifar(tmp_path / "cifar-10-batches-bin")
    for path in (tmp_path, tmp_path / "cifar-10-batches-bin"):
        source = opened(path)
        assert (len(source), source.size, source.classes, source.channels) == (20, 32, 10, 3)
        record = source.record(3)
        assert record.label == 2 and record.image[0, 0].tolist() == [11, 0, 0] and source.class_names[9] == "name9"
    assert len(opened(tmp_path, split="test")) == 7
    with pytest.raises(ConfigError, match="has no split 'val'"):
        opened(tmp_path, split="val")
    (tmp_path / "cifar-10-batches-bin" / "data_batch_2.bin").write_bytes(bytes(100))
    with pytest.raises(ConfigError, match=r"data_batch_2\.bin is damaged"):
        opened(tmp_path)
    (tmp_path / "cifar-10-batches-bin" / "data_batch_2.bin").unlink()
    with pytest.raises(ConfigError, match=r"data_batch_2\.bin is missing"):
        opened(tmp_path)


def test_pickled_cifar_10_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({b"data": np.zeros((1, 3072), np.uint8)}))
    with pytest.raises(ConfigError, match=r"is pickled and could run code; give the binary version"):
        opened(tmp_path)


@pytest.mark.parametrize("save_npz", [np.savez, np.savez_compressed])
def test_npz(tmp_path: Path, save_npz) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
    save_npz(tmp_path / "labelled.npz", images, np.array([0, 3, 1, 1, 0]))
    source = opened(tmp_path / "labelled.npz")
    assert (len(source), source.size, source.channels, source.classes) == (5, 8, 3, 4)
    assert all(np.array_equal(each.image, image) for each, image in zip(records(source), images, strict=True))
    assert [each.label for each in records(source)] == [0, 3, 1, 1, 0]
    save_npz(tmp_path / "grey.npz", np.asfortranarray(images[..., :1]))
    grey = opened(tmp_path / "grey.npz")
    assert (grey.classes, grey.channels) == (1, 1) and np.array_equal(grey.record(2).image, images[2, ..., 0])
    for arrays, words in [
        ((images.astype(np.float32),), r"float32 \[5, 8, 8, 3\] as arr_0"),
        ((images[0],), "as arr_0"),
        ((images, np.zeros(4, np.int64)), r"int64 \[4\] as arr_1; expected labels from 0, whole numbers \[5\]"),
        ((images, np.array([0, -1, 0, 0, 0])), "as arr_1"),
        ((np.array([None]),), r"cannot be read as \.npz"),
    ]:
        save_npz(tmp_path / "other.npz", *arrays)
        with pytest.raises(ConfigError, match=words):
            opened(tmp_path / "other.npz")
    (tmp_path / "torn.npz").write_bytes((tmp_path / "labelled.npz").read_bytes()[:300])
    with pytest.raises(ConfigError, match="cannot be read as"):
        opened(tmp_path / "torn.npz")


def test_what_comes_with_dydit() -> None:
    digits, emoji = opened("digits"), opened("emoji")
    assert (len(digits), digits.size, digits.channels, digits.mirrors) == (1797, 16, 1, False)
    assert (len(emoji), emoji.size, emoji.channels, emoji.mirrors) == (1906, 32, 3, True)
    assert emoji.captioned and len(emoji.record(5).captions) == 1
    assert {emoji.class_names[each] for each in emoji.not_mirrored} == {"Flags", "Symbols"}
    with pytest.raises(ConfigError, match="unknown built-in data 'letters'; known: digits, emoji"):
        opened("letters", "built-in")
    with pytest.raises(ConfigError, match="digits has no splits"):
        opened("digits", split="train")


@pytest.fixture
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed: pip install 'dydit[data]'")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("no_cache")
def test_hugging_face_folders(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "text": datasets.Value("string"),
            "kind": datasets.Value("string"),
        }
    )
    rows = {
        "image": [image(value) for value in (3, 1, 2)],
        "label": [1, 0, 1],
        "text": ["a fox", "", "the owl"],
        "kind": ["z", "y", "z"],
    }
    data = datasets.Dataset.from_dict(rows, features)
    data.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(tmp_path / "split")
    (tmp_path / "parquet" / "data").mkdir(parents=True)
    data.to_parquet(tmp_path / "parquet" / "data" / "train-00000-of-00001.parquet")
    for path, choices in {"saved": {}, "split": {"split": "train"}, "parquet": {}}.items():
        source = opened(tmp_path / path, **choices)
        assert kind_of(str(tmp_path / path)) is SourceKind.HUGGING_FACE
        assert values(source) == [3, 1, 2] and [each.label for each in records(source)] == [1, 0, 1]
        assert source.class_names == ("cat", "dog")
        assert [each.captions for each in records(source)] == [("a fox",), (), ("the owl",)]
    assert values(opened(tmp_path / "split", split="test")) == [1]
    by_text = opened(tmp_path / "saved", label_column="kind", caption_column="kind")
    assert by_text.class_names == ("y", "z") and [each.label for each in records(by_text)] == [1, 0, 1]
    assert by_text.record(0).captions == ("z",)
    for words, path, choices in [
        ("has the splits train, test; give --split", "split", {}),
        ("has no splits; remove --split train", "saved", {"split": "train"}),
        ("has no column 'img', only image, label, text, kind; change --image-column", "saved", {"image_column": "img"}),
    ]:
        with pytest.raises(ConfigError, match=words):
            opened(tmp_path / path, **choices)


@pytest.mark.usefixtures("no_cache")
def test_hugging_face_columns_of_other_kinds(tmp_path: Path) -> None:
    import io

    import datasets

    file = io.BytesIO()
    image(9).save(file, "PNG")
    rows = {"picture": [file.getvalue(), b"broken"], "labels": [4, 0], "captions": [["a", "b "], []]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "bytes")
    source = opened(tmp_path / "bytes")
    assert source.record(0).image == file.getvalue() and (source.classes, source.class_names) == (5, None)
    assert source.record(0).captions == ("a", "b") and source.record(1).captions == ()
    datasets.Dataset.from_dict({**rows, "labels": [0, -1]}).save_to_disk(tmp_path / "unknown")
    with pytest.raises(ConfigError, match=r"has values in labels that are no labels"):
        opened(tmp_path / "unknown")
    datasets.Dataset.from_dict({"x": [1]}).save_to_disk(tmp_path / "numbers")
    with pytest.raises(ConfigError, match="has the columns x; choose one with --image-column"):
        opened(tmp_path / "numbers")
    with pytest.raises(ConfigError, match="nobody/nothing cannot be read by Hugging Face datasets"):
        opened("nobody/nothing")


def test_without_the_package_of_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BackendError, match=r"needs datasets, which is not installed: pip install 'dydit\[data\]'"):
        opened("somebody/something")


def test_what_is_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    for path, words in {"gone": "no such file or folder", "file.txt": "is a file; give", "empty": "no images"}.items():
        with pytest.raises(ConfigError, match=words):
            opened(tmp_path / path)
    with pytest.raises(ConfigError, match="no such file or folder"):
        opened("diggits")
    with pytest.raises(ConfigError, match=r"no annotations/captions_\*\.json"):
        opened(tmp_path / "empty", "coco")
