"""A run of any size ends in the same bytes, however often it was interrupted, and touches only what is its own."""

from __future__ import annotations

import fcntl
import json
import math
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dydit import files
from dydit.errors import BackendError, ConfigError, OutputError
from dydit.runtime.backends.registry import open_backend
from dydit.runtime.bulk import run as bulk
from dydit.runtime.bulk import run_folder
from dydit.runtime.bulk.run import OutputOptions, sample_to_folder
from dydit.runtime.bulk.workers import Worker
from dydit.runtime.images import image_files as images
from dydit.runtime.images.image_files import to_uint8
from dydit.runtime.loop import MemoryStore, StepRunner, chunk_size, sample
from dydit.runtime.noise_source import SeededNoise
from dydit.runtime.request import SampleRequest, make_batches
from dydit.runtime.resident import ResidentSubnets

REQUEST = SampleRequest(labels=(3, 1), num=7, batch_size=3, seed=2)


def content(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, by name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def finished(pixel_bundle, tmp_path_factory) -> Path:
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("runs") / "run"
    summary = sample_to_folder(pixel_bundle, REQUEST, out, OutputOptions(npz=True))
    assert (summary.images, summary.files, summary.finished_before) == (7, ("grid.png", "samples.npz"), False)
    return out


def test_what_a_run_leaves(finished, pixel_bundle, tmp_path):
    names = [*(f"{i:06d}.png" for i in range(7)), "grid.png", "samples.json", "samples.npz"]
    assert sorted(content(finished)) == names
    with np.load(finished / "samples.npz", allow_pickle=False) as file:
        pictures, labels = file["arr_0"], file["arr_1"]
    assert pictures.shape == (7, 8, 8, 3) and pictures.dtype == np.uint8
    assert labels.tolist() == [3, 1, 3, 1, 3, 1, 3]
    for i in range(7):
        with Image.open(finished / f"{i:06d}.png") as image:
            assert np.array_equal(np.asarray(image), pictures[i])
    assert len(np.unique(pictures.reshape(7, -1), axis=0)) == 7
    facts = json.loads((finished / "samples.json").read_text())
    assert facts["images"] == 7 and facts["settings"]["bundle"] == pixel_bundle.manifest.digest


def test_a_finished_run_is_left_alone(finished, pixel_bundle):
    before = {p: p.stat().st_mtime_ns for p in finished.iterdir()}
    summary = sample_to_folder(pixel_bundle, REQUEST, finished, OutputOptions(npz=True))
    assert summary.finished_before and "complete already" in summary.note and summary.images == 7
    assert {p: p.stat().st_mtime_ns for p in finished.iterdir()} == before


def test_other_settings_are_refused_by_name(finished, pixel_bundle):
    before = content(finished)
    other = SampleRequest(labels=(3, 1), num=7, batch_size=4, seed=5)
    with pytest.raises(
        OutputError,
        match="batch_size: 3 in the folder, 4 requested; npz: true in the folder, false requested; seed: 2 in the "
        "folder, 5",
    ):
        sample_to_folder(pixel_bundle, other, finished)
    with pytest.raises(OutputError, match='backend: "onnxruntime" in the folder, "torch" requested'):
        sample_to_folder(pixel_bundle, REQUEST, finished, OutputOptions(npz=True), backend="torch")
    assert content(finished) == before


def test_a_summary_that_was_changed_by_hand(finished, pixel_bundle, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    facts = json.loads((copy / "samples.json").read_text())
    for change in ({"files": None}, {"repeated_steps": "2"}, {"sha256": []}):
        (copy / "samples.json").write_text(json.dumps(facts | change))
        with pytest.raises(OutputError, match=r"samples.json was changed by hand"):
            sample_to_folder(pixel_bundle, REQUEST, copy, OutputOptions(npz=True))


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


DAMAGES = {
    "gone": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "a flipped bit": flipped,
}


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", ["000004.png", "grid.png", "samples.npz"])
def test_what_is_damaged_of_a_finished_run_is_made_anew(finished, pixel_bundle, tmp_path, name, how):
    out, steps = tmp_path / "run", []
    shutil.copytree(finished, out)
    DAMAGES[how](out / name)
    arguments = (pixel_bundle, REQUEST, out, OutputOptions(npz=True))
    done = sample_to_folder(*arguments, progress=lambda *now: steps.append(now))
    assert done.finished and not done.finished_before and content(out) == content(finished)
    assert "these files of the finished run were missing or damaged and have been written again" in done.note
    assert done.note.endswith(f": {name}")
    if name.startswith("0"):
        assert "by sampling again" in done.note and steps[-1] == (6, 6), "its batch alone"
    else:
        assert "from the pictures" in done.note and not steps
    assert sample_to_folder(*arguments).finished_before


def test_a_foreign_picture_in_a_finished_run_is_left_alone(finished, pixel_bundle, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    Image.new("RGB", (9, 8)).save(out / "000004.png")
    before = content(out)
    with pytest.raises(OutputError, match=r"000004\.png is not a picture of this run; remove it and run again"):
        sample_to_folder(pixel_bundle, REQUEST, out, OutputOptions(npz=True))
    assert content(out) == before


def test_pictures_come_back_from_latents_where_a_file_has_them(pixel_bundle, tmp_path):
    out, outputs = tmp_path / "run", OutputOptions(npz=True, latents_out=tmp_path / "latents.npz")
    sample_to_folder(pixel_bundle, REQUEST, out, outputs)
    before, latents = content(out), (tmp_path / "latents.npz").read_bytes()
    for image in range(5):
        (out / f"{image:06d}.png").write_bytes(b"")
    done = sample_to_folder(pixel_bundle, REQUEST, out, outputs, progress=lambda *_: pytest.fail("nothing to sample"))
    assert content(out) == before
    assert done.note.startswith("these files of the finished run were missing or damaged and have been written again")
    assert done.note.endswith(" from the latents: 000000.png, 000001.png, 000002.png and 2 more pictures")
    (tmp_path / "latents.npz").unlink()
    assert "by sampling again" in sample_to_folder(pixel_bundle, REQUEST, out, outputs).note
    assert (tmp_path / "latents.npz").read_bytes() == latents and content(out) == before
    (tmp_path / "latents.npz").write_bytes(b"of another run")
    with pytest.raises(OutputError, match=r"latents\.npz has changed since this run wrote it; move the file"):
        sample_to_folder(pixel_bundle, REQUEST, out, outputs)
    assert (tmp_path / "latents.npz").read_bytes() == b"of another run" and content(out) == before


def test_latents_that_are_damaged_come_back(make_bundle, tmp_path):
    bundle, request = make_bundle(), SampleRequest(labels=(1, 2, 3), batch_size=2)
    outputs = OutputOptions(latents_out=tmp_path / "too.npz")
    sample_to_folder(bundle, request, tmp_path / "run", outputs)
    before = content(tmp_path / "run")
    flipped(tmp_path / "run" / "latents.npz")
    done = sample_to_folder(bundle, request, tmp_path / "run", outputs)
    assert "missing or damaged and have been written again from the latents: latents.npz" in done.note
    assert "no VAE decoder" in done.note and content(tmp_path / "run") == before


def test_a_repair_that_dies_is_gone_on_with(finished, pixel_bundle, tmp_path):
    out, arguments = tmp_path / "run", (pixel_bundle, REQUEST, tmp_path / "run", OutputOptions(npz=True))
    shutil.copytree(finished, out)
    for image in range(7):
        (out / f"{image:06d}.png").unlink()

    def die(done, total):
        if done == 9:
            raise Killed

    with pytest.raises(Killed):
        sample_to_folder(*arguments, progress=die)
    assert sample_to_folder(*arguments).finished and content(out) == content(finished)


def test_one_process_alone_repairs(finished, pixel_bundle, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / "000004.png").unlink()
    before = content(out)
    settings = json.loads((out / "samples.json").read_text())["settings"]
    with run_folder.RunFolder(out, settings).finishing(repair=True) as ours:
        assert ours
        done = sample_to_folder(pixel_bundle, REQUEST, out, OutputOptions(npz=True))
        assert not done.finished and "another process is repairing" in done.note
        shutil.rmtree(out / ".work")
        assert content(out) == before


def test_a_damaged_picture_of_an_unfinished_run_is_made_again(finished, pixel_bundle, tmp_path):
    out, outputs = tmp_path / "run", OutputOptions(npz=True)

    def die(done, total):
        if done == 7:
            raise Killed

    with pytest.raises(Killed):
        sample_to_folder(pixel_bundle, REQUEST, out, outputs, picture_progress=die)
    (out / "000002.png").write_bytes(b"")
    flipped(out / "000005.png")
    assert sample_to_folder(pixel_bundle, REQUEST, out, outputs).finished and content(out) == content(finished)


CHUNKED = SampleRequest(labels=(3, 1), num=12, batch_size=3, seed=2)


def test_pictures_appear_chunk_by_chunk(make_bundle, pixel_checkpoint, tmp_path):
    """With dynamic width nothing is loaded for a chunk, so pictures come after a few batches; the bits are the same."""
    bundle, said, seen = make_bundle(pixel_checkpoint, steps=6, plan="sliding", max_batch=8), [], []
    out = tmp_path / "run"

    def look(done: int, total: int) -> None:
        seen.append(len(list(out.glob("0*.png"))))

    sample_to_folder(bundle, CHUNKED, out, progress=look, announce=said.append)
    assert said == [f"pictures appear in {out} after every 6 of 12 images"]
    assert seen == [0] * 12 + [6] * 12
    stopped = []

    def die(done: int, total: int) -> None:
        stopped.append(done)
        if done == 16:
            raise Killed

    with pytest.raises(Killed):
        sample_to_folder(bundle, CHUNKED, tmp_path / "killed", progress=die)
    assert len(list((tmp_path / "killed").glob("0*.png"))) == 6
    sample_to_folder(bundle, CHUNKED, tmp_path / "killed")
    assert content(tmp_path / "killed") == content(out)
    for number in (1, 0):
        sample_to_folder(bundle, CHUNKED, tmp_path / "shared", worker=Worker(number, 2))
    assert content(tmp_path / "shared") == content(out)


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_chunks_of_any_size_give_the_same_images(finished, pixel_bundle, tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(bulk, "chunk_size", lambda *_: chunk)
    said, seen, out = [], [], tmp_path / "run"
    look = lambda done, total: seen.append(len(list(out.glob("0*.png"))))  # noqa: E731
    sample_to_folder(pixel_bundle, REQUEST, out, OutputOptions(npz=True), progress=look, announce=said.append)
    assert content(out) == content(finished)
    assert sorted(set(seen)) == {1: [0, 3, 6], 2: [0, 6], 3: [0]}[chunk]
    when = {1: "after every 3 of 7 images", 2: "after every 6 of 7 images", 3: "when all 7 images are sampled"}[chunk]
    assert said == [f"pictures appear in {out} {when}"]


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("labels", [1, 10, 1000])
@pytest.mark.parametrize("batch", [1, 4, 16])
def test_a_chunk_is_large_enough_to_pay_for_what_it_loads(pixel_bundle, batch, labels, guided):
    """100 steps of an image and 24 of a batch for each loading; 2 % of a chunk's multiply-adds for its conditions."""
    manifest = pixel_bundle.manifest
    segments, steps = len(manifest.plan.segments), manifest.sampling.steps
    stored = manifest.model.stored_shapes().items()
    condition = sum(math.prod(shape) for name, shape in stored if manifest.model.is_conditioning(name))
    cpu, gpu = (chunk_size(manifest, batch, labels, guided, device) for device in ("cpu", "cuda"))
    assert cpu * batch * steps >= 100 * segments and cpu * steps >= 24 * segments and gpu >= cpu
    rows = cpu * batch * (2 if guided else 1)
    assert 0.02 * rows * manifest.plan.macs >= (labels + guided) * steps * condition


def test_a_chunk_of_dynamic_width_pays_for_its_conditions_alone(make_bundle, pixel_checkpoint):
    sliding = make_bundle(pixel_checkpoint, steps=6, plan="sliding", max_batch=8).manifest
    assert chunk_size(sliding, 16, 1, True, "cpu") == chunk_size(sliding, 16, 1, True, "cuda") == 1


def test_a_start_that_fails_leaves_nothing(pixel_bundle, tmp_path):
    """Nor does an interrupt before anything was saved; folders that were there stay."""
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "a" / "b", tmp_path / "empty"):
        stopped_run(pixel_bundle, out, 1)
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


class Killed(BaseException):
    """Stands for the death of the process: nothing catches it."""


def test_dying_before_any_write_changes_nothing_in_the_end(pixel_bundle, tmp_path, monkeypatch):
    """Die before the k-th write, for every k; the next call completes the run to the same bytes."""
    request, outputs = SampleRequest(labels=(3, 1, 5), batch_size=2), OutputOptions(npz=True)
    sample_to_folder(pixel_bundle, request, tmp_path / "whole", outputs, "torch")
    write, left = files.write_atomic, [0]

    def dying(path, data):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        write(path, data)

    for module in (files, run_folder, images):
        monkeypatch.setattr(module, "write_atomic", dying)
    for k in range(100):
        out, left[0] = tmp_path / f"run{k}", k
        try:
            sample_to_folder(pixel_bundle, request, out, outputs, "torch")
            break
        except Killed:
            assert not (out / "samples.json").exists()
        left[0] = 100
        assert not sample_to_folder(pixel_bundle, request, out, outputs, "torch").finished_before
        assert content(out) == content(tmp_path / "whole"), k
    segments = len(pixel_bundle.manifest.plan.segments)
    assert k == 1 + 2 * segments + 3 + 1 + 1, "run.json, states, pictures, grid, samples.json"


def test_dying_while_cleaning_up_leaves_a_finished_run(finished, pixel_bundle, tmp_path, monkeypatch):
    out = tmp_path / "run"

    def dying(self):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(run_folder.RunFolder, "clear", dying)
        with pytest.raises(Killed):
            sample_to_folder(pixel_bundle, REQUEST, out, OutputOptions(npz=True))
    assert (out / ".work").is_dir()
    assert sample_to_folder(pixel_bundle, REQUEST, out, OutputOptions(npz=True)).finished_before
    assert content(out) == content(finished)


def stopped_run(bundle, out: Path, at: int, **kwargs) -> None:
    """Start a run and die at a step."""

    def progress(done, total):
        if done == at:
            raise Killed

    with pytest.raises(Killed):
        sample_to_folder(bundle, REQUEST, out, progress=progress, **kwargs)


def test_a_damaged_batch_starts_again_and_halves_of_files_go(finished, pixel_bundle, tmp_path):
    out = tmp_path / "run"
    stopped_run(pixel_bundle, out, 15, outputs=OutputOptions(npz=True))
    states = sorted((out / ".work").glob("*.npz"))
    assert len(states) == 3
    damaged = bytearray(states[1].read_bytes())
    damaged[len(damaged) // 2] ^= 0x10
    states[1].write_bytes(damaged)
    states[2].write_bytes(b"")
    (out / ".000001.png.x1y2.part").write_bytes(b"half of a picture")
    seen = []
    sample_to_folder(pixel_bundle, REQUEST, out, OutputOptions(npz=True), progress=lambda *now: seen.append(now))
    assert seen[-1] == (18, 18) and len(seen) > 18 - 15 + 1
    assert content(out) == content(finished)


def test_an_unfinished_run_with_other_settings_is_refused(pixel_bundle, tmp_path):
    out = tmp_path / "run"
    stopped_run(pixel_bundle, out, 4)
    before = content(out)
    with pytest.raises(OutputError, match=r"cfg_scale: 4\.0 in the folder, 2\.0 requested"):
        sample_to_folder(pixel_bundle, REQUEST.model_copy(update={"cfg_scale": 2.0}), out)
    assert content(out) == before


def test_two_processes_do_not_share_a_folder(pixel_bundle, tmp_path):
    out = tmp_path / "run"
    stopped_run(pixel_bundle, out, 4)
    with open(out / ".work" / "worker-0-of-1.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another process is sampling into"):
            sample_to_folder(pixel_bundle, REQUEST, out)
    assert sample_to_folder(pixel_bundle, REQUEST, out).images == 7


def test_folders_that_are_no_run_are_refused(pixel_bundle, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="is not the folder of a sampling run"):
        sample_to_folder(pixel_bundle, REQUEST, tmp_path)
    with pytest.raises(OutputError, match="is not a folder"):
        sample_to_folder(pixel_bundle, REQUEST, tmp_path / "notes.txt")
    with pytest.raises(OutputError, match=r"cannot write .*notes\.txt"):
        sample_to_folder(pixel_bundle, REQUEST, tmp_path / "notes.txt" / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "samples.json").write_text("{}")
    with pytest.raises(OutputError, match="is not the folder of a sampling run"):
        sample_to_folder(pixel_bundle, REQUEST, tmp_path / "other")
    (tmp_path / "other" / "samples.json").write_text("{")
    with pytest.raises(OutputError, match="cannot be read"):
        sample_to_folder(pixel_bundle, REQUEST, tmp_path / "other")
    assert content(tmp_path) == {"notes.txt": b"mine", "other/samples.json": b"{"}


def test_bad_requests_and_missing_backends_leave_no_folder(pixel_bundle, tmp_path):
    out = tmp_path / "run"
    for request, backend, error, message in (
        (SampleRequest(labels=(9,)), "onnxruntime", ConfigError, r"label 9 is outside 0\.\.6"),
        (SampleRequest(labels=(1,), batch_size=99), "onnxruntime", ConfigError, "batch size 99 is outside"),
        (SampleRequest(labels=(1,)), "jax", BackendError, "unknown backend 'jax'"),
        (SampleRequest(labels=(1,), noise_from=tmp_path / "no.npz"), "torch", ConfigError, "cannot read noise"),
    ):
        with pytest.raises(error, match=message):
            sample_to_folder(pixel_bundle, request, out, backend=backend)
    assert not out.exists()


def test_latent_models_give_latents_and_say_so(make_bundle, tmp_path):
    bundle, request = make_bundle(), SampleRequest(labels=(1, 2, 3), batch_size=2, first_image=10)
    summary = sample_to_folder(bundle, request, tmp_path / "run", OutputOptions(latents_out=tmp_path / "too.npz"))
    assert summary.files == ("latents.npz",) and "no VAE decoder" in summary.note
    assert sorted(content(tmp_path / "run")) == ["latents.npz", "samples.json"]
    with np.load(tmp_path / "run" / "latents.npz", allow_pickle=False) as file:
        assert file["latents"].shape == (3, 4, 8, 8) and np.isfinite(file["latents"]).all()
        assert file["labels"].tolist() == [1, 2, 3] and file["images"].tolist() == [10, 11, 12]
    assert (tmp_path / "too.npz").read_bytes() == (tmp_path / "run" / "latents.npz").read_bytes()
    with pytest.raises(ConfigError, match="--npz needs pictures"):
        sample_to_folder(bundle, request, tmp_path / "x", OutputOptions(npz=True))
    with pytest.raises(OutputError, match=r"too\.npz exists already"):
        sample_to_folder(bundle, request, tmp_path / "x", OutputOptions(latents_out=tmp_path / "too.npz"))
    assert not (tmp_path / "x").exists()


def test_a_run_can_be_split_by_first_image(finished, pixel_bundle, tmp_path):
    whole = np.load(finished / "samples.npz")["arr_0"]
    request = SampleRequest(labels=(1, 3, 1), seed=2, first_image=3)
    sample_to_folder(pixel_bundle, request, tmp_path / "part", OutputOptions(npz=True))
    assert sorted(content(tmp_path / "part"))[:3] == ["000003.png", "000004.png", "000005.png"]
    part = np.load(tmp_path / "part" / "samples.npz")["arr_0"]
    assert np.abs(part.astype(int) - whole[3:6]).max() <= 1


def test_noise_from_a_file_is_used(pixel_bundle, tmp_path):
    from dydit.diffusion.noise import image_noise

    shape, images = (3, 8, 8), [0, 1, 2]
    np.savez(
        tmp_path / "n.npz",
        x_T=image_noise(2, images, 0, shape),
        noise=np.stack([image_noise(2, images, step + 1, shape) for step in range(6)]),
        labels=np.array([3, 1, 3]),
    )
    out = OutputOptions(latents_out=tmp_path / "a.npz")
    sample_to_folder(pixel_bundle, SampleRequest(noise_from=tmp_path / "n.npz", batch_size=3), tmp_path / "a", out)
    seeded = OutputOptions(latents_out=tmp_path / "b.npz")
    sample_to_folder(pixel_bundle, SampleRequest(labels=(3, 1, 3), seed=2, batch_size=3), tmp_path / "b", seeded)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    for request, message in (
        ({"num": 4}, "holds noise for 3 images, but 4 are requested"),
        ({"labels": (3, 1)}, "the labels differ from those of"),
    ):
        with pytest.raises(ConfigError, match=message):
            sample_to_folder(pixel_bundle, SampleRequest(noise_from=tmp_path / "n.npz", **request), tmp_path / "c")
    settings = json.loads((tmp_path / "a" / "samples.json").read_text())["settings"]
    assert settings["seed"] is None and len(settings["noise_sha256"]) == 64


def test_noise_from_a_file_without_noise_where_the_sampler_adds_none(pixel_bundle, tmp_path):
    from dydit.diffusion.noise import image_noise
    from dydit.diffusion.samplers import SamplerChoice
    from dydit.planning.resampling import resampled

    np.savez(tmp_path / "n.npz", x_T=image_noise(2, [0, 1, 2], 0, (3, 8, 8)), labels=np.array([3, 1, 3]))
    bundle, latents = resampled(pixel_bundle, SamplerChoice(sampler="ddim")), []
    for name, request in (
        ("a", SampleRequest(noise_from=tmp_path / "n.npz")),
        ("b", SampleRequest(labels=(3, 1, 3), seed=2)),
    ):
        sample_to_folder(bundle, request, tmp_path / name, OutputOptions(latents_out=tmp_path / f"{name}.npz"))
        latents.append((tmp_path / f"{name}.npz").read_bytes())
    assert latents[0] == latents[1]
    with pytest.raises(ConfigError, match="has no array 'noise', which ddpm needs") as caught:
        sample_to_folder(pixel_bundle, SampleRequest(noise_from=tmp_path / "n.npz"), tmp_path / "c")
    assert "\n" not in str(caught.value) and not (tmp_path / "c").exists()


def test_the_null_class_is_sampled_like_any_other(pixel_bundle, run, tmp_path):
    null = pixel_bundle.manifest.model.null_class
    for name, label, scale in (("null", null, 4), ("without", 2, 0)):
        done = run(
            "sample", pixel_bundle.path, "--labels", label, "--cfg-scale", scale, "--npz", "--out", tmp_path / name
        )
        assert done.code == 0, done.err
    ours, theirs = (np.load(tmp_path / name / "samples.npz")["arr_0"].astype(int) for name in ("null", "without"))
    assert ours.shape == (1, 8, 8, 3) and np.abs(ours - theirs).max() <= 1
    refused = run("sample", pixel_bundle.path, "--labels", null + 1, "--out", tmp_path / "no")
    assert refused.code == 2 and f"label {null + 1} is outside 0..{null - 1}" in refused.err


def test_repeated_steps_are_counted_over_interruptions(make_bundle, pixel_checkpoint, tmp_path):
    from dydit.bundle.manifest import Routing

    bundle = make_bundle(pixel_checkpoint, steps=6, max_subnets=4, routing=Routing.CAPACITY, capacities=(6, 9, 9))
    whole = sample_to_folder(bundle, REQUEST, tmp_path / "whole")
    backend, (batches, store) = (
        open_backend("onnxruntime", bundle),
        (make_batches([3, 1, 3, 1, 3, 1, 3], range(7), 3), MemoryStore()),
    )
    with ResidentSubnets(backend) as subnets:
        runner = StepRunner(backend, subnets, [1, 3], 4.0)
        stats = sample(runner, batches, SeededNoise(REQUEST.seed, (3, 8, 8)), store)
    assert whole.repeated_steps == stats.repeated_steps > 3, "more than one segment repeats steps"
    stopped_run(bundle, tmp_path / "parts", 11)
    assert sample_to_folder(bundle, REQUEST, tmp_path / "parts").repeated_steps == whole.repeated_steps
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


WORKER = """
import sys
from pathlib import Path
from dydit.bundle.bundle import Bundle
from dydit.runtime.backends.registry import open_backend
from dydit.runtime.bulk.run import OutputOptions, sample_to_folder
from dydit.runtime.loop import MemoryStore, StepRunner, sample
from dydit.runtime.noise_source import SeededNoise
from dydit.runtime.request import SampleRequest, make_batches
from dydit.runtime.resident import ResidentSubnets
bundle, out = Bundle.open(sys.argv[1]), Path(sys.argv[2])
request = SampleRequest(labels=(3, 1), num=60, batch_size=4)
outputs = OutputOptions(npz=True, latents_out=Path(sys.argv[3]))
sample_to_folder(bundle, request, out, outputs, progress=lambda done, total: print(done, total, flush=True))
"""


@pytest.mark.parametrize("sampler", ["ddpm", "dpm-solver++"])
def test_sigkill_at_random_moments(sampler, make_bundle, pixel_checkpoint, tmp_path):
    """The process is killed again and again, each time further on; what it ends with is what an undisturbed one writes.

    The moments are counted in steps, so that they are as many on a fast machine as on a loaded one; where within a step
    a kill falls is left to chance.
    """

    bundle = make_bundle(pixel_checkpoint, steps=6, max_subnets=4, max_batch=8, sampler=sampler)

    def start(name: str) -> subprocess.Popen[bytes]:
        arguments = [str(bundle.path), str(tmp_path / name), str(tmp_path / f"{name}.npz")]
        return subprocess.Popen([sys.executable, "-c", WORKER, *arguments], stdout=subprocess.PIPE)

    clean, rng, states = start("clean"), random.Random(0), []
    total = int(clean.communicate(timeout=600)[0].split()[-1])
    assert clean.returncode == 0
    out = tmp_path / "killed"
    for share in (0.1, 0.35, 0.6, 0.85, 1):
        worker = start("killed")
        assert worker.stdout is not None
        for line in worker.stdout:
            if int(line.split()[0]) >= share * total:
                time.sleep(rng.uniform(0, 0.03))
                worker.send_signal(signal.SIGKILL)
                break
        worker.communicate()
        states.append(content(out))
    assert len({str(state) for state in states}) > 2, "the kills met different states"
    last = start("killed")
    assert last.communicate(timeout=600)[1] is None and last.returncode == 0
    results, expected = content(out), content(tmp_path / "clean")
    summaries = [json.loads(each.pop("samples.json")) for each in (results, expected)]
    assert results == expected
    assert (tmp_path / "killed.npz").read_bytes() == (tmp_path / "clean.npz").read_bytes()
    for summary in summaries:
        summary["settings"].pop("latents_out")
    assert summaries[0] == summaries[1]


def test_pictures_are_those_of_the_latents(pixel_bundle, tmp_path):
    outputs = OutputOptions(npz=True, latents_out=tmp_path / "l.npz")
    sample_to_folder(pixel_bundle, REQUEST, tmp_path / "run", outputs, backend="torch")
    with np.load(tmp_path / "l.npz") as latents, np.load(tmp_path / "run" / "samples.npz") as pictures:
        assert np.array_equal(to_uint8(latents["latents"]), pictures["arr_0"])
