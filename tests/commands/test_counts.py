"""What commands say of one thing, of no thing, and of steps that were repeated: right words for every count."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from dydit.bundle.bundle import Bundle
from dydit.models.dit.config import DiTConfig

ONE = re.compile(r"(?<![\d.,:-])1 (?:[a-z]+ )?(?!class\b|less\b|this\b)[a-z]+s\b(?! of)")
QUICK = ["--labels", 0, "--cfg-scale", 1, "--threads", 1]


@pytest.fixture(scope="module")
def single(make_checkpoint) -> Any:
    """A model of one block, one head, one class and 16 tokens."""
    return make_checkpoint(
        DiTConfig(hidden_size=64, depth=1, num_heads=1, patch_size=2, input_size=8, in_channels=1, num_classes=1)
    )


def test_the_pattern_finds_what_is_wrong() -> None:
    for text in ("1 subnetworks", "made 1 images in", "all 1 gates", "1 sampling steps", "1 of 1 images"):
        assert ONE.search(text), text
    for text in ("1 subnetwork", "11 images", "0.1 units", "1 of 3 images", "block 0-1 heads", "1 class"):
        assert not ONE.search(text), text


def test_one_of_everything(run, single, tmp_path: Path) -> None:
    bundle, path = tmp_path / "bundle", single.path
    calibrated = ["--held-out", 2, "--batch-size", 1, "--quantile", 0.5, "--threads", 1]
    for arguments in (
        ["export", path, "--out", bundle, "--steps", 1, "--max-batch", 1],
        ["inspect", path],
        ["inspect", bundle],
        ["sample", bundle, "--out", tmp_path / "samples", *QUICK],
        ["parity", bundle, "--against", path, "--out", tmp_path / "parity", *QUICK],
        ["bench", bundle, "--against", path, "--out", tmp_path / "bench", "--repeats", 1, *QUICK],
        ["calibrate", path, "--out", tmp_path / "c.json", "--steps", 1, "--samples", 2, *calibrated],
    ):
        done = run(*arguments)
        assert done.code == 0, done.err
        said = (done.out + done.err).replace(str(tmp_path), "").replace(str(path), "")
        assert not ONE.search(said), ONE.search(said)


def test_repeated_steps_are_told_by_every_command_that_runs_a_bundle(
    run, make_bundle, make_checkpoint, tmp_path: Path
) -> None:
    """4 steps whose tokens never fit: images are right, at twice the cost, which no report keeps to itself."""
    bundle: Bundle = make_bundle(steps=4, max_subnets=2, routing="capacity", capacities=(1, 1, 1))
    say = "ran again at full capacity"
    done = run("sample", bundle.path, "--out", tmp_path / "samples", *QUICK)
    assert f"4 steps of a batch {say}" in done.out
    done = run("sample", bundle.path, "--out", tmp_path / "samples", *QUICK)
    assert f"4 steps of a batch {say}" in done.out, "a run that is complete was no cheaper"
    checkpoint = make_checkpoint().path
    done = run("parity", bundle.path, "--against", checkpoint, "--out", tmp_path / "parity", *QUICK)
    assert done.code == 0 and re.search(rf"\b(\d+) of \1 evaluated steps {say}", done.out)
    done = run("bench", bundle.path, "--out", tmp_path / "bench", "--repeats", 2, *QUICK)
    assert f"{bundle.path.name}: 8 of 8 timed steps {say}" in done.out
