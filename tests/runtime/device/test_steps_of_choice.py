"""A device goes on with other steps of a bundle: engines and weights stay on it, graphs are captured again."""

from __future__ import annotations

import numpy as np
import pytest

from dydit.bundle.bundle import Bundle
from dydit.bundle.manifest import PlanKind, Routing
from dydit.diffusion.samplers import SamplerChoice
from dydit.models.config import Routers
from dydit.planning.resampling import resampled
from dydit.runtime.backends.base import BackendOptions
from dydit.runtime.device.backend import DeviceBackend
from dydit.runtime.device.operations import CONDITIONER, EngineId
from dydit.runtime.device.unit_weights import UnitWeights
from dydit.runtime.loop import MemoryStore, StepRunner, sample
from dydit.runtime.noise_source import SeededNoise
from dydit.runtime.pipeline import DyDiTPipeline
from dydit.runtime.request import make_batches
from dydit.runtime.resident import ResidentSubnets

LABELS, NOISE = [3, 1, 3], SeededNoise(5, (4, 8, 8))
BATCHES = make_batches(LABELS, [0, 1, 2], 2)
OVERFLOWING = {"routing": Routing.CAPACITY, "capacities": (12, 14, 14)}
CHOICES = [SamplerChoice(**each) for each in ({}, {"steps": 6}, {"steps": 5, "sampler": "dpm-solver++"})]


def open_on(bundle, fake_device, devices):
    class Fake(DeviceBackend):
        name = "fake"

    def make():
        devices.append(fake_device(bundle))
        return devices[-1]

    return Fake(bundle, BackendOptions(), make)


def final(backend, whole=True):
    """The latents of a run, by whole runs or by the loop."""
    store = MemoryStore()
    if whole:
        backend.sample_run(BATCHES, NOISE, store, 4.0)
    else:
        with ResidentSubnets(backend, 2) as subnets:
            sample(StepRunner(backend, subnets, LABELS, 4.0), BATCHES, NOISE, store)
    return np.concatenate([store.load(b).x for b in range(len(BATCHES))])


@pytest.fixture(params=["static", "dynamic width, overflowing", "dynamic width, dense"])
def bundle(request, make_bundle, make_checkpoint, small_config):
    if request.param == "static":
        return make_bundle(make_checkpoint(small_config.without_routers()), steps=4)
    routing = {"routing": Routing.DENSE} if "dense" in request.param else OVERFLOWING
    return make_bundle(plan=PlanKind.DYNAMIC_WIDTH, steps=4, **routing)


def test_whole_runs_of_other_steps_and_back(bundle, fake_device, pairwise, monkeypatch):
    """The bits of the loop on the host, whatever ran before. Nothing is loaded or uploaded again."""
    devices, uploaded, weight = [], [], Bundle.weight
    backend = open_on(bundle, fake_device, devices)
    bundles = [resampled(bundle, choice) for choice in CHOICES]
    wanted = [final(pairwise(each), whole=False) for each in bundles]
    monkeypatch.setattr(Bundle, "weight", lambda self, name: uploaded.append(name) or weight(self, name))
    for place in (0, 1, 0, 2, 2, 1, 0):
        backend.use(bundles[place])
        assert np.array_equal(final(backend), wanted[place]), CHOICES[place]
    (device,) = devices
    assert len(uploaded) == len(set(uploaded)), "each tensor of units once"
    loads = [engine for engine in device.loads if engine != CONDITIONER and not engine.full]
    assert loads.count(EngineId(0)) <= 2, "once to measure its memory"
    backend.close()
    assert not device.driver.memory and not device.engines and not device.driver.graphs


def test_graphs_of_the_same_steps_stay(bundle, fake_device):
    devices = []
    backend = open_on(bundle, fake_device, devices)
    final(backend)
    (device,) = devices
    before = device.driver.captures
    backend.use(resampled(bundle, SamplerChoice(steps=4, sampler="ddpm")))
    final(backend)
    assert before == device.driver.captures > 0
    backend.use(resampled(bundle, CHOICES[1]))
    final(backend)
    assert device.driver.captures > before


def test_single_steps_of_other_steps(bundle, fake_device, pairwise):
    devices = []
    backend = open_on(bundle, fake_device, devices)
    pipe = DyDiTPipeline(backend)

    def call(**arguments):
        return pipe(LABELS, seed=5, output_type="latent", callback_on_step_end=lambda *now: {}, **arguments).latents

    def on_host(choice):
        return DyDiTPipeline(pairwise(resampled(bundle, choice)))(LABELS, seed=5, output_type="latent").latents

    wanted = [on_host(choice) for choice in CHOICES]
    arguments = [{}, {"num_inference_steps": 6}, {"num_inference_steps": 5, "sampler": "dpm-solver++"}]
    for place in (0, 1, 2, 0):
        assert np.array_equal(call(**arguments[place]), wanted[place]), CHOICES[place]
    (device,) = devices
    assert device.loads.count(EngineId(0)) == 1, "what all steps run on stays loaded"
    assert not device.driver.replays, "no whole run"
    pipe.close()
    backend.close()
    assert not device.driver.memory and not device.engines


def test_weights_that_lie_elsewhere_are_uploaded_again(
    make_bundle, make_checkpoint, small_config, fake_device, pairwise
):
    """Where any unit may be off, a part with none on has a unit of zeros behind the others, and moves what follows."""
    config = small_config.model_copy(update={"routers": Routers.ALL_ROUTED})
    checkpoint = make_checkpoint(config, seed=1, flops_ratio=0.15)
    bundle = make_bundle(checkpoint, plan=PlanKind.DYNAMIC_WIDTH, routing=Routing.DENSE, steps=2)
    bundles = [bundle, *(resampled(bundle, SamplerChoice(steps=steps)) for steps in (9, 40))]
    places = [UnitWeights(each.manifest) for each in bundles]
    assert not places[1].has_places_of(places[0]) and not places[2].has_places_of(places[0])
    devices = []
    backend = open_on(bundle, fake_device, devices)
    wanted = [final(pairwise(each), whole=False) for each in bundles]
    for place in (0, 1, 2, 0, 2):
        backend.use(bundles[place])
        assert np.array_equal(final(backend), wanted[place])
    pipe = DyDiTPipeline(backend)
    single = [
        pipe(LABELS, seed=5, num_inference_steps=n, output_type="latent", callback_on_step_end=lambda *now: {}).latents
        for n in (2, 40, 2)
    ]
    assert np.array_equal(single[0], single[2])
    for latents, place in zip(single, (0, 2), strict=False):
        host = DyDiTPipeline(pairwise(bundles[place]))
        assert np.array_equal(latents, host(LABELS, seed=5, output_type="latent").latents)
