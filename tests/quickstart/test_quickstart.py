"""Quickstart, on tiny models: everything is made, a killed run goes on, a finished one is not written over unasked."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dydit.bundle.bundle import Bundle
from dydit.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from dydit.errors import CheckpointError, OutputError
from dydit.models.dit.config import DiTConfig
from dydit.models.synthetic import synthetic_model
from dydit.quickstart import quickstart
from dydit.quickstart.quickstart import STAGES, QuickstartConfig, run_quickstart
from dydit.quickstart.quickstart_folder import PICTURES, RESULTS, WORK, QuickstartFolder
from dydit.quickstart.quickstart_report import Sampled, _deviation
from dydit.reports.bench_report import BenchReport
from dydit.reports.parity_report import FlippedImage, ParityReport, Status

MODEL = DiTConfig(hidden_size=32, depth=2, num_heads=4, patch_size=2, input_size=8, in_channels=1, num_classes=3)


class Killed(BaseException):
    """As if the process had died."""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    for name, model in (("dydit", MODEL), ("dit", MODEL.without_routers())):
        save_checkpoint(folder / f"{name}.safetensors", synthetic_model(model), model)
    sizes = {"steps": 8, "max_subnets": 3, "per_class": 2, "batch": 4, "threads": 1}
    checks = {"parity_labels": (1,), "parity_every": 4, "bench_steps": 2, "bench_repeats": 1, "cfg_scale": 1.5}
    return QuickstartConfig(dydit=folder / "dydit.safetensors", dit=folder / "dit.safetensors", **sizes, **checks)


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """(folder, result, stages of a killed run, stages of the one that completed it, how others were refused)."""
    out = tmp_path_factory.mktemp("quick") / "out"
    first, second = [], []

    def until_bench(*at):
        first.append(at)
        if at[0] == "bench":
            raise Killed

    with pytest.raises(Killed):
        run_quickstart(out, config, progress=until_bench)
    assert (out / WORK).is_dir() and not (out / "report.json").exists()
    with pytest.raises(OutputError, match="other settings") as refused:
        run_quickstart(out, config.model_copy(update={"seed": 1}))
    before = (out / "samples" / "000000.png").stat().st_mtime_ns
    result = run_quickstart(out, config, progress=lambda *at: second.append(at))
    assert (out / "samples" / "000000.png").stat().st_mtime_ns == before, "finished stages are kept"
    return out, result, first, second, str(refused.value)


def test_stages_report_their_progress(finished):
    _, _, first, second, _ = finished
    assert list(dict.fromkeys(stage for stage, _, _ in first)) == list(STAGES[:5])
    assert list(dict.fromkeys(stage for stage, _, _ in second)) == list(STAGES[4:]), "the rest was done already"
    for stage in STAGES[:4]:
        counts = [at[1:] for at in first if at[0] == stage]
        assert counts[-1][0] == counts[-1][1] > 0
    assert second[-1] == ("report", 1, 1)


def test_everything_is_there(finished):
    out = finished[0]
    names = {entry.name for entry in out.iterdir()}
    assert names == {*PICTURES, *RESULTS, "bundle", "static-bundle", "samples"} and WORK not in names
    for name in PICTURES:
        with Image.open(out / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 5 and min(picture.size) > 150
    assert len(list((out / "samples").glob("0*.png"))) == 6
    assert Bundle.open(out / "bundle").manifest.model == MODEL
    html = (out / "report.html").read_text(encoding="utf-8")
    assert all(f'id="{section}"' in html for section in ("samples", "masks", "tokens", "parity", "latency", "plan"))


def test_five_lines_say_what_was_measured(finished, config):
    out, result, *_ = finished
    values = json.loads((out / "report.json").read_text())
    parity, bench = ParityReport.parse(values["parity"]), BenchReport.parse(values["bench"])
    assert result.ok and parity.ok and result.images == 6
    labels = ["results", "images per second", "speed-up", "multiply-adds saved", "deviation from PyTorch"]
    assert [line.label for line in result.lines] == labels
    assert len(result.text().splitlines()) == 5
    where, speed, faster, saved, deviation = result.lines
    assert where.value == str(out / "report.html")
    assert float(speed.value) == pytest.approx(6 / values["sampled"]["seconds"], abs=0.01)
    assert "8 DDPM steps, guidance 1.5, batch 4, 1 thread" in speed.note
    assert faster.value == f"{bench.comparison('static DiT').median:.2f}\u00d7" and bench.batch == 4
    ratio = values["flops_ratio"]
    assert 0.2 < ratio["decided"] <= ratio["executed"] < 1 and 0.1 < ratio["token_share"] < 0.9
    assert saved.value == f"{1 - ratio['executed']:.1%}"
    assert 0 < parity.check("run").worst < 1e-3 and float(deviation.value) == pytest.approx(
        parity.check("run").worst, rel=0.1
    )
    assert values["kind"] == "dydit-quickstart" and values["result"]["ok"] is True


def test_the_largest_deviation_counts_images_that_flipped_a_token(finished):
    parity = ParityReport.parse(json.loads((finished[0] / "parity.json").read_text()))
    image = FlippedImage(image=0, step=2, timestep=700, block=1, margin=1e-6, tie=True, flips=1, value=0.025)

    def line(**changes):
        checks = [
            *parity.checks[:-1],
            parity.checks[-1].model_copy(update={"decisions": 5000, "worst": 1e-7, **changes}),
        ]
        return _deviation(parity.model_copy(update={"checks": tuple(checks)}))

    plain = line(flips=0)
    assert plain.value == "1e-7" and plain.note.endswith("0 of 5,000 token decisions differ (tolerance 1e-3)")
    jumped = line(flips=1, flipped_images=(image,))
    assert (
        jumped.value == "2.5e-2"
        and "1 of 5,000 token decisions differs; 1e-7 for images whose token decisions all agree" in jumped.note
    )
    alone = line(flips=1, flipped_images=(image,), worst=None)
    assert alone.value == "2.5e-2" and "every image has a token that is routed differently" in alone.note
    failed = line(flips=0, status=Status.FAILED, worst=None)
    assert failed.value == "not finite" and "PARITY FAILS: parity fails at run" in failed.note


def test_a_finished_folder_is_refused_in_one_line(finished, config):
    out = finished[0]
    with pytest.raises(OutputError) as refused:
        run_quickstart(out, config)
    message = str(refused.value)
    assert "--overwrite" in message and "report.html" in message and "\n" not in message
    assert "--overwrite" in finished[4]


def test_a_strangers_folder_is_refused_and_left_alone(tmp_path, config):
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="do not belong to a quickstart"):
            run_quickstart(tmp_path, config, overwrite=overwrite)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(OutputError, match="not a folder"):
        run_quickstart(tmp_path / "thesis.tex", config, overwrite=True)


def test_overwrite_removes_what_a_quickstart_made_and_nothing_else(tmp_path):
    out = tmp_path / "out"
    folder = QuickstartFolder(out)
    folder.require_free(False)
    with folder.open({"seed": 0}, False):
        folder.save("sampled.json", {"images": 1})
        (out / "samples").mkdir()
        (out / "masks.png").write_bytes(b"old")
        (out / "notes.txt").write_text("mine")
        folder.finish({})
    assert folder.finished and not folder.begun
    folder.require_free(True)
    with folder.open({"seed": 1}, True):
        assert sorted(entry.name for entry in out.iterdir()) == [WORK, "notes.txt"]
        assert folder.begun and not folder.finished and folder.load("sampled.json", Sampled) is None
        with pytest.raises(OutputError, match="another quickstart"), QuickstartFolder(out).open({"seed": 1}, True):
            pass


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"images": "many"}'])
def test_a_stage_whose_result_is_damaged_is_run_again(tmp_path, text):
    folder = QuickstartFolder(tmp_path)
    folder.work.mkdir()
    (folder.work / "sampled.json").write_text(text)
    assert folder.load("sampled.json", Sampled) is None


def test_checkpoints_must_be_there_and_fit(tmp_path, config, monkeypatch):
    with pytest.raises(CheckpointError, match="does not exist"):
        run_quickstart(tmp_path / "out", config.model_copy(update={"dit": tmp_path / "nothing"}))
    swapped = config.model_copy(update={"dydit": config.dit, "dit": config.dydit})
    with pytest.raises(CheckpointError, match="are not a DyDiT and a static DiT"):
        run_quickstart(tmp_path / "out", swapped)
    monkeypatch.setattr(quickstart, "ASSETS", tmp_path)
    with pytest.raises(CheckpointError, match="dydit train"):
        run_quickstart(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_stale_bundle_is_exported_again(finished, config, tmp_path, make_checkpoint):
    job = quickstart._Job(
        QuickstartFolder(finished[0]), config, load_checkpoint(config.dydit), load_checkpoint(config.dit), None
    )
    kept = quickstart._export(job)[0].manifest
    assert kept.checkpoint_sha256 == job.dydit.sha256
    other = QuickstartFolder(tmp_path)
    quickstart._export(quickstart._Job(other, config, load_checkpoint(config.dydit), job.dit, None))
    changed = synthetic_model(MODEL, seed=5)
    save_checkpoint(tmp_path / "new.safetensors", changed, MODEL)
    new = load_checkpoint(tmp_path / "new.safetensors")
    bundle, _ = quickstart._export(quickstart._Job(other, config, new, job.dit, None))
    assert bundle.manifest.checkpoint_sha256 == new.sha256 != kept.checkpoint_sha256


def test_pictures_come_back_as_samples(tmp_path):
    for index, level in enumerate((0, 255)):
        data = io.BytesIO()
        Image.fromarray(np.full((4, 4), level, np.uint8)).save(data, format="PNG")
        (tmp_path / f"{index:06d}.png").write_bytes(data.getvalue())
    images = quickstart._read_images(tmp_path, 2)
    assert images.shape == (2, 1, 4, 4) and images[0].max() == -1 and images[1].min() == 1


def test_a_stage_whose_results_are_damaged_is_run_again(make_bundle, make_checkpoint, small_config, tmp_path):
    model = make_checkpoint(small_config.model_copy(update={"in_channels": 3}))
    bundle, folder = make_bundle(model, steps=2, max_subnets=1), QuickstartFolder(tmp_path)
    job = quickstart._Job(folder, QuickstartConfig(steps=2, per_class=1, threads=1), model, model, None)
    folder.work.mkdir()
    first = quickstart._sample(job, bundle)
    pictures = {path.name: path.read_bytes() for path in (tmp_path / "samples").glob("0*.png")}
    assert quickstart._sample(job, bundle) == first, "what is whole is kept"
    for spoil in (Path.unlink, lambda path: path.write_bytes(b"")):
        spoil(tmp_path / "samples" / "000002.png")
        assert quickstart._sample(job, bundle).images == first.images
        assert {path.name: path.read_bytes() for path in (tmp_path / "samples").glob("0*.png")} == pictures
    trace = quickstart._trace(job, bundle)
    file = folder.work / "trace.npz"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    for spoilt in (bytes(data), data[:100], b""):
        file.write_bytes(spoilt)
        assert np.array_equal(quickstart._trace(job, bundle).latents, trace.latents)
