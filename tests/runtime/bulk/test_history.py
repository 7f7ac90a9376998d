"""Runs of a multistep sampler: what a step hands to the next is kept between segments, and survives an interruption."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dydit.diffusion.samplers import Sampler
from dydit.diffusion.steps import State
from dydit.errors import OutputError
from dydit.runtime.bulk.run import OutputOptions, sample_to_folder
from dydit.runtime.bulk.run_folder import FolderStore, ShareStore
from dydit.runtime.bulk.workers import Worker
from dydit.runtime.pipeline import DyDiTPipeline
from dydit.runtime.request import SampleRequest, make_batches

REQUEST = SampleRequest(labels=(3, 1), num=5, batch_size=2, seed=2, cfg_scale=1.5)
IMAGE = (3, 8, 8)


class Killed(BaseException):
    """Stands for the death of the process: nothing catches it."""


def content(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, by name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def store_in(folder: Path) -> FolderStore:
    """A store of batches of 2, 2 and 1 images."""
    return FolderStore(SimpleNamespace(work=folder), make_batches([3, 1, 3, 1, 3], range(5), 2), IMAGE)


def states(images: int) -> tuple[np.ndarray, np.ndarray]:
    x, history = np.random.default_rng(images).standard_normal((2, images, *IMAGE), np.float32)
    return x, history


def test_a_state_comes_back_with_its_history(tmp_path):
    for batch, images in enumerate((2, 2, 1)):
        x, history = states(images)
        store_in(tmp_path).save(batch, 3, State(x, history), 2)
        again = store_in(tmp_path)
        assert again.done(batch) == 3 and again.repeated_steps([batch]) == 2
        found = again.load(batch)
        assert np.array_equal(found.x, x) and np.array_equal(found.history, history)
        assert found.x.dtype == found.history.dtype == np.float32
    share = ShareStore(store_in(tmp_path), [2, 0])
    assert np.array_equal(share.load(0).history, states(1)[1]) and np.array_equal(share.load(1).history, states(2)[1])
    share.save(0, 4, State(states(1)[1], states(1)[0]), 0)
    assert np.array_equal(store_in(tmp_path).load(2).history, states(1)[0])


def test_a_sampler_without_history_stores_none(tmp_path):
    x, _ = states(2)
    store_in(tmp_path).save(0, 3, State(x), 0)
    found = store_in(tmp_path).load(0)
    assert np.array_equal(found.x, x) and found.history is None
    with_history = io.BytesIO()
    np.savez(with_history, segments=np.int64(3), repeated=np.int64(0), latents=x, history=x)
    assert (tmp_path / "000000.npz").stat().st_size < len(with_history.getvalue()) - x.nbytes // 2


@pytest.mark.parametrize(
    "history", [np.zeros((1, *IMAGE), np.float32), np.zeros((2, 3, 8, 7), np.float32), np.zeros(1, np.float32), None]
)
def test_a_state_whose_history_does_not_fit_starts_again(tmp_path, history):
    """Such as that of an older version, which kept none."""
    x, _ = states(2)
    more = {} if history is None else {"history": history}
    np.savez(tmp_path / "000000.npz", segments=np.int64(3), repeated=np.int64(0), latents=x, **more)
    store = store_in(tmp_path)
    assert store.done(0) == 0
    with pytest.raises(OutputError, match=r"000000\.npz was damaged during the run; run again"):
        store.load(0)


@pytest.fixture(scope="module")
def bundle(make_bundle, pixel_checkpoint):
    """Twelve steps in four segments, and most steps read a history."""
    made = make_bundle(pixel_checkpoint, sampler=Sampler.DPM_SOLVER)
    assert made.manifest.sampling.multistep and len(made.manifest.plan.segments) == 4
    return made


@pytest.fixture(scope="module")
def undisturbed(bundle, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    assert sample_to_folder(bundle, REQUEST, out, OutputOptions(npz=True)).finished
    return out


def killed_at(step: int):
    def progress(done: int, total: int) -> None:
        if done == step:
            raise Killed

    return progress


@pytest.mark.parametrize("step", [14, 22, 31, 35])
@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_a_run_that_was_killed_ends_in_the_same_bytes(bundle, undisturbed, tmp_path, backend, step):
    """All batches pass a segment before the next one, so a killed run goes on from states in the middle."""
    out, outputs, seen = tmp_path / "run", OutputOptions(npz=True), []
    expected = undisturbed
    if backend == "torch":
        expected = tmp_path / "expected"
        sample_to_folder(bundle, REQUEST, expected, outputs, backend)
    with pytest.raises(Killed):
        sample_to_folder(bundle, REQUEST, out, outputs, backend, progress=killed_at(step))
    kept = [np.load(path) for path in sorted((out / ".work").glob("*.npz"))]
    assert kept and all(each["history"].shape == each["latents"].shape for each in kept)
    sample_to_folder(bundle, REQUEST, out, outputs, backend, progress=lambda *now: seen.append(now))
    assert seen[0][0] > 1 and seen[-1] == (36, 36), "it went on from the middle"
    assert content(out) == content(expected)


def test_a_history_that_is_lost_would_show(bundle, undisturbed, tmp_path):
    """So that the test above has something to find."""
    out, outputs = tmp_path / "run", OutputOptions(npz=True, latents_out=tmp_path / "latents.npz")
    sample_to_folder(bundle, REQUEST, tmp_path / "whole", OutputOptions(latents_out=tmp_path / "whole.npz"))
    with pytest.raises(Killed):
        sample_to_folder(bundle, REQUEST, out, outputs, progress=killed_at(31))
    for path in (out / ".work").glob("*.npz"):
        with np.load(path) as file:
            values = dict(file)
        np.savez(path, **{**values, "history": np.empty(0, np.float32)})
    sample_to_folder(bundle, REQUEST, out, outputs)
    with np.load(tmp_path / "latents.npz") as ours, np.load(tmp_path / "whole.npz") as theirs:
        assert not np.array_equal(ours["latents"], theirs["latents"])


def test_workers_and_batches_of_one_give_the_same_images(bundle, undisturbed, tmp_path):
    for number in (1, 0):
        sample_to_folder(bundle, REQUEST, tmp_path / "shared", OutputOptions(npz=True), worker=Worker(number, 2))
    assert content(tmp_path / "shared") == content(undisturbed)
    latents = {}
    for size in (1, 5):
        request = REQUEST.model_copy(update={"batch_size": size})
        file = tmp_path / f"{size}.npz"
        sample_to_folder(bundle, request, tmp_path / f"by-{size}", OutputOptions(latents_out=file))
        with np.load(file) as arrays:
            latents[size] = arrays["latents"]
    assert np.allclose(latents[1], latents[5], rtol=1e-4, atol=1e-4)
    with DyDiTPipeline.from_bundle(bundle.path) as pipe:
        same = pipe([3, 1, 3, 1, 3], REQUEST.cfg_scale, seed=REQUEST.seed, output_type="latent").latents
    assert np.allclose(same, latents[5], rtol=1e-4, atol=1e-4)
