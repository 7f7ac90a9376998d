"""A backend on a device keeps the contract of backends, by single steps and by whole runs."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest

from dydit.bundle.manifest import PlanKind, Routing
from dydit.diffusion.process import Process
from dydit.diffusion.samplers import Sampler
from dydit.diffusion.steps import State
from dydit.errors import BackendError
from dydit.models.uvit.config import preset
from dydit.runtime.backends.base import BackendOptions
from dydit.runtime.backends.onnxruntime import OnnxRuntimeBackend
from dydit.runtime.device.backend import RESERVE, DeviceBackend
from dydit.runtime.device.execute import CaptureError
from dydit.runtime.device.launches import EngineMemory
from dydit.runtime.device.operations import CONDITIONER, DECODER, EngineId
from dydit.runtime.images.vae_decoder import VaeDecoder
from dydit.runtime.loop import MemoryStore, StepRunner, sample
from dydit.runtime.noise_source import SeededNoise
from dydit.runtime.request import make_batches
from dydit.runtime.resident import ResidentSubnets
from tests.fixtures.states import values_of

LABELS, IMAGES = [3, 1, 3, 0, 6], [0, 1, 2, 40, 41]
OVERFLOWING = {"routing": Routing.CAPACITY, "capacities": (12, 14, 14), "plan": PlanKind.PER_STEP}

PLANS = (PlanKind.PER_STEP, PlanKind.MAX_SUBNETS, PlanKind.DYNAMIC_WIDTH)
# Each sampler, plan and routing mode, and each pair of the last two.
EVERY_MODE = [
    (plan, routing, list(Sampler)[(3 * i + j) % len(Sampler)])
    for (i, plan), (j, routing) in itertools.product(enumerate(PLANS), enumerate(Routing))
]


class EverySegment:
    """A store other than `MemoryStore`, so that every segment is stored."""

    def __init__(self):
        self.memory = MemoryStore()
        self.segments = self.memory.segments
        self.done, self.load = self.memory.done, self.memory.load

    def save(self, batch, segments, state, repeated):
        self.memory.save(batch, segments, state, repeated)


class Fixture:
    def __init__(self, bundle, fake_device, known=None, graphs=True, **device):
        self.devices, self.kept = [], []

        def make():
            self.devices.append(fake_device(bundle, **device))
            return self.devices[-1]

        fixture = self

        class Backend(DeviceBackend):
            name = "fake"

            def _keep_memory(self, memory):
                fixture.kept.append(dict(memory))

        self.backend = Backend(bundle, BackendOptions(), make, known, graphs)
        self.bundle = bundle
        self.batches = make_batches(LABELS, IMAGES, 2)
        model = bundle.manifest.model
        self.noise = SeededNoise(5, (model.in_channels, model.input_size, model.input_size))

    def run(self, scale=4.0, store=None, progress=None):
        store = store or MemoryStore()
        stats = self.backend.sample_run(self.batches, self.noise, store, scale, progress)
        return [values_of(store.load(b)) for b in range(len(self.batches))], stats

    def loop(self, backend, scale=4.0):
        store = MemoryStore()
        with ResidentSubnets(backend, 2) as subnets:
            stats = sample(StepRunner(backend, subnets, LABELS, scale), self.batches, self.noise, store)
        return [values_of(store.load(b)) for b in range(len(self.batches))], stats


@pytest.fixture
def expected(pairwise):
    def of(fixture, scale=4.0):
        return fixture.loop(pairwise(fixture.bundle), scale)

    return of


def same(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def stepwise(fixture, scale=4.0):
    """The generic loop on single steps."""
    store = MemoryStore()
    with ResidentSubnets(fixture.backend, 2) as subnets:
        runner = StepRunner(fixture.backend, subnets, LABELS, scale)
        for b, batch in enumerate(fixture.batches):
            state = State(fixture.noise.initial(batch))
            for step in range(fixture.bundle.manifest.sampling.steps):
                state = runner.run(step, state, fixture.noise.step(batch, step), batch.labels).state
            store.save(b, 0, state, 0)
    return [values_of(store.load(b)) for b in range(len(fixture.batches))]


@pytest.mark.parametrize("sampler", [Sampler.DDPM, Sampler.DPM_SOLVER])
def test_single_steps_are_those_of_the_engines(sampler, make_bundle, fake_device, relative_to):
    fixture = Fixture(make_bundle(**OVERFLOWING, sampler=sampler), fake_device, activation=lambda engine: 0)
    ours = stepwise(fixture)
    theirs, stats = fixture.loop(OnnxRuntimeBackend(fixture.bundle, BackendOptions(threads=1)))
    assert stats.repeated_steps > 0
    assert max(relative_to(a, b) for a, b in zip(ours, theirs, strict=True)) < 1e-5
    (device,) = fixture.devices
    assert set(device.engines) == {CONDITIONER}, "closed subnetworks are gone"
    fixture.backend.close()
    assert not device.driver.memory and not device.engines


@pytest.mark.parametrize("wrong", [None, EngineId(0), EngineId(1)])
def test_engines_that_need_more_than_was_reported_are_measured(wrong, make_bundle, fake_device, figures, expected):
    """The run starts again, from the segments that are stored."""
    bundle = make_bundle(**OVERFLOWING)
    known = figures(bundle.manifest)
    if wrong is not None:
        known[wrong] = EngineMemory(10, 10_000)
    fixture = Fixture(bundle, fake_device, known=known, activation=lambda each: 5000 if each == wrong else 1000)
    store = EverySegment()
    latents, _ = fixture.run(store=store)
    assert same(latents, expected(fixture)[0])
    if wrong is None:
        assert not fixture.kept and len(fixture.devices) == 1
        return
    first, second = fixture.devices
    assert not first.driver.memory and not first.engines
    assert fixture.kept[0][wrong].activation == 5000 and second.loads[:2] == [CONDITIONER, EngineId(0)]
    fixture.run()
    assert len(fixture.devices) == 2, "it is known now"


def test_conditioning_is_cut_to_what_the_engine_takes(make_bundle, fake_device, relative_to):
    fixture = Fixture(make_bundle(), fake_device, longest=(3, 2))
    timesteps, labels = np.arange(7, dtype=np.float32) * 100, np.array([0, 3, 1, 6, 2])
    ours = fixture.backend.conditioning(timesteps, labels)
    theirs = OnnxRuntimeBackend(fixture.bundle).conditioning(timesteps, labels)
    assert ours.shape == theirs.shape and relative_to(ours, theirs) < 1e-6


@pytest.mark.parametrize("sampler", [Sampler.DDPM, Sampler.DPM_SOLVER])
@pytest.mark.parametrize("kind", [{}, {"routing": Routing.DENSE}, OVERFLOWING], ids=["dynamic", "dense", "overflowing"])
def test_a_whole_run_is_the_loop(kind, sampler, make_bundle, fake_device, expected):
    fixture = Fixture(make_bundle(**kind, sampler=sampler), fake_device)
    wanted, theirs = expected(fixture)
    seen = []
    for store in (MemoryStore(), EverySegment()):
        seen.clear()
        latents, stats = fixture.run(store=store, progress=lambda *now: seen.append(now))
        assert same(latents, wanted)
        assert (stats.images, stats.steps, stats.repeated_steps) == (5, theirs.steps, theirs.repeated_steps)
        assert seen[-1] == (36, 36) and seen == sorted(seen)
    (device,) = fixture.devices
    memory = sum(device.driver.memory.values())
    fixture.run()
    assert sum(device.driver.memory.values()) == memory


@pytest.mark.parametrize(("plan", "routing", "sampler"), EVERY_MODE)
def test_every_sampler_plan_and_routing_mode_is_the_loop(
    plan, routing, sampler, small_config, make_checkpoint, make_bundle, fake_device, expected
):
    """Batches of two images and of one. No token overflows: of a repeated segment, values are equal up to rounding."""
    flow = sampler in (Sampler.EULER, Sampler.EULER_MARUYAMA)
    process = Process(schedule="flow", prediction="velocity") if flow else None
    settings = {"plan": plan, "routing": routing, "sampler": sampler, "steps": 5}
    settings |= {"max_subnets": 2} if plan is PlanKind.MAX_SUBNETS else {}
    settings |= {"capacities": (16, 16, 16)} if routing is Routing.CAPACITY else {}
    checkpoint = make_checkpoint(small_config.model_copy(update={"process": process}))
    fixture = Fixture(make_bundle(checkpoint, **settings), fake_device)
    latents, stats = fixture.run()
    assert same(latents, expected(fixture)[0]) and stats.steps == 3 * 5 and not stats.repeated_steps


@pytest.mark.parametrize("sampler", [Sampler.DDPM, Sampler.DPM_SOLVER])
def test_a_run_goes_on_from_where_its_store_is(sampler, make_bundle, fake_device, expected):
    fixture = Fixture(make_bundle(**OVERFLOWING, sampler=sampler), fake_device)
    wanted, _ = expected(fixture)

    class Stop(Exception):
        pass

    class Stopping(EverySegment):
        stop = True

        def save(self, batch, segments, state, repeated):
            self.memory.save(batch, segments, state, repeated)
            if self.stop and (batch, segments) == (1, 3):
                self.stop = False
                raise Stop

    store = Stopping()
    with pytest.raises(Stop):
        fixture.run(store=store)
    assert store.segments == {0: 3, 1: 3, 2: 2}
    latents, stats = fixture.run(store=store)
    assert same(latents, wanted) and stats.steps == 36 - 3 - 3 - 2
    again, stats = fixture.run(store=store)
    assert stats.steps == 0 and same(again, wanted)


def test_many_batches_go_in_several_passes(make_bundle, fake_device, expected, monkeypatch):
    monkeypatch.setattr("dydit.runtime.device.whole_runs.BATCHES", 2)
    fixture = Fixture(make_bundle(routing=Routing.DENSE), fake_device)
    latents, stats = fixture.run()
    assert same(latents, expected(fixture)[0]) and stats.steps == 36


@pytest.mark.parametrize("kind", [CaptureError, BackendError])
def test_where_graphs_cannot_be_captured_it_runs_without(make_bundle, fake_device, expected, kind):
    """Whatever fails in a capture may work outside of one."""

    class Refusing(fake_device):
        def launch(self, *arguments):
            if self.driver.capturing:
                raise kind("this engine cannot be captured")
            super().launch(*arguments)

    fixture = Fixture(make_bundle(routing=Routing.DENSE), Refusing)
    with pytest.warns(UserWarning, match="cannot be captured; continuing without CUDA graphs"):
        latents, _ = fixture.run()
    assert same(latents, expected(fixture)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fixture.run()
        assert not fixture.devices[0].driver.graphs and fixture.devices[0].driver.replays == 0
        fixture.backend._clear_runs()
        fixture.run()
    assert len(fixture.devices) == 2 and not fixture.devices[1].driver.captures, "it is tried and said once"


def test_what_engines_need_is_found_out_once(make_bundle, fake_device):
    bundle = make_bundle(**OVERFLOWING)
    fixture = Fixture(bundle, fake_device)
    fixture.run(), fixture.run()
    subnets = len(bundle.manifest.subnets)
    assert len(fixture.kept) == 1 and len(fixture.kept[0]) == 1 + 2 * subnets
    first = fixture.devices[0].loads[: 1 + 2 * subnets]
    assert len(set(first)) == len(first) == 1 + 2 * subnets
    known = Fixture(bundle, fake_device, fixture.kept[0])
    known.run()
    assert not known.kept
    assert [engine for engine in known.devices[0].loads[:3]] == [CONDITIONER, EngineId(0), EngineId(1)]
    some = {engine: figures for engine, figures in fixture.kept[0].items() if not engine.full}
    part = Fixture(bundle, fake_device, some)
    part.run()
    assert part.kept == fixture.kept


def test_residency_follows_the_memory_that_is_free(make_bundle, fake_device, expected):
    bundle = make_bundle(routing=Routing.DENSE)
    known = {EngineId(i): EngineMemory(1000, 1 << 30) for i in range(len(bundle.manifest.subnets))}
    known[CONDITIONER] = EngineMemory(1000, 1 << 30)
    fixture = Fixture(bundle, fake_device, known)
    fixture.backend._sampler  # noqa: B018  (opens the device)
    (device,) = fixture.devices
    peaks = []
    load = device.load

    def watched(engine):
        load(engine)
        peaks.append(len(device.engines))

    device.load = watched
    device.driver.free_bytes = RESERVE + (5 << 29)
    latents, _ = fixture.run()
    assert max(peaks) == 3, "the conditioning and two subnetworks"
    assert same(latents, expected(fixture)[0])
    small = Fixture(bundle, fake_device, known)
    small.backend._sampler  # noqa: B018
    small.devices[0].driver.free_bytes = RESERVE + (1 << 30)
    with pytest.raises(BackendError, match=r"needs 3.0 GiB .* with two subnetworks loaded, but only 2.0 GiB are free"):
        small.run()


def test_a_batch_that_the_conditioning_cannot_take_is_refused(make_bundle, fake_device):
    fixture = Fixture(make_bundle(), fake_device, longest=(3, 3))
    with pytest.raises(BackendError, match=r"at most 3 labels at once, but this batch has 4; use a smaller batch size"):
        fixture.run()
    assert len(fixture.run(scale=1.0)[0]) == 3


def test_latents_that_are_not_finite_are_refused(make_bundle, fake_device):
    fixture = Fixture(make_bundle(routing=Routing.DENSE), fake_device)

    class Broken(SeededNoise):
        def step(self, batch, step):
            noise = super().step(batch, step).copy()
            if step == 5:
                noise[-1] = np.nan
            return noise

    fixture.noise = Broken(5, fixture.noise.shape)
    with pytest.raises(BackendError, match="the latents of image 1 hold NaN or infinite values after 4 segments"):
        fixture.run()
    segment = next(i for i, s in enumerate(fixture.bundle.manifest.plan.segments) if 5 in s.steps)
    with pytest.raises(BackendError, match=f"image 1 hold NaN or infinite values after {segment + 1} segments"):
        fixture.run(store=EverySegment())


def test_debug_is_refused(make_bundle, fake_device):
    with pytest.raises(BackendError, match="cannot return values between layers; use backend='onnxruntime'"):
        Fixture(make_bundle(), fake_device).backend.subnet(0, debug=True)


def test_a_subnetwork_that_two_loaded_stays_for_the_other(make_bundle, fake_device):
    fixture = Fixture(make_bundle(), fake_device)
    first, second = fixture.backend.subnet(0), fixture.backend.subnet(0)
    (device,) = fixture.devices
    first.close(), first.close()
    assert EngineId(0) in device.engines
    second.close()
    assert EngineId(0) not in device.engines


def test_a_backend_that_nobody_holds_frees_the_device(make_bundle, fake_device):
    import gc

    fixture = Fixture(make_bundle(routing=Routing.DENSE), fake_device)
    fixture.run()
    (device,) = fixture.devices
    assert device.driver.memory
    del fixture.backend
    gc.collect()
    assert not device.driver.memory and not device.engines and not device.driver.graphs


def latents_of(count):
    return np.random.default_rng(count).standard_normal((count, 4, 8, 8)).astype(np.float32)


def test_the_decoder_is_an_engine_like_the_others(vae_bundle, fake_device, relative_to):
    """At most three tiles at once, which is what the engine takes."""
    fixture = Fixture(vae_bundle, fake_device)
    theirs = VaeDecoder(vae_bundle.path, vae_bundle.manifest.vae).decode(latents_of(7))
    ours = fixture.backend.decode(latents_of(7))
    assert ours.shape == (7, 3, 16, 16) and relative_to(ours, theirs) < 1e-5
    (device,) = fixture.devices
    assert [len(feeds["latents"]) for engine, feeds in device.log if engine == DECODER] == [3, 3, 1]
    fixture.backend.decode(latents_of(2))
    assert device.loads == [DECODER]
    fixture.backend.close()
    assert not device.driver.memory and not device.engines


def test_the_decoder_takes_the_place_of_runs_where_there_is_none_else(vae_bundle, fake_device, expected):
    fixture = Fixture(vae_bundle, fake_device)
    latents, _ = fixture.run()
    (running,) = fixture.devices

    class Full(fake_device):
        def allocate(self, nbytes):
            if running.driver.memory:
                raise BackendError("the GPU cannot allocate")
            return super().allocate(nbytes)

    def make():
        fixture.devices.append(Full(vae_bundle) if len(fixture.devices) == 1 else fake_device(vae_bundle))
        return fixture.devices[-1]

    fixture.backend._make_device = make
    assert fixture.backend.decode(latents[0]).shape == (2, 3, 16, 16)
    assert not running.driver.memory and not running.engines and not running.driver.graphs
    again, _ = fixture.run()
    assert same(again, latents) and len(fixture.devices) == 3


def test_a_decoder_that_fails_without_a_run_to_blame_is_an_error(vae_bundle, fake_device):
    fixture = Fixture(vae_bundle, fake_device, limit=1000)
    with pytest.raises(BackendError, match="out of device memory"):
        fixture.backend.decode(latents_of(1))


@pytest.mark.parametrize("classes", [{"num_classes": 7, "null_class_row": True}, {}], ids=["classes", "unconditional"])
def test_a_run_of_a_u_vit_is_the_loop(classes, make_checkpoint, make_bundle, fake_device, expected):
    config = preset("cifar10-S/2", hidden_size=32, depth=3, num_heads=4, input_size=8, **classes)
    bundle = make_bundle(make_checkpoint(config), **OVERFLOWING)
    fixture, scale = Fixture(bundle, fake_device), 1.4 if classes else 1.0
    fixture.batches = make_batches(LABELS if classes else [0] * 5, IMAGES, 2)
    wanted, theirs = expected(fixture, scale)
    latents, stats = fixture.run(scale)
    assert same(latents, wanted) and 0 < stats.repeated_steps == theirs.repeated_steps
