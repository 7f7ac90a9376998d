"""The commands on a model that texts condition: encode, sample, parity, bench, calibrate, inspect."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dydit.bundle.bundle import Bundle
from dydit.models.config import ModelConfig
from dydit.runtime.text_files import read_texts

PROMPTS = ("--prompt", "a red fox", "--prompt", "the owl in snow")
SMALL = ("--samples", 4, "--held-out", 4, "--batch-size", 1, "--quantile", 0.5)


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint: Callable[..., Any], pixart_config: ModelConfig) -> Path:
    path: Path = make_checkpoint(pixart_config.model_copy(update={"in_channels": 3, "learn_sigma": False})).path
    return path


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    from dydit.cli import main

    path: Path = tmp_path_factory.mktemp("texts") / "bundle"
    assert main(["export", str(checkpoint), "--steps", "4", "--out", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory, bundle: Path, text_encoder: Path) -> Path:
    from dydit.cli import main

    path: Path = tmp_path_factory.mktemp("texts") / "texts.npz"
    words = ["encode", str(bundle), *PROMPTS, "--text-encoder", str(text_encoder), "--out", str(path)]
    assert main(words) == 0
    return path


def test_prompts_and_their_encoded_texts_give_the_same_images(
    run: Any, bundle: Path, texts: Path, text_encoder: Path, tmp_path: Path
) -> None:
    done = run("sample", bundle, "--texts", texts, "--out", tmp_path / "file")
    assert done.code == 0, done.err
    done = run("sample", bundle, *PROMPTS, "--text-encoder", text_encoder, "--out", tmp_path / "prompts")
    assert done.code == 0, done.err
    first, second = ([np.asarray(Image.open(tmp_path / name / f"00000{i}.png")) for i in (0, 1)] for name in NAMES)
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(*first)
    facts = json.loads((tmp_path / "file" / "samples.json").read_text())
    assert facts["settings"]["labels"] == [0, 1] and facts["settings"]["cfg_scale"] == 4.5
    again = run("sample", bundle, "--texts", texts, "--out", tmp_path / "file")
    assert again.code == 0 and "already complete" in again.out


NAMES = ("file", "prompts")


def test_a_run_goes_on_with_its_own_texts_only(
    run: Any, bundle: Path, texts: Path, text_encoder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.npz"
    assert run("encode", bundle, "--prompt", "a fox", "--text-encoder", text_encoder, "--out", other).code == 0
    assert run("sample", bundle, "--texts", texts, "--labels", 0, "--out", tmp_path / "out").code == 0
    done = run("sample", bundle, "--texts", other, "--labels", 0, "--out", tmp_path / "out")
    assert done.code == 2 and "texts" in done.err, done.err


def test_parity_and_bench_run_with_texts_and_without(
    run: Any, bundle: Path, checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    for name, words in {"given": ["--texts", texts], "random": []}.items():
        done = run("parity", bundle, "--against", checkpoint, *words, "--out", tmp_path / f"p-{name}")
        assert done.code == 0, done.out + done.err
    timed = ("--steps-measured", 2, "--repeats", 1, "--against", checkpoint)
    done = run("bench", bundle, *timed, "--texts", texts, "--labels", "0,1", "--out", tmp_path / "b")
    assert done.code == 0, done.out + done.err


def test_calibrated_slots_and_ranges_come_from_texts(run: Any, checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    plan = ("--steps", 4, "--max-subnets", 2)
    done = run("calibrate", checkpoint, *plan, *SMALL, "--out", tmp_path / "none.json")
    assert done.code == 2 and "conditioned by texts" in done.err and not (tmp_path / "none.json").exists()
    ranges = ("--activations", "minmax", "--activation-images", 2)
    done = run("calibrate", checkpoint, *plan, *SMALL, *ranges, "--texts", texts, "--out", tmp_path / "cal.json")
    assert done.code == 0, done.err
    for precision in ("fp32", "int8-static"):
        out = tmp_path / precision
        given = ("--routing", "capacity", "--calibration", tmp_path / "cal.json", "--precision", precision)
        done = run("export", checkpoint, *plan, *given, "--out", out)
        assert done.code == 0, done.err
        assert Bundle.open(out).manifest.model.text is not None
    done = run("sample", tmp_path / "fp32", "--texts", texts, "--out", tmp_path / "images")
    assert done.code == 0 and (tmp_path / "images" / "000001.png").is_file(), done.err


def test_inspect_says_what_it_takes(run: Any, bundle: Path, checkpoint: Path) -> None:
    for path in (bundle, checkpoint):
        done = run("inspect", path)
        assert done.code == 0 and "texts of 12 tokens" in done.out, done.out


def test_an_encoded_file_says_what_it_holds(run: Any, checkpoint: Path, text_encoder: Path, tmp_path: Path) -> None:
    lines = tmp_path / "prompts.txt"
    lines.write_text("a fox\n\nthe owl of the snow in the snow in the snow in the snow\n")
    words = ("--prompts", lines, "--negative-prompt", "green", "--text-encoder", text_encoder)
    done = run("encode", checkpoint, *words, "--out", tmp_path / "t.npz")
    assert done.code == 0 and "2 texts of 12 tokens" in done.out and "the end has no effect: prompt 1" in done.out
    from dydit.checkpoints.checkpoint import load_checkpoint

    texts = read_texts(tmp_path / "t.npz", load_checkpoint(checkpoint).config)
    assert texts.count == 2 and texts.negative and texts.prompts is not None and texts.prompts[0] == "a fox"
    assert run("encode", checkpoint, *words, "--out", tmp_path / "t.npz").code == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "conditioned by texts; give a file of their embeddings (--texts FILE)"),
        (["--labels", "0"], "conditioned by texts"),
        (["--texts", "TEXTS", "--labels", "2,3"], "text 3 is outside 0..2, the texts of this run"),
        (["--texts", "TEXTS", "--prompt", "a"], "--texts cannot be combined with prompts"),
        (["--prompt", "a"], "prompts need --text-encoder FOLDER"),
        (["--text-encoder", "folder"], "--text-encoder has no effect"),
        (["--texts", "absent.npz"], "absent.npz"),
    ],
)
def test_what_does_not_fit_is_one_line(
    run: Any, bundle: Path, texts: Path, words: list[str], message: str, tmp_path: Path
) -> None:
    words = [str(texts) if word == "TEXTS" else word for word in words]
    done = run("sample", bundle, *words, "--out", tmp_path / "out")
    assert done.code == 2 and message in done.err and not (tmp_path / "out").exists(), done.err


def test_texts_for_a_model_of_classes_are_refused(
    run: Any, make_bundle: Any, texts: Path, text_encoder: Path, tmp_path: Path
) -> None:
    classes = make_bundle().path
    done = run("sample", classes, "--texts", texts, "--labels", 0, "--out", tmp_path / "out")
    assert done.code == 2 and "takes class labels, not texts" in done.err
    done = run("encode", classes, "--prompt", "a", "--text-encoder", text_encoder, "--out", tmp_path / "t.npz")
    assert done.code == 2 and "takes class labels, not texts" in done.err
