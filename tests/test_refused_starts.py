"""A command that refuses to start leaves everything as it was, the folders above its output among it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dydit.bundle.bundle import Bundle

STEPS = 2


@pytest.fixture(scope="module")
def exported(make_bundle) -> Bundle:
    return make_bundle(steps=STEPS, plan="sliding")


@pytest.fixture(scope="module")
def static(make_checkpoint, small_config) -> Path:
    return make_checkpoint(small_config.without_routers()).path


def refusals(checkpoint: Path, bundle: Path, static: Path, missing: Path, out: Path) -> dict[str, list[Any]]:
    """Commands with something that they cannot do, some of which show late; `out` is to be written, two levels down."""
    few = ["--steps", STEPS, "--samples", 8, "--held-out", 8, "--quantile", 0.5, "--batch-size", 4]
    return {
        "convert: heads": ["convert", checkpoint, "--num-heads", 3],
        "export: calibration": ["export", checkpoint, "--calibration", missing],
        "export: vae": ["export", checkpoint, "--steps", STEPS, "--vae", missing],
        "export: memory": ["export", checkpoint, "--steps", STEPS, "--memory-budget", "1kB"],
        "sample: label": ["sample", bundle, "--labels", 99],
        "sample: device": ["sample", bundle, "--labels", 1, "--device", "cuda"],
        "sample: noise": ["sample", bundle, "--noise-from", missing],
        "sample: npz": ["sample", bundle, "--labels", 1, "--npz"],
        "sample: engines": ["sample", bundle, "--labels", 1, "--backend", "tensorrt"],
        "sample: latents": ["sample", bundle, "--labels", 1, "--latents-out", checkpoint],
        "parity: checkpoint": ["parity", bundle, "--against", missing],
        "parity: label": ["parity", bundle, "--against", checkpoint, "--labels", 99],
        "bench: label": ["bench", bundle, "--labels", 99],
        "bench: device": ["bench", bundle, "--device", "cuda"],
        "evaluate: samples": ["evaluate", missing, "--inception", missing],
        "evaluate: set": ["evaluate", missing, "--reference", "digits"],
        "inspect": ["inspect", missing],
        "calibrate: static": ["calibrate", static, *few],
        "calibrate: few": ["calibrate", checkpoint, "--steps", STEPS, "--samples", 1],
        "calibrate: device": ["calibrate", checkpoint, *few, "--device", "cuda"],
        "calibrate: reference": [
            *["calibrate", checkpoint, *few, "--activations", "minmax", "--target-fd-ratio", 2],
            *["--reference", missing],
        ],
        "prepare: source": ["prepare", missing, "--size", 8],
        "prepare: size": ["prepare", checkpoint.parent, "--kind", "folder"],
        "prepare: vae": ["prepare", "digits", "--vae", missing],
        "prepare: captions": ["prepare", "digits", "--text-encoder", missing],
        "prepare: text encoder": ["prepare", "emoji", "--text-encoder", missing],
        "train: setting": ["train", "--recipe", "digits", "iterations=none"],
        "quickstart: scale": ["quickstart", "--cfg-scale", -1],
    }


NAMES = list(refusals(*[Path()] * 5))


def everything(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_left(run, make_checkpoint, exported, static, tmp_path: Path, name: str) -> None:
    inputs = (make_checkpoint().path, exported.path, static, tmp_path / "missing")
    words = refusals(*inputs, tmp_path / "a")[name]
    (tmp_path / "empty").mkdir()
    before, bundle = everything(tmp_path), everything(exported.path)
    for out in (tmp_path / "a" / "b" / "out", tmp_path / "empty" / "out"):
        done = run(*words, "--out", out)
        assert done.code == 2 and done.err.count("\n") == 1, done
        assert everything(tmp_path) == before
    assert everything(exported.path) == bundle


def test_a_build_that_refuses_leaves_the_bundle_alone(run, exported, monkeypatch) -> None:
    before = everything(exported.path)
    for words in (["--flavour", "tensorrt"], ["--max-batch", 999], ["--flavour", "tensorrt-rtx", "--max-batch", 999]):
        done = run("build", exported.path, *words)
        assert done.code == 2 and done.err.count("\n") == 1, done
        assert everything(exported.path) == before
