"""`dydit calibrate` with a target, and the bundle that is exported with what it found."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dydit.bundle.bundle import Bundle
from dydit.calibrate.calibration_file import read_calibration
from tests.fixtures.cpu import require_exact_int8

STEPS = 6
SMALL = ["--steps", STEPS, "--max-subnets", 2, "--samples", 4, "--held-out", 4, "--batch-size", 2, "--quantile", 0.9]
RANGES = ["--activations", "minmax", "--activation-images", 4]
SEARCH = [*RANGES, "--search-images", 3, "--search-steps", 1]


@pytest.fixture(scope="session")
def checkpoint(make_checkpoint) -> Path:
    return make_checkpoint().path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_refused(done: Any, *words: str) -> None:
    assert done.code == 2 and done.out == "", done
    assert done.err.startswith("dydit: error: ") and done.err.count("\n") == 1, done.err
    for word in words:
        assert word in done.err, done.err


@pytest.mark.parametrize(
    ("precision", "more"),
    [
        ("int8-static", ["--smooth"]),
        pytest.param("fp8", [], marks=pytest.mark.release),
        pytest.param("int8-static", [], marks=pytest.mark.release),
    ],
)
def test_a_target_then_a_bundle_of_8_and_16_bits(
    run, checkpoint: Path, tmp_path: Path, precision: str, more: list[str]
) -> None:
    if precision == "int8-static":
        require_exact_int8()
    file, bundle = tmp_path / "c.json", tmp_path / "bundle"
    call = ["calibrate", checkpoint, *SMALL, *SEARCH, "--precision", precision, *more]
    done = run(*call, "--target-psnr", 1, "--out", tmp_path / "low.json", "--json")
    assert done.code == 0
    said = r"The search for layers takes at most about .* They are at most \d+ runs of .*\n"
    assert re.fullmatch(said, done.err), done.err
    curve = json.loads(done.out)["sensitivity"]["curve"]
    target = round((curve[0]["quality"]["psnr_least"] + curve[-1]["quality"]["psnr_least"]) / 2, 3)
    done = run(*call, "--target-psnr", target, "--out", file)
    assert done.code == 0 and done.err.count("\n") == 1, "its estimate, before it starts"
    assert names(tmp_path) == ["c-search.png", "c.json", "c.png", "low-search.png", "low.json", "low.png"]
    found = read_calibration(file)
    assert found.activations is not None and found.sensitivity is not None
    stay = int(found.activations.fp16_layers.sum())
    assert 0 < stay < found.sensitivity.layers and found.sensitivity.chosen.quality.psnr_least >= target
    words = f"{precision}, target at least {target:g} dB: {stay} of {found.sensitivity.layers} linear layers stay"
    assert words in done.out
    assert ("MISSES the target" in done.out) == (not found.sensitivity.held_out_holds)
    assert run(*call, "--target-psnr", target, "--out", tmp_path / "again.json", "-q") == (0, "", "")
    assert (tmp_path / "again.json").read_bytes() == file.read_bytes()
    # What is said to come next works as it stands, without capacities too.
    words = done.out.splitlines()[-1].removeprefix("Next: dydit ").replace("BUNDLE", str(bundle)).split()
    assert words[words.index("--precision") + 1] == precision
    assert run(*words).code == 0
    manifest = Bundle.open(bundle).manifest
    kept = [manifest.subnets[segment.subnet].fp16_layers or () for segment in manifest.plan.segments]
    assert sum(len(block) for each in kept for block in each) == stay
    assert f"{precision}, of {found.sensitivity.layers} linear layers {stay} in 16 bits" in run("inspect", bundle).out
    assert json.loads(run("inspect", bundle, "--json").out)["layers_in_16_bits"] == stay
    forms = {name for name, entry in manifest.weights.items() if name.endswith("weight16")}
    assert forms and all(manifest.weights[name].dtype == "float16" for name in forms)
    assert run("sample", bundle, "--labels", "0-2", "--out", tmp_path / "images").code == 0
    parity = run("parity", bundle, "--against", checkpoint, "--out", tmp_path / "parity", "--cfg-scale", 1.5)
    assert "weights" in parity.out and "all " in parity.out, "every stored copy is the checkpoint's"
    other = {"int8-static": "fp8", "fp8": "int8-static"}[precision]
    words[words.index("--precision") + 1], words[-1] = other, str(tmp_path / "other")
    assert_refused(run(*words), f"searched for {precision}, not for {other}", f"--precision {other}")


def test_a_ratio_of_frechet_distances(run, checkpoint: Path, tmp_path: Path) -> None:
    reference, file = tmp_path / "reference.npz", tmp_path / "c.json"
    np.savez(reference, latents=np.random.default_rng(0).normal(0, 1, (70, 4, 8, 8)).astype(np.float32))
    call = ["calibrate", checkpoint, *SMALL, *SEARCH, "--search-images", 64, "--reference", reference, "--out", file]
    done = run(*call, "--target-fd-ratio", 1.5)
    assert done.code == 0 and done.err.startswith("The search for layers takes ") and done.err.count("\n") == 1, (
        done.err
    )
    found = read_calibration(file).sensitivity
    assert found is not None and found.target_fd_ratio == 1.5
    assert found.chosen.quality.fd_ratio is not None and found.chosen.quality.fd_ratio <= 1.5
    assert "at most 1.5 times the Fréchet distance" in done.out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--target-psnr", 30], ["--activations minmax"]),
        ([*SEARCH, "--target-psnr", 30, "--target-fd-ratio", 1.1], ["give only one of --target-psnr and"]),
        ([*SEARCH, "--target-fd-ratio", 1.1], ["--reference FILE.npz"]),
        ([*SEARCH, "--target-fd-ratio", 1.1, "--reference", "x.npz"], ["--search-images 64"]),
        ([*SEARCH, "--target-fd-ratio", 0.5, "--reference", "x.npz"], ["--target-fd-ratio"]),
        ([*SEARCH, "--target-fd-ratio", 1.1, "--search-images", 64, "--reference", "x.npz"], ["x.npz does not exist"]),
        ([*SEARCH, "--reference", "x.npz"], ["--reference needs --target-psnr"]),
        ([*SEARCH, "--target-psnr", 0], ["psnr"]),
        ([*SEARCH, "--target-psnr", "nan"], ["psnr"]),
        ([*SEARCH, "--target-psnr", 30, "--precision", "fp16"], ["--precision"]),
        ([*SEARCH, "--target-psnr", 30, "--search-images", 0], ["--search-images"]),
    ],
)
def test_targets_that_are_none(run, checkpoint: Path, tmp_path: Path, options: list[object], words: list[str]) -> None:
    assert_refused(run("calibrate", checkpoint, "--out", tmp_path / "c.json", *SMALL, *options), *words)
    assert names(tmp_path) == [], "nothing is sampled first"


def test_dynamic_width_has_no_8_bits(run, checkpoint: Path, tmp_path: Path) -> None:
    call = ["calibrate", checkpoint, "--out", tmp_path / "c.json", *SEARCH, "--target-psnr", 30, "--dynamic-width"]
    sampling = ["--steps", STEPS, "--samples", 4, "--held-out", 4, "--batch-size", 2, "--quantile", 0.9]
    assert_refused(run(*call, *sampling), "a plan of dynamic width has no layers in 8 bits")
    assert names(tmp_path) == []


def test_a_target_that_16_bits_miss(run, checkpoint: Path, tmp_path: Path) -> None:
    call = ["calibrate", checkpoint, "--out", tmp_path / "c.json", *SMALL, *SEARCH]
    refused = "no choice of layers reaches 199 dB: with every layer in 16 bits the worst"
    assert_refused(run(*call, "--target-psnr", 199, "-q"), refused)
    done = run(*call, "--target-psnr", 199)
    estimate, error = done.err.splitlines()
    assert estimate.startswith("The search for layers takes at most about ") and error.startswith("dydit: error: ")
    assert refused in error
    (work,) = tmp_path.iterdir()
    assert work.name.startswith(".c.json."), "what was measured is kept for another target"
    assert run(*call, "--target-psnr", 1).code == 0
    assert names(tmp_path) == ["c-search.png", "c.json", "c.png"]


def test_a_picture_that_is_there(run, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "c-search.png").write_text("mine")
    call = ["calibrate", checkpoint, "--out", tmp_path / "c.json", *SMALL, *SEARCH, "--target-psnr", 30]
    assert_refused(run(*call), "c-search.png exists already")
    assert names(tmp_path) == ["c-search.png"]
