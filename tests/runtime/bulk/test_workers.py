"""Several workers leave the bytes that one process leaves, whatever dies, and keep out of each other's way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dydit.bundle.manifest import PlanKind, Routing
from dydit.errors import ConfigError, OutputError
from dydit.runtime.backends.base import BackendOptions
from dydit.runtime.backends.cores import thread_count
from dydit.runtime.bulk import run as bulk
from dydit.runtime.bulk import run_folder
from dydit.runtime.bulk.run import OutputOptions, SampleSummary, sample_to_folder
from dydit.runtime.bulk.run_folder import FolderStore, RunFolder
from dydit.runtime.bulk.workers import Worker, launched_worker, own_gpu, parse_worker
from dydit.runtime.request import SampleRequest
from tests.fixtures.packages import OPENVINO_AT_RELEASE

REQUEST = SampleRequest(labels=(3, 1), num=7, batch_size=2, seed=2)
NPZ = OutputOptions(npz=True)


def content(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, by name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def make(bundle, out: Path, number: int, count: int, **settings) -> SampleSummary:
    return sample_to_folder(bundle, REQUEST, out, NPZ, worker=Worker(number, count), **settings)


class Killed(BaseException):
    """Stands for the death of the process: nothing catches it."""


def dying_at(step: int):
    def progress(done: int, total: int) -> None:
        if done == step:
            raise Killed

    return progress


@pytest.fixture(scope="module")
def alone(pixel_bundle, tmp_path_factory) -> Path:
    """The run, made by one process; its latents beside it."""
    folder = tmp_path_factory.mktemp("alone")
    summary = sample_to_folder(pixel_bundle, REQUEST, folder / "run", NPZ)
    assert summary.finished and summary.worker == "0/1"
    outputs = OutputOptions(npz=True, latents_out=folder / "latents.npz")
    sample_to_folder(pixel_bundle, REQUEST, folder / "with-latents", outputs)
    return folder


def test_shares_are_disjoint_whole_and_complete():
    for count in (1, 2, 3, 5):
        shares = [Worker(number, count).share(4) for number in range(count)]
        assert sorted(batch for share in shares for batch in share) == [0, 1, 2, 3]
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_the_last_worker_writes_the_results(alone, pixel_bundle, tmp_path, order):
    out = tmp_path / "run"
    for number in order[:-1]:
        done, pictures = make(pixel_bundle, out, number, 3), {0: {0, 1, 6}, 1: {2, 3}, 2: {4, 5}}[number]
        assert (done.worker, done.finished, done.files, done.images) == (f"{number}/3", False, (), len(pictures))
        assert f"worker {number}/3 has sampled its images, but the run is not finished" in done.note
        assert all((out / f"{image:06d}.png").is_file() for image in pictures)
        assert not {"grid.png", "samples.npz", "samples.json"} & set(content(out))
    done = make(pixel_bundle, out, order[-1], 3)
    assert (done.finished, done.images, done.files, done.note) == (True, 7, ("grid.png", "samples.npz"), "")
    assert content(out) == content(alone / "run")
    again = make(pixel_bundle, out, order[0], 3)
    assert again.finished and again.finished_before and content(out) == content(alone / "run")


def test_latents_of_workers_and_a_worker_without_a_batch(make_bundle, tmp_path):
    bundle, request = make_bundle(), SampleRequest(labels=(1, 2, 3), batch_size=2)
    sample_to_folder(bundle, request, tmp_path / "alone")
    done = [sample_to_folder(bundle, request, tmp_path / "run", worker=Worker(number, 3)) for number in (2, 1, 0)]
    assert [(each.images, each.finished) for each in done] == [(0, False), (1, False), (3, True)]
    assert "no VAE decoder" in done[-1].note
    assert content(tmp_path / "run") == content(tmp_path / "alone")


def test_another_number_of_workers_goes_on(alone, pixel_bundle, tmp_path):
    """Workers of three die while sampling and while decoding; two and then one go on."""
    out, seen = tmp_path / "run", []
    with pytest.raises(Killed):
        make(pixel_bundle, out, 0, 3, picture_progress=dying_at(2))
    with pytest.raises(Killed):
        make(pixel_bundle, out, 1, 3, progress=dying_at(4))
    assert [f"{image:06d}.png" in content(out) for image in range(7)] == [image < 2 for image in range(7)]
    assert not make(pixel_bundle, out, 1, 2, progress=lambda *now: seen.append(now)).finished
    steps = pixel_bundle.manifest.sampling.steps
    assert seen[-1] == (2 * steps, 2 * steps) and 0 < len(seen) < steps, "the rest of batch 1; batch 3 is there"
    assert make(pixel_bundle, out, 0, 1).finished
    assert content(out) == content(alone / "run")


def test_a_worker_is_refused_beside_itself_and_beside_another_count(alone, pixel_bundle, tmp_path):
    out = tmp_path / "run"
    assert not make(pixel_bundle, out, 1, 2).finished
    before = content(out)
    settings = json.loads((out / ".work" / "run.json").read_text())["settings"]
    with RunFolder(out, settings).open(Worker(0, 2)):
        with pytest.raises(OutputError, match=r"another process is sampling into .* as worker 0/2; wait for it"):
            make(pixel_bundle, out, 0, 2)
        for number, count in ((0, 3), (1, 4), (0, 1)):
            with pytest.raises(
                OutputError, match=f"worker 0/2 is sampling into .* but this is worker {number}/{count}"
            ):
                make(pixel_bundle, out, number, count)
        assert not make(pixel_bundle, out, 1, 2).finished, "a worker of the same count comes and goes"
        assert {name: data for name, data in content(out).items() if not name.endswith(".lock")} == {
            name: data for name, data in before.items() if not name.endswith(".lock")
        }
    assert make(pixel_bundle, out, 0, 2).finished and content(out) == content(alone / "run")


def test_a_worker_with_other_settings_is_refused(pixel_bundle, tmp_path):
    make(pixel_bundle, tmp_path / "run", 0, 2)
    other = REQUEST.model_copy(update={"seed": 3})
    with pytest.raises(OutputError, match="seed: 2 in the folder, 3 requested"):
        sample_to_folder(pixel_bundle, other, tmp_path / "run", NPZ, worker=Worker(1, 2))


def test_one_alone_writes_the_results(alone, pixel_bundle, tmp_path):
    """Where two workers find at once that all is done, the second leaves; where the first dies, any goes on."""
    out = tmp_path / "run"
    make(pixel_bundle, out, 0, 2)
    settings = json.loads((out / ".work" / "run.json").read_text())["settings"]
    with RunFolder(out, settings).finishing() as ours:
        assert ours
        done = make(pixel_bundle, out, 1, 2)
        assert not done.finished and "another worker writes the results" in done.note
        assert "samples.json" not in content(out)
    assert make(pixel_bundle, out, 0, 2).finished and content(out) == content(alone / "run")
    with RunFolder(out, settings).finishing() as ours:
        assert not ours
    assert content(out) == content(alone / "run")


def test_a_run_that_is_finished_while_a_worker_comes_in(alone, pixel_bundle, tmp_path, monkeypatch):
    """It must not take the working files, which the other removes, for batches that nobody has begun."""
    out = tmp_path / "run"
    make(pixel_bundle, out, 1, 2)

    class Late(FolderStore):
        def __init__(self, *arguments):
            monkeypatch.setattr(bulk, "FolderStore", FolderStore)
            assert make(pixel_bundle, out, 0, 2).finished
            super().__init__(*arguments)

    monkeypatch.setattr(bulk, "FolderStore", Late)
    assert make(pixel_bundle, out, 1, 2).finished_before
    assert content(out) == content(alone / "run") and not (out / ".work").exists()


def test_a_run_that_is_finished_while_a_worker_looks(alone, pixel_bundle, tmp_path, monkeypatch):
    """Between its looks for a finished run and for an unfinished one, the one becomes the other."""
    out, read = tmp_path / "run", run_folder._read_json
    make(pixel_bundle, out, 1, 2)

    def reading(file: Path):
        values = read(file)
        monkeypatch.setattr(run_folder, "_read_json", read)
        assert values is None and make(pixel_bundle, out, 0, 2).finished
        return values

    monkeypatch.setattr(run_folder, "_read_json", reading)
    assert make(pixel_bundle, out, 1, 2).finished_before
    assert content(out) == content(alone / "run")


DYING = """
import os, signal, sys
from pathlib import Path
from dydit.bundle.bundle import Bundle
from dydit.runtime.backends.base import BackendOptions
from dydit.runtime.backends.cores import thread_count
from dydit.runtime.bulk.run import OutputOptions, sample_to_folder
from dydit.runtime.request import SampleRequest
from dydit.runtime.bulk.workers import Worker

def die(done, total):
    os.kill(os.getpid(), signal.SIGKILL)

request, place = SampleRequest(labels=(3, 1), num=7, batch_size=2, seed=2), Worker(int(sys.argv[4]), 3)
outputs = OutputOptions(npz=True, latents_out=Path(sys.argv[3]))
when = {"picture_progress": die} if place.number else {"progress": lambda done, total: done == 5 and die(done, total)}
sample_to_folder(Bundle.open(sys.argv[1]), request, Path(sys.argv[2]), outputs, worker=place, **when)
"""


def test_processes_at_once(alone, pixel_bundle, tmp_path):
    """Two of three workers are killed; two that a launcher starts then make the run, and one of them its results."""
    out, latents = tmp_path / "run", tmp_path / "latents.npz"
    files = [str(pixel_bundle.path), str(out), str(latents)]
    dying = [subprocess.Popen([sys.executable, "-c", DYING, *files, number]) for number in ("0", "2")]
    assert [process.wait(600) for process in dying] == [-signal.SIGKILL] * 2
    assert not list(out.glob("grid.png")) and list(out.glob("0*.png"))
    call = [sys.executable, "-m", "dydit", "sample", files[0], "--out", files[1], "--latents-out", files[2], "--npz"]
    call += ["--labels", "3,1", "--num", "7", "--batch-size", "2", "--seed", "2", "--json"]
    launched = [
        subprocess.Popen(
            call,
            stdout=subprocess.PIPE,
            env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    said = [json.loads(process.communicate(timeout=600)[0]) for process in launched]
    assert [process.returncode for process in launched] == [0, 0]
    assert [each["worker"] for each in said] == ["0/2", "1/2"]
    assert sorted((each["finished"], each["images"]) for each in said) in (
        [(False, 3), (True, 7)],
        [(False, 4), (True, 7)],
    )
    made, expected = content(out), content(alone / "with-latents")
    summaries = [json.loads(each.pop("samples.json")) for each in (made, expected)]
    for summary in summaries:
        summary["settings"].pop("latents_out")
    assert made == expected and summaries[0] == summaries[1]
    assert latents.read_bytes() == (alone / "latents.npz").read_bytes()
    with np.load(latents) as file:
        assert file["images"].tolist() == list(range(7)) and len(np.unique(file["latents"], axis=0)) == 7


def test_what_launchers_say():
    assert launched_worker({}) == Worker(0, 1)
    assert launched_worker({"LOCAL_RANK": "1"}) == Worker(0, 1)
    assert launched_worker({"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1"}) == Worker(9, 16, local=1)
    assert parse_worker(" 2/8 ") == Worker(2, 8) and str(parse_worker("02/08")) == "2/8"
    with pytest.raises(ConfigError, match=r"there is no worker 8/8: 8 workers are numbered from 0/8"):
        parse_worker("8/8")


def test_the_workers_of_a_machine_take_its_gpus_in_turn():
    assert [own_gpu(local, {}) for local in range(2)] == ["0", "1"]
    assert [own_gpu(local, {"CUDA_VISIBLE_DEVICES": "4,GPU-ab"}) for local in range(3)] == ["4", "GPU-ab", "4"]


@pytest.mark.parametrize("backend", ["onnxruntime", "torch", OPENVINO_AT_RELEASE])
def test_a_worker_with_the_last_smaller_batch_makes_the_same_bits(
    backend, make_bundle, make_checkpoint, small_config, tmp_path
):
    """Of six images in batches of four on four threads: two do not fill the threads, and still run as one process runs
    them. The layers are so wide that the kernels of ONNX Runtime add up otherwise when threads share a product.
    """
    wide = small_config.model_copy(update={"hidden_size": 256, "depth": 1})
    bundle = make_bundle(make_checkpoint(wide), steps=2, max_subnets=1)
    request, options = SampleRequest(labels=(3, 1), num=6, batch_size=4, seed=2), BackendOptions(threads=4)

    def made(name, *workers):
        outputs = OutputOptions(latents_out=tmp_path / f"{name}.npz")
        for worker in workers:
            sample_to_folder(bundle, request, tmp_path / name, outputs, backend, options, worker=worker)
        return (tmp_path / f"{name}.npz").read_bytes()

    alone = made("alone", Worker())
    assert made("two", Worker(1, 2), Worker(0, 2)) == alone
    assert made("three", Worker(2, 3), Worker(1, 3), Worker(0, 3)) == alone


def test_workers_of_one_run_use_the_same_number_of_threads(pixel_bundle, tmp_path):
    """By what it comes to: 0 is as many as there are CPUs."""
    out, cores = tmp_path / "run", thread_count(0)
    assert not make(pixel_bundle, out, 0, 2, options=BackendOptions(threads=cores)).finished
    before = content(out)
    with pytest.raises(OutputError, match=rf"holds a run with {cores} threads, .* use threads={cores} \(--threads"):
        make(pixel_bundle, out, 1, 2, options=BackendOptions(threads=cores + 1))
    assert content(out) == before
    assert make(pixel_bundle, out, 1, 2).finished


@pytest.mark.parametrize("kind", [{}, {"plan": PlanKind.DYNAMIC_WIDTH}, {"routing": Routing.CAPACITY}])
def test_any_split_into_workers_gives_the_same_bits(kind, make_bundle, tmp_path):
    bundle = make_bundle(steps=3, **kind)
    for threads, size in ((1, 2), (3, 4), (2, 1)):
        request, folders = SampleRequest(labels=(5, 1, 2), num=7, batch_size=size, seed=4), []
        for count in (1, 2, 4):
            out = tmp_path / f"{threads}-{size}-{count}"
            for number in reversed(range(count)):
                sample_to_folder(
                    bundle, request, out, options=BackendOptions(threads=threads), worker=Worker(number, count)
                )
            folders.append(content(out))
        assert folders[0] == folders[1] == folders[2]
