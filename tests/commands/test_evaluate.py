"""`dydit evaluate`: the figures on the terminal and in files, a run's own samples, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import dydit
from dydit.data.small_sets import Digits
from dydit.runtime.images.image_files import to_rgb, to_uint8

DIGITS = Path(dydit.__file__).parent / "assets" / "digits" / "dydit.safetensors"


@pytest.fixture(scope="module")
def digits_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 200 real digits, as `dydit sample --npz` would write them."""
    data, path = Digits(), tmp_path_factory.mktemp("digits") / "samples.npz"
    np.savez(path, to_rgb(to_uint8(data.images[:200])), data.labels[:200])
    return path


def test_figures_and_files(run, samples_file: Path, inception_file: Path, tmp_path: Path) -> None:
    report, reference = tmp_path / "report" / "report.json", tmp_path / "reference.npz"
    few = ["--inception", inception_file, "--batch-size", 4]
    done = run("evaluate", samples_file, *few, "--metrics", "is", "--out", report, "--write-reference", reference)
    assert done.code == 0 and done.err == ""
    value = json.loads(report.read_text())["metrics"]["is"]
    assert done.out == f"is  {value:.4f}\n{samples_file}: 6 images; wrote {report} and {reference}\n"
    done = run("evaluate", samples_file, "--reference", reference, *few, "--metrics", "fid", "--json", "--allow-few")
    found = json.loads(done.out)
    assert done.code == 0 and found["metrics"] == {"fid": pytest.approx(0, abs=1e-5)}
    assert done.err.startswith(f"Warning: {samples_file} has 6 images: fid of fewer than 10,000 are biased")
    assert found["samples"]["sha256"] and found["inception"]["sha256"] and found["reference"]["statistics"] is True


def test_samples_of_a_run_are_measured_as_a_file_and_as_a_folder(run, tmp_path: Path, inception_file: Path) -> None:
    assert run("export", DIGITS, "--steps", 4, "--out", tmp_path / "bundle").code == 0
    sampling = ["--labels", "0-9", "--num", 3, "--batch-size", 3, "--npz", "--out", tmp_path / "run"]
    assert run("sample", tmp_path / "bundle", *sampling).code == 0
    figures = [
        json.loads(run("evaluate", path, "--inception", inception_file, "--json").out)["metrics"]
        for path in (tmp_path / "run" / "samples.npz", tmp_path / "run")
    ]
    assert figures[0] == figures[1] and figures[0].keys() == {"is"}


def test_digits_are_measured_without_inception(run, digits_file: Path, tmp_path: Path, monkeypatch) -> None:
    done = run("evaluate", digits_file, "--reference", "digits", "--json")
    metrics = json.loads(done.out)["metrics"]
    assert done.code == 0 and metrics["class_consistency"] > 0.99 and 0 < metrics["frechet_distance"] < 1
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()  # a folder of that name comes first
    assert "contains no PNG files" in run("evaluate", digits_file, "--reference", "digits", "--inception", "w").err


def test_other_sets_are_measured_by_a_kept_classifier(run, tmp_path: Path, monkeypatch) -> None:
    from dydit.data import opened
    from dydit.data.dataset import Examples

    class Colours:
        """A set of two classes: reddish and greenish images."""

        shape, classes = (3, 8, 8), 2

        def __len__(self) -> int:
            return 150

        def batch(self, indices: np.ndarray, generators: list[np.random.Generator]) -> Examples:
            labels = indices % 2
            images = np.stack([each.normal(size=self.shape) for each in generators]).clip(-1, 1).astype(np.float32) / 2
            images[np.arange(len(labels)), labels] += 0.5
            return Examples(images, labels)

    monkeypatch.setitem(opened.SMALL_SETS, "colours", Colours)
    real = Colours().batch(np.arange(80), [np.random.default_rng(each) for each in range(80)])
    np.savez(tmp_path / "samples.npz", to_uint8(real.images), real.labels)
    call = ["evaluate", tmp_path / "samples.npz", "--reference", "colours", "--json"]
    first, again = (run(*call, "--classifier", tmp_path / "kept.safetensors") for _ in range(2))
    assert first == again == run(*call) and first.code == 0 and (tmp_path / "kept.safetensors").is_file()
    metrics = json.loads(first.out)["metrics"]
    assert metrics["class_consistency"] > 0.9 and metrics["real_consistency"] > 0.9


def test_what_cannot_be_measured_is_refused(run, samples_file: Path, digits_file: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "unlabelled.npz", np.zeros((70, 16, 16, 3), np.uint8))
    (tmp_path / "taken.json").write_text("{}")
    weights = ["--inception", tmp_path / "missing.pth"]
    for words, message in (
        (
            [samples_file],
            "fetch weights-inception-2015-12-05-6726825d.pth from the releases of the project torch-fidelity",
        ),
        ([samples_file, *weights], "missing.pth is not a file"),
        ([samples_file, *weights, "--metrics", "fid,kid"], "'kid' is not a metric; known: fid, sfid, is"),
        ([samples_file, *weights, "--metrics", "fid"], "give --reference"),
        ([samples_file, *weights, "--reference", "emojis"], "emojis does not exist"),
        ([samples_file, *weights, "--out", tmp_path / "taken.json"], "exists already"),
        ([samples_file, *weights, "--classifier", "c"], "--classifier needs the name of a small data set"),
        ([samples_file, *weights, "--device", "cuda"], "no CUDA device"),
        ([samples_file, "--reference", "digits"], "has images of 24x24 pixels, but digits has 16x16"),
        ([digits_file, "--reference", "digits", "--metrics", "fid"], "digits is measured without Inception"),
        ([digits_file, "--reference", "digits", "--classifier", "c"], "leave out --classifier"),
        ([tmp_path / "unlabelled.npz", "--reference", "digits"], "has no array 'arr_1'"),
    ):
        done = run("evaluate", *words)
        assert done.code == 2 and message in done.err and done.err.count("\n") == 1 and done.out == "", done.err
    assert (tmp_path / "taken.json").read_text() == "{}"
