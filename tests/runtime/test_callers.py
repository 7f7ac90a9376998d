"""Several callers of one bundle: threads get the bits of one after another, whoever shares what with whom."""

from __future__ import annotations

import os
import shutil
import threading

import numpy as np
import pytest

from dydit.bundle.manifest import PlanKind, Routing
from dydit.diffusion.steps import State
from dydit.errors import BackendError, BundleError
from dydit.runtime.backends.base import BackendOptions
from dydit.runtime.backends.registry import open_backend
from dydit.runtime.loop import MemoryStore, StepRunner, sample
from dydit.runtime.noise_source import SeededNoise
from dydit.runtime.pipeline import DyDiTPipeline
from dydit.runtime.request import make_batches
from dydit.runtime.resident import ResidentSubnets
from tests.fixtures.packages import OPENVINO_AT_RELEASE
from tests.fixtures.simulated_device import SimulatedDeviceBackend

CALLS = 6
PLANS = {
    "per-step": {"plan": PlanKind.PER_STEP},
    "merged": {"max_subnets": 2},
    "dynamic-width": {"plan": PlanKind.DYNAMIC_WIDTH},
    "overflowing": {"plan": PlanKind.DYNAMIC_WIDTH, "routing": Routing.CAPACITY, "capacities": (2, 16, 5)},
}
OPENERS = {
    "onnxruntime": lambda bundle: open_backend("onnxruntime", bundle, BackendOptions(threads=2)),
    "torch": lambda bundle: open_backend("torch", bundle, BackendOptions(threads=1)),
    "openvino": lambda bundle: open_backend("openvino", bundle, BackendOptions(threads=2)),
    "device": lambda bundle: SimulatedDeviceBackend(bundle, BackendOptions(threads=1)),
}


@pytest.fixture(params=PLANS)
def bundle(request, make_bundle):
    """Three steps: every call passes all subnetworks, and threads meet in each."""
    return make_bundle(steps=3, **PLANS[request.param])


def in_threads(*works):
    """Run functions in threads that start together; their results, or the first error."""
    together, results, errors = threading.Barrier(len(works)), [None] * len(works), []

    def run(place, work):
        together.wait()
        try:
            results[place] = work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=each) for each in enumerate(works)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    if errors:
        raise errors[0]
    return results


def calls_of(thread: int) -> list[dict]:
    """Calls of a thread: other labels, seeds, guidance and numbers of images than the other thread's."""
    scales = (4.0, 1.0, 0.0)
    return [
        {
            "class_labels": [(thread + k) % 7, (3 * thread + 2 * k) % 7, 5][: 1 + k % 3],
            "guidance_scale": scales[(k + thread) % 3],
            "seed": 10 * thread + k,
            "output_type": "latent",
        }
        for k in range(CALLS)
    ]


@pytest.mark.parametrize("name", ["onnxruntime", "torch", OPENVINO_AT_RELEASE, "device"])
def test_two_threads_get_the_bits_of_one_after_another(name, bundle):
    with OPENERS[name](bundle) as backend:
        pipe = DyDiTPipeline(backend, 2)
        wanted = [[pipe(**call).latents for call in calls_of(thread)] for thread in range(2)]
        made = in_threads(*(lambda t=t: [pipe(**call).latents for call in calls_of(t)] for t in range(2)))
        pipe.close()
    for ours, theirs in zip(made, wanted, strict=True):
        assert [np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True)] == [True] * CALLS


@pytest.mark.parametrize("name", ["onnxruntime", "torch"])
def test_threads_that_share_a_backend_a_runner_or_subnetworks_take_turns(name, make_bundle):
    """Single steps of all in any order, with room for two subnetworks: none is closed while it runs."""
    bundle = make_bundle(steps=4, plan=PlanKind.PER_STEP)
    model, labels = bundle.manifest.model, np.array([1, 2, 3])
    x, noise = np.random.default_rng(0).standard_normal((2, 3, model.in_channels, 8, 8)).astype(np.float32)
    with OPENERS[name](bundle) as backend, ResidentSubnets(backend, 2) as shared, ResidentSubnets(backend, 2) as own:
        runner, other = StepRunner(backend, shared, labels, 4.0), StepRunner(backend, own, labels, 4.0, images=1)

        def steps(runner, order):
            return {step: runner.run(step, State(x), noise, labels).x_prev for _ in range(6) for step in order}

        wanted = steps(runner, range(4))
        for made in in_threads(
            lambda: steps(runner, (0, 1, 2, 3)), lambda: steps(runner, (3, 1, 2, 0)), lambda: steps(other, (2, 0, 3, 1))
        ):
            assert all(np.array_equal(made[step], wanted[step]) for step in range(4))


def test_closing_waits_for_the_call_and_ends_those_to_come(make_bundle):
    bundle = make_bundle(steps=4, plan=PlanKind.PER_STEP)
    pipe, inside, done = DyDiTPipeline.from_bundle(bundle.path, threads=1), threading.Event(), []

    def call():
        out = pipe([1], seed=0, output_type="latent", progress=lambda *now: inside.set())
        done.append(out.latents)

    thread = threading.Thread(target=call)
    thread.start()
    inside.wait()
    pipe.close()
    assert len(done) == 1 or not thread.is_alive(), "the call came to its end first"
    thread.join()
    with pytest.raises(BackendError, match="this pipeline was closed; open the bundle again"):
        pipe([1])


@pytest.mark.parametrize("name", ["onnxruntime", "torch", OPENVINO_AT_RELEASE, "device"])
def test_a_run_cannot_be_started_from_within_another(name, make_bundle):
    """Weights, engines and buffers are in use; afterwards all is well."""
    bundle = make_bundle(steps=4, plan=PlanKind.DYNAMIC_WIDTH)
    with OPENERS[name](bundle) as backend:
        pipe = DyDiTPipeline(backend)
        wanted = pipe([1, 2], seed=3, output_type="latent").latents
        with pytest.raises(BackendError, match="in the middle of a run; start another one after it"):
            pipe([1, 2], seed=3, output_type="latent", progress=lambda *now: pipe([4], output_type="latent"))
        assert np.array_equal(pipe([1, 2], seed=3, output_type="latent").latents, wanted)


def test_what_another_run_expects_does_not_matter(make_bundle):
    """A runner tells the backend its batch before each step, whatever the last one to ask had said."""
    bundle = make_bundle(steps=4)
    model, labels = bundle.manifest.model, [1, 2, 3]
    noise, batches = SeededNoise(0, (model.in_channels, 8, 8)), make_batches(labels, range(3), 3)
    with OPENERS["onnxruntime"](bundle) as backend, ResidentSubnets(backend) as subnets:
        seen, store = [], MemoryStore()

        def disturb(done, total):
            seen.append(backend._splitting.expected)
            backend.expect(1)

        sample(StepRunner(backend, subnets, labels, 4.0), batches, noise, store, disturb)
    assert seen == [3] * 4


@pytest.mark.parametrize("plan", ["per-step", "dynamic-width"])
@pytest.mark.parametrize("name", ["onnxruntime", "torch", OPENVINO_AT_RELEASE])
def test_a_bundle_that_is_replaced_under_an_open_pipeline_is_not_mixed_with_it(
    name, plan, make_bundle, make_checkpoint, tmp_path
):
    """What is loaded later is of the bundle that was opened, or is refused."""
    bundle, other = (make_bundle(each, steps=3, **PLANS[plan]) for each in (None, make_checkpoint(seed=1)))
    folder = shutil.copytree(bundle.path, tmp_path / "bundle")
    call = {"class_labels": [1], "seed": 0, "output_type": "latent"}
    with DyDiTPipeline.from_bundle(bundle.path, name, threads=1) as pipe:
        wanted = pipe(**call).latents
    with DyDiTPipeline.from_bundle(folder, name, threads=1) as pipe:
        for file in folder.iterdir():
            os.utime(file)
        assert np.array_equal(pipe(**call).latents, wanted), "touched only"
    with DyDiTPipeline.from_bundle(folder, name, threads=1) as pipe:
        shutil.rmtree(folder)
        shutil.copytree(other.path, folder)
        try:
            assert np.array_equal(pipe(**call).latents, wanted), "all was loaded before"
        except BundleError as error:
            assert "after the bundle was opened; open the bundle again" in str(error)


def test_another_working_folder_and_home(make_bundle, tmp_path, monkeypatch):
    bundle = make_bundle(steps=3, **PLANS["per-step"])
    shutil.copytree(bundle.path, tmp_path / "bundle")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("bundle", "~/bundle"):
        with DyDiTPipeline.from_bundle(path, threads=1) as pipe:
            monkeypatch.chdir("/")
            assert pipe(1, output_type="latent").latents.shape == (1, 4, 8, 8)
        monkeypatch.chdir(tmp_path)
