"""`dydit calibrate` and the export that uses its file, as people and scripts run them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from dydit.bundle.bundle import Bundle
from dydit.calibrate.calibration_file import read_calibration
from dydit.runtime.backends.int8_exactness import products_are_exact

STEPS = 6
SMALL = ["--steps", STEPS, "--max-subnets", 2, "--samples", 8, "--held-out", 8, "--batch-size", 2, "--quantile", 0.9]


@pytest.fixture(scope="session")
def checkpoint(make_checkpoint, small_config) -> Path:
    return make_checkpoint(small_config.model_copy(update={"in_channels": 3})).path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_refused(done: Any, *words: str) -> None:
    assert done.code == 2 and done.out == "", done
    assert done.err.startswith("dydit: error: ") and done.err.count("\n") == 1, done.err
    for word in words:
        assert word in done.err, done.err


def test_calibrate_then_export_then_sample(run, checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    done = run("calibrate", checkpoint, "--out", file, *SMALL)
    assert done.code == 0 and done.err == "", done.err
    assert names(tmp_path) == ["c.json", "c.png"], "no work is left"
    first, second, *_, last = done.out.splitlines()
    assert first == f"{file}: token capacities for 2 segments" and second.startswith("On 8 held-out images, ")
    # What is said to come next works as it stands.
    words = last.removeprefix("Next: dydit ").replace("BUNDLE", str(tmp_path / "bundle")).split()
    assert f"export {checkpoint} --steps 6 --max-subnets 2 --routing capacity --calibration {file}" in last
    assert run(*words).code == 0
    found, manifest = read_calibration(file).tokens, Bundle.open(tmp_path / "bundle").manifest
    assert tuple(manifest.subnets[s.subnet].capacities for s in manifest.plan.segments) == found.capacities
    assert run("sample", tmp_path / "bundle", "--labels", "0-1", "--out", tmp_path / "images").code == 0


def test_the_same_call_writes_the_same_file_and_json_says_how_it_does(run, checkpoint: Path, tmp_path: Path) -> None:
    call = ["calibrate", checkpoint, *SMALL, "--cfg-scale", 1, "--cfg-scale", 1.5]
    done = run(*call, "--out", tmp_path / "a.json", "--json")
    assert done.code == 0, done.err
    said = json.loads(done.out)
    found = read_calibration(tmp_path / "a.json")
    assert found.cfg_scales == (1.0, 1.5) and found.tokens.settings.batch_sizes == (2,)
    assert said["held_out"] == found.tokens.held_out.model_dump() and said["segments"] == 2
    assert run(*call, "--out", tmp_path / "b.json", "-q") == (0, "", "")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert run(*call, "--out", tmp_path / "c.json", "--seed", 1).code == 0
    assert (tmp_path / "a.json").read_bytes() != (tmp_path / "c.json").read_bytes()


@pytest.mark.parametrize("plan", [["--per-step"], ["--dynamic-width"], ["--memory-budget", "1GiB"]])
def test_the_plan_of_the_export_is_that_of_the_calibration(run, checkpoint: Path, tmp_path: Path, plan) -> None:
    sampling = ["--samples", 4, "--held-out", 4, "--batch-size", 2, "--quantile", 0.9]
    done = run(
        "calibrate", checkpoint, "--out", tmp_path / "c.json", "--steps", 3, "--sampler", "ddim", *plan, *sampling
    )
    words = done.out.splitlines()[-1].removeprefix("Next: dydit ").replace("BUNDLE", str(tmp_path / "out")).split()
    assert run(*words).code == 0, words
    by_capacity = ["--steps", 3, "--routing", "capacity", "--calibration", tmp_path / "c.json"]
    other = run("export", checkpoint, *by_capacity, *plan, "--out", tmp_path / "other")
    assert_refused(other, "the calibration is for 3 steps of ddim, not 3 steps of ddpm")
    assert names(tmp_path) == ["c.json", "c.png", "out"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--quantile", "2"], ["quantile"]),
        (["--quantile", "0.999", "--batch-size", "1"], ["1000 are needed for each guidance scale"]),
        (["--margin", "-1"], ["margin"]),
        (["--tile", "0"], ["tile"]),
        (["--batch-size", "0"], ["--batch-size must be at least 1, not 0"]),
        (["--batch-size", "9"], ["8 samples at guidance 4 are too few", "9 are needed"]),
        (["--cfg-scale", "nan"], ["--cfg-scale must be a finite number, not nan"]),
        (["--seed", "-1"], ["seed"]),
        (["--per-step"], ["give only one of --per-step"]),
        (["--backend", "tvm"], ["tvm"]),
    ],
)
def test_settings_that_do_not_fit(run, checkpoint: Path, tmp_path: Path, options: list[str], words: list[str]) -> None:
    assert_refused(run("calibrate", checkpoint, "--out", tmp_path / "c.json", *SMALL, *options), *words)
    assert names(tmp_path) == []


def test_a_model_without_token_routers(run, make_checkpoint, small_config, tmp_path: Path) -> None:
    static = make_checkpoint(small_config.without_routers()).path
    assert_refused(run("calibrate", static, "--out", tmp_path / "c.json", *SMALL), str(static), "no token routers")
    assert names(tmp_path) == []


@pytest.mark.parametrize("content", [None, b"", b"no checkpoint\n" * 99])
def test_a_checkpoint_that_is_none(run, tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "model.pt"
    if content is not None:
        file.write_bytes(content)
    assert_refused(run("calibrate", file, "--out", tmp_path / "c.json", *SMALL), str(file))
    assert names(tmp_path) == ([] if content is None else ["model.pt"])


def test_progress_goes_to_a_terminal_and_a_stopped_run_goes_on(
    run, checkpoint: Path, tmp_path: Path, monkeypatch
) -> None:
    from dydit.runtime.loop import StepRunner

    call, steps = ["calibrate", checkpoint, *SMALL, "--out", tmp_path / "c.json"], []
    plain = StepRunner.run

    def stopping(self, step, *arguments):
        steps.append(step)
        if len(steps) == STEPS + 2:
            raise KeyboardInterrupt
        return plain(self, step, *arguments)

    monkeypatch.setattr(StepRunner, "run", stopping)
    assert run(*call) == (130, "", "dydit: error: interrupted; run the same command again to resume\n")
    (work,) = tmp_path.iterdir()
    assert work.name.startswith(".c.json.") and (work / "0-0.npz").is_file()
    steps.clear()
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    done = run(*call)
    assert done.code == 0 and re.search(rf"\rcalibrate: 100 %\|█+\| {2 * STEPS}/{2 * STEPS} ", done.err)
    assert steps == list(range(STEPS)), "the batch that was finished is not sampled again"
    assert names(tmp_path) == ["c.json", "c.png"]


def test_outputs_that_are_there_or_meet(run, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "c.png").write_text("mine")
    assert_refused(run("calibrate", checkpoint, "--out", tmp_path / "c.json", *SMALL), "c.png exists already")
    assert_refused(
        run("calibrate", checkpoint, "--out", tmp_path / "d.png", *SMALL), "d.png: the plot would have the same name"
    )
    (tmp_path / "e.json").write_text("mine")
    assert_refused(run("calibrate", checkpoint, "--out", tmp_path / "e.json", *SMALL), "e.json exists already")
    assert names(tmp_path) == ["c.png", "e.json"] and (tmp_path / "e.json").read_text() == "mine"


@pytest.mark.parametrize(("content", "words"), [(None, "does not exist"), ("{}", "schema version"), ("x", "not JSON")])
def test_a_calibration_that_is_none(run, checkpoint: Path, tmp_path: Path, content: str | None, words: str) -> None:
    file = tmp_path / "c.json"
    if content is not None:
        file.write_text(content)
    call = ["export", checkpoint, "--routing", "capacity", "--calibration", file, "--out", tmp_path / "out"]
    assert_refused(run(*call), str(file), words)
    assert not (tmp_path / "out").exists()


def test_a_plan_by_measured_times_does_not_repeat(run, checkpoint: Path, tmp_path: Path) -> None:
    run("calibrate", checkpoint, "--out", tmp_path / "c.json", *SMALL)
    call = ["export", checkpoint, "--steps", STEPS, "--routing", "capacity", "--calibration", tmp_path / "c.json"]
    assert_refused(
        run(*call, "--cost", "measured", "--out", tmp_path / "out"),
        "cannot be combined with --cost measured",
    )


@pytest.mark.parametrize(
    "method", ["minmax", "entropy", *(pytest.param(each, marks=pytest.mark.release) for each in ("percentile", "mse"))]
)
def test_ranges_of_activations_then_8_bits(run, checkpoint: Path, tmp_path: Path, method: str) -> None:
    file, bundle = tmp_path / "c.json", tmp_path / "bundle"
    watch = ["--activations", method, "--activation-images", 4, "--percentile", 0.99]
    done = run("calibrate", checkpoint, "--out", file, *SMALL, *watch)
    assert done.code == 0 and done.err == "", done.err
    ranges = read_calibration(file).activations
    assert ranges is not None and (ranges.method, ranges.images, len(ranges.thresholds)) == (method, 4, 2)
    again = tmp_path / "again.json"
    run("calibrate", checkpoint, "--out", again, *SMALL, *watch)
    assert again.read_bytes() == file.read_bytes()
    assert "--precision int8-static --routing capacity" in done.out.splitlines()[-1]
    plan = ["--steps", STEPS, "--max-subnets", 2]
    done = run("export", checkpoint, *plan, "--precision", "fp8", "--calibration", file, "--out", bundle)
    assert done.code == 0, done.err
    weights = Bundle.open(bundle).manifest.weights
    assert weights["blocks.0.fc1.weight"].dtype == "float8_e4m3fn" and "blocks.0.fc1.scale" in weights
    done = run("sample", bundle, "--labels", "1,2", "--out", tmp_path / "samples")
    assert done.code == 0, done.err


def test_smoothed_ranges_then_8_bits(run, checkpoint: Path, tmp_path: Path) -> None:
    file, bundle, plan = tmp_path / "c.json", tmp_path / "bundle", ["--steps", STEPS, "--max-subnets", 2]
    watch = ["--activations", "minmax", "--activation-images", 4, "--smooth"]
    done = run("calibrate", checkpoint, "--out", file, *SMALL, *watch)
    assert done.code == 0 and done.err == "", done.err
    ranges = read_calibration(file).activations
    assert ranges is not None and ranges.smoothing is not None
    line = next(line for line in done.out.splitlines() if "smoothing lowers" in line)
    words = f"smoothing lowers the error in {ranges.smoothing.layers} of 12 layers; on the observed activations, the "
    assert line.startswith(f"{file}: {words}squared error of their int8 matrix products falls by ")
    again = run("calibrate", checkpoint, "--out", tmp_path / "again.json", *SMALL, *watch, "--json")
    assert (tmp_path / "again.json").read_bytes() == file.read_bytes()
    said = json.loads(again.out)["migration"]
    assert (said["layers"], said["migrated"]) == (12, ranges.smoothing.layers)
    assert 0.05 <= said["error_falls_by"]["median"] <= said["error_falls_by"]["most"] < 1
    done = run("export", checkpoint, *plan, "--precision", "int8-static", "--calibration", file, "--out", bundle)
    assert done.code == 0, done.err
    assert Bundle.open(bundle).manifest.smoothing == ranges.smoothing
    if products_are_exact(onnxruntime):  # else the backend refuses it: this CPU has no VNNI
        assert run("sample", bundle, "--labels", "1,2", "--out", tmp_path / "samples").code == 0
    capacity = ["--routing", "capacity", "--calibration", file, "--out", tmp_path / "fp32"]
    assert run("export", checkpoint, *plan, *capacity).code == 0
    assert Bundle.open(tmp_path / "fp32").manifest.smoothing is None, "that of 8 bits alone"


def test_a_smoothing_without_ranges(run, checkpoint: Path, tmp_path: Path) -> None:
    done = run("calibrate", checkpoint, "--out", tmp_path / "c.json", *SMALL, "--smooth")
    assert_refused(done, "--smooth needs activation ranges; add --activations minmax")
    assert names(tmp_path) == []


def test_8_bits_without_their_ranges(run, checkpoint: Path, tmp_path: Path) -> None:
    file, plan = tmp_path / "c.json", ["--steps", STEPS, "--max-subnets", 2]
    assert run("calibrate", checkpoint, "--out", file, *SMALL).code == 0
    kept = names(tmp_path)
    export = ["export", checkpoint, *plan, "--precision", "int8-static", "--out", tmp_path / "bundle"]
    assert_refused(run(*export), "int8-static needs a calibration, of `dydit calibrate --activations minmax`")
    assert_refused(run(*export, "--calibration", file), "the calibration has no ranges of activations")
    assert names(tmp_path) == kept
