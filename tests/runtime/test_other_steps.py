"""One backend runs other steps and comes back: the bits of a backend of its own, and nothing is loaded twice."""

from __future__ import annotations

import dataclasses
import os
import shutil
import threading
from itertools import pairwise

import numpy as np
import pytest

from dydit.bundle.manifest import PlanKind, Routing
from dydit.diffusion.samplers import Sampler, SamplerChoice
from dydit.diffusion.steps import State
from dydit.errors import BackendError, ConfigError
from dydit.planning.resampling import resampled
from dydit.runtime import dynamic_width
from dydit.runtime.backends import onnxruntime, torch
from dydit.runtime.backends.base import BackendOptions
from dydit.runtime.backends.registry import open_backend
from dydit.runtime.loop import StepRunner
from dydit.runtime.pipeline import DyDiTPipeline
from dydit.runtime.resident import ResidentSubnets
from tests.fixtures.packages import OPENVINO
from tests.fixtures.simulated_device import SimulatedDeviceBackend

OPENERS = {
    "onnxruntime": lambda bundle: open_backend("onnxruntime", bundle, BackendOptions(threads=1)),
    "torch": lambda bundle: open_backend("torch", bundle, BackendOptions(threads=1)),
    "openvino": lambda bundle: open_backend("openvino", bundle, BackendOptions(threads=1)),
    "device": lambda bundle: SimulatedDeviceBackend(bundle, BackendOptions(threads=1)),
}
CHOICES = (
    {},
    {"num_inference_steps": 7},
    {"num_inference_steps": 3, "sampler": "dpm-solver++"},
    {"sampler": Sampler.DDIM, "eta": 0.5},
    {"num_inference_steps": 5, "timestep_spacing": "trailing"},
)
SETTINGS = {
    "dynamic width": {"plan": PlanKind.DYNAMIC_WIDTH},
    "overflowing": {"plan": PlanKind.DYNAMIC_WIDTH, "routing": Routing.CAPACITY, "capacities": (2, 16, 5)},
}


@pytest.fixture(scope="module", params=[*SETTINGS, "static"])
def bundle(request, make_bundle, make_checkpoint, small_config):
    if request.param == "static":
        return make_bundle(make_checkpoint(small_config.without_routers()), steps=4)
    return make_bundle(steps=4, **SETTINGS[request.param])


def call(pipe, **arguments):
    return pipe([1, 2, 5], seed=3, output_type="latent", **arguments).latents


@pytest.mark.parametrize("name", ["onnxruntime", "torch", "device"])
def test_every_choice_has_the_bits_of_a_backend_of_its_own_whatever_ran_before(name, bundle):
    wanted = []
    for choice in CHOICES:
        with OPENERS[name](bundle) as backend:
            wanted.append(call(DyDiTPipeline(backend), **choice))
    assert all(not np.array_equal(one, other) for one, other in pairwise(wanted))
    with OPENERS[name](bundle) as backend:
        pipe = DyDiTPipeline(backend)
        for place in (0, 1, 0, 2, 3, 2, 4, 0, 1):
            assert np.array_equal(call(pipe, **CHOICES[place]), wanted[place]), CHOICES[place]


@pytest.mark.parametrize("name", ["onnxruntime", "torch", OPENVINO])
def test_a_choice_is_the_bundle_that_such_an_export_makes(name, make_bundle, relative):
    choice = {"num_inference_steps": 7, "sampler": "ddim", "timestep_spacing": "leading", "eta": 0.5}
    settings = {"steps": 7, "sampler": "ddim", "spacing": "leading", "eta": 0.5}
    latents = []
    for bundle, arguments in (
        (make_bundle(steps=4, plan=PlanKind.DYNAMIC_WIDTH), choice),
        (make_bundle(plan=PlanKind.DYNAMIC_WIDTH, **settings), {}),
    ):
        with OPENERS[name](bundle) as backend:
            latents.append(call(DyDiTPipeline(backend), **arguments))
    assert relative(*latents) < 1e-4


def test_no_session_is_opened_again(bundle, monkeypatch):
    opened, mapped = [], []
    real, mapping = onnxruntime.Session, dynamic_width.DynamicWidthWeights._map

    def session(file, *arguments):
        opened.append(file.name)
        return real(file, *arguments)

    monkeypatch.setattr(onnxruntime, "Session", session)
    monkeypatch.setattr(
        dynamic_width.DynamicWidthWeights, "_map", lambda self: mapped.append(1) or mapping(self), raising=True
    )
    with OPENERS["onnxruntime"](bundle) as backend:
        pipe = DyDiTPipeline(backend)
        for choice in (*CHOICES, *CHOICES):
            call(pipe, **choice)
    steps = [name for name in opened if not name.startswith("conditioning")]  # which never stays open on a CPU
    assert len(steps) == len(set(steps)), "one for each graph"
    assert len(mapped) == bundle.manifest.dynamic_width


def test_torch_maps_the_weights_once(bundle, monkeypatch):
    mapped, real = [], torch.mapped_weights
    monkeypatch.setattr(torch, "mapped_weights", lambda *arguments: mapped.append(1) or real(*arguments))
    with OPENERS["torch"](bundle) as backend:
        pipe = DyDiTPipeline(backend)
        for choice in CHOICES:
            call(pipe, **choice)
    assert mapped == [1]


def test_a_device_keeps_engines_and_weights(bundle):
    with OPENERS["device"](bundle) as backend:
        pipe = DyDiTPipeline(backend)
        call(pipe)
        executor, loaded = backend._sampler.executor, dict(backend._sampler.executor.device._engines)
        for choice in CHOICES:
            call(pipe, **choice)
        assert backend._sampler.executor is executor
        assert all(executor.device._engines[engine] is session for engine, session in loaded.items())


@pytest.mark.parametrize("name", ["onnxruntime", "torch", "device"])
def test_threads_that_want_other_steps_take_turns(name, make_bundle):
    bundle = make_bundle(steps=4, plan=PlanKind.DYNAMIC_WIDTH)
    with OPENERS[name](bundle) as backend:
        pipes = DyDiTPipeline(backend), DyDiTPipeline(backend, 2)  # each with subnetworks of its own
        wanted = [call(pipes[0], **choice) for choice in CHOICES]
        failed = []

        def work(pipe, order):
            for place in order:
                if not np.array_equal(call(pipe, **CHOICES[place]), wanted[place]):
                    failed.append(place)

        orders = ([0, 1, 2, 3, 4], [4, 2, 0, 1, 3], [1, 1, 0, 2])
        threads = [threading.Thread(target=work, args=(pipes[i % 2], order)) for i, order in enumerate(orders)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed


def test_subnetworks_refuse_other_steps_in_one_line(make_bundle):
    bundle = make_bundle(steps=4)
    with OPENERS["onnxruntime"](bundle) as backend:
        pipe = DyDiTPipeline(backend)
        wanted = call(pipe)
        with pytest.raises(
            ConfigError, match="cannot run 9 steps of ddpm; export again with --dynamic-width"
        ) as caught:
            call(pipe, num_inference_steps=9)
        assert "\n" not in str(caught.value)
        with pytest.raises(ConfigError, match="cannot run 4 steps of dpm-solver"):
            call(pipe, sampler="dpm-solver++")
        assert np.array_equal(call(pipe, num_inference_steps=4), wanted)
        loaded = {index: pipe._subnets.get(index) for index in range(len(bundle.manifest.subnets))}
        assert not np.array_equal(call(pipe, sampler="ddim"), wanted), "of the same timesteps"
        assert all(pipe._subnets.get(index) is subnet for index, subnet in loaded.items()), "and the same subnetworks"
        assert np.array_equal(call(pipe), wanted)


@pytest.mark.parametrize("name", ["onnxruntime", "torch", "device"])
def test_what_is_of_other_steps_is_refused(name, make_bundle):
    bundle = make_bundle(steps=4, plan=PlanKind.DYNAMIC_WIDTH)
    others = resampled(bundle, SamplerChoice(steps=7))
    place = next(
        i for i, entry in enumerate(others.manifest.subnets) if entry not in bundle.manifest.subnets[i : i + 1]
    )
    labels, x = np.array([1]), np.zeros((1, 4, 8, 8), np.float32)
    with OPENERS[name](bundle) as backend, ResidentSubnets(backend) as subnets:
        runner = StepRunner(backend, subnets, labels, 1.0)
        runner.run(0, State(x), x, labels)
        backend.use(others)
        with pytest.raises(BackendError, match="the backend runs other steps now; make another StepRunner for them"):
            runner.run(0, State(x), x, labels)
        stale, feeds = (
            backend.subnet(place),
            StepRunner(backend, subnets, labels, 1.0).feeds(0, State(x), x, labels),
        )
        stale.step(feeds)
        backend.use(bundle)
        with pytest.raises(BackendError, match=f"subnetwork {place} is of other steps than the backend runs now; load"):
            stale.step(feeds)
        runner.run(0, State(x), x, labels)


def test_the_files_of_another_bundle_are_refused(make_bundle, make_checkpoint, tmp_path):
    bundle = make_bundle(steps=4, plan=PlanKind.DYNAMIC_WIDTH)
    copy = dataclasses.replace(bundle, path=shutil.copytree(bundle.path, tmp_path / "copy"))
    other = make_bundle(make_checkpoint(seed=1), steps=4, plan=PlanKind.DYNAMIC_WIDTH)
    with OPENERS["onnxruntime"](bundle) as backend:
        for each in (copy, other, dataclasses.replace(other, path=bundle.path)):
            with pytest.raises(BackendError, match=r"this backend has the files of .*; open another for"):
                backend.use(each)
        assert backend.bundle is bundle
    with pytest.raises(BackendError, match="this backend was closed"):
        backend.use(bundle)


@pytest.mark.parametrize("name", ["onnxruntime", "torch", "device"])
def test_steps_cannot_change_in_the_middle_of_a_run(name, make_bundle):
    bundle = make_bundle(steps=4, plan=PlanKind.DYNAMIC_WIDTH)
    with OPENERS[name](bundle) as backend:
        pipe = DyDiTPipeline(backend)
        wanted = call(pipe)
        with pytest.raises(BackendError, match="in the middle of a run; start another one after it"):
            call(pipe, progress=lambda *now: call(pipe, num_inference_steps=7))
        assert backend.bundle is bundle and np.array_equal(call(pipe), wanted)


def test_what_was_ordered_before_the_steps_changed_is_never_mixed_up(make_bundle, monkeypatch):
    """A load that waits in the background while the backend goes on, and back again."""
    bundle = make_bundle(steps=4, plan=PlanKind.DYNAMIC_WIDTH)
    others = resampled(bundle, SamplerChoice(steps=7))
    last = len(others.manifest.subnets) - 1
    assert last >= len(bundle.manifest.subnets), "it has no such subnetwork"
    with OPENERS["onnxruntime"](bundle) as backend, ResidentSubnets(backend) as subnets:
        gate = threading.Event()
        subnets._loader.submit(gate.wait)
        backend.use(others)
        subnets.prefetch(last)
        subnets.prefetch(0)
        backend.use(bundle)
        gate.set()
        assert subnets.get(0).entry == bundle.manifest.subnets[0]
        backend.use(others)
        for index in (last, 0):
            assert subnets.get(index).entry == others.manifest.subnets[index]
        backend.use(bundle)
        assert subnets.get(0).entry == bundle.manifest.subnets[0]
        kept = set(enumerate(bundle.manifest.subnets))
        assert all(key in kept for key in subnets._loaded), "what the present steps do not have is unloaded"


def test_a_forked_child_runs_other_steps(make_bundle):
    bundle = make_bundle(steps=4, plan=PlanKind.DYNAMIC_WIDTH)
    with OPENERS["onnxruntime"](bundle) as backend:
        pipe = DyDiTPipeline(backend)
        wanted = [call(pipe, **choice) for choice in CHOICES[:2]]
        child = os.fork()
        if not child:
            same = all(np.array_equal(call(pipe, **CHOICES[i]), wanted[i]) for i in (0, 1, 0))
            os._exit(0 if same else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
