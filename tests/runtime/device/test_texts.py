"""Runs of a model that texts condition, on a device: the loop's bits, whatever the texts of each batch are."""

from __future__ import annotations

import numpy as np
import pytest

from dydit.bundle.manifest import PlanKind, Routing
from dydit.bundle.texts import Texts, make_texts, synthetic_texts
from dydit.diffusion.samplers import Sampler, SamplerChoice
from dydit.diffusion.steps import State, run_steps
from dydit.errors import BackendError, ConfigError
from dydit.models.pixart.config import PixArtConfig
from dydit.planning.resampling import resampled
from dydit.runtime.backends.base import BackendOptions
from dydit.runtime.device.backend import DeviceBackend
from dydit.runtime.device.operations import CONDITIONER, TEXT_CONDITIONER
from dydit.runtime.loop import MemoryStore, StepRunner, sample
from dydit.runtime.noise_source import SeededNoise
from dydit.runtime.request import make_batches
from dydit.runtime.resident import ResidentSubnets

LABELS = [3, 3, 1, 0, 2]
BATCHES = make_batches(LABELS, [0, 1, 2, 40, 41], 2)  # with guidance two texts, three, and two
NOISE = SeededNoise(5, (4, 8, 8))
MODEL = PixArtConfig(hidden_size=64, depth=3, num_heads=4, input_size=8, caption_channels=24, text_tokens=6)
OVERFLOWING = {"routing": Routing.CAPACITY, "capacities": (12, 14, 14), "plan": PlanKind.PER_STEP}
KINDS = {
    "merged": {"routing": Routing.DENSE, "max_subnets": 2},
    "ddim": {"routing": Routing.DENSE, "sampler": Sampler.DDIM, "max_subnets": 2},
    "dynamic": {"routing": Routing.DYNAMIC, "max_subnets": 2},
    "overflowing": OVERFLOWING,
    "dynamic width": {**OVERFLOWING, "plan": PlanKind.DYNAMIC_WIDTH},
}


@pytest.fixture
def bundle_of(make_bundle, make_checkpoint):
    """`bundle_of(kind, texts=None)`: a bundle with texts; by default four and a negative one, of different lengths."""

    def make(kind, texts=None):
        exported = make_bundle(make_checkpoint(MODEL), steps=6, **KINDS[kind])
        return exported.with_texts(synthetic_texts(MODEL, 4) if texts is None else texts)

    return make


class Fixture:
    """A backend on fake devices."""

    def __init__(self, bundle, fake_device, graphs=True, **device):
        self.bundle, self.devices = bundle, []

        class Backend(DeviceBackend):
            name = "fake"

        def make():
            self.devices.append(fake_device(bundle, **device))
            return self.devices[-1]

        self.backend = Backend(bundle, BackendOptions(), make, None, graphs)

    @property
    def device(self):
        (device,) = self.devices
        return device

    def run(self, scale=4.0, store=None, batches=BATCHES):
        store = store or MemoryStore()
        stats = self.backend.sample_run(batches, NOISE, store, scale)
        return [store.load(b).x for b in range(len(batches))], stats


def by_loop(backend, scale=4.0, batches=BATCHES):
    store = MemoryStore()
    labels = np.concatenate([batch.labels for batch in batches])
    with ResidentSubnets(backend, 2) as subnets:
        stats = sample(StepRunner(backend, subnets, labels, scale), batches, NOISE, store)
    return [store.load(b).x for b in range(len(batches))], stats


def same(a, b):
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def texts_seen(device):
    """The embeddings that the text graph's engine read at each launch."""
    return [feeds["embeddings"] for engine, feeds in device.log if engine == TEXT_CONDITIONER]


@pytest.mark.parametrize("kind", KINDS)
def test_whole_runs_are_the_loop(kind, bundle_of, fake_device, pairwise):
    """Of two sizes of batches, with guidance and without; graphs are those of the size."""
    bundle = bundle_of(kind)
    fixture = Fixture(bundle, fake_device)
    for scale in (4.0, 1.0, 0.0):
        latents, stats = fixture.run(scale)
        expected, theirs = by_loop(pairwise(bundle), scale)
        assert same(latents, expected)
        assert (stats.steps, stats.repeated_steps) == (theirs.steps, theirs.repeated_steps)
        if scale == 4.0:
            assert (stats.repeated_steps > 0) == ("capacities" in KINDS[kind])
    assert bool(fixture.device.driver.captures) == (kind != "dynamic")
    fixture.backend.close()
    assert not fixture.device.driver.memory and not fixture.device.engines and not fixture.device.driver.graphs


def test_a_text_decides_its_images_alone(bundle_of, fake_device):
    """What repeats of a batch's texts fill up changes nothing; another text changes the images that have it."""
    texts = synthetic_texts(MODEL, 4)
    (first, *_), _ = Fixture(bundle_of("merged", texts), fake_device).run()
    changed = texts.embeddings.copy()
    changed[1] += 1
    other = Texts(changed, texts.mask, negative=True)
    latents, _ = Fixture(bundle_of("merged", other), fake_device).run()
    assert np.array_equal(latents[0], first), "text 1 is not of its batch"
    again, _ = Fixture(bundle_of("merged", texts), fake_device).run()
    assert not np.array_equal(latents[1][0], again[1][0]) and np.array_equal(latents[1][1], again[1][1])


def test_texts_are_computed_once_for_each_visit_and_once_for_a_run_of_one_batch(bundle_of, fake_device):
    fixture = Fixture(bundle_of("overflowing"), fake_device)
    segments = len(fixture.bundle.manifest.plan.segments)
    fixture.run(batches=BATCHES[:1])
    assert len(texts_seen(fixture.device)) == 1 < segments
    fixture.device.log.clear()
    _, stats = fixture.run()
    seen = texts_seen(fixture.device)
    assert 3 * segments <= len(seen) <= 3 * segments + stats.repeated_steps
    assert {each.shape for each in seen} == {(3, 6, 24)}, "the most that a batch has"
    assert fixture.device.loads.count(TEXT_CONDITIONER) == fixture.device.loads.count(CONDITIONER) == 1
    conditions = [feeds["labels"] for engine, feeds in fixture.device.log if engine == CONDITIONER]
    assert not any(labels.any() for labels in conditions), "the condition depends on no text"


def test_a_run_goes_on_from_where_its_store_is(bundle_of, fake_device):
    """Batches have passed different segments; graphs were captured before."""
    fixture = Fixture(bundle_of("overflowing"), fake_device)

    class Stop(Exception):
        pass

    class Stopping:
        def __init__(self):
            self.memory, self.stop = MemoryStore(), True
            self.done, self.load = self.memory.done, self.memory.load

        def save(self, batch, segments, state, repeated):
            self.memory.save(batch, segments, state, repeated)
            if self.stop and (batch, segments) == (1, 3):
                self.stop = False
                raise Stop

    wanted, _ = fixture.run()
    store = Stopping()
    with pytest.raises(Stop):
        fixture.run(store=store)
    assert store.memory.segments == {0: 3, 1: 3, 2: 2}
    latents, stats = fixture.run(store=store)
    assert same(latents, wanted) and stats.steps == 18 - 3 - 3 - 2


def test_other_texts_use_the_graphs_again_where_their_numbers_are_the_same(bundle_of, fake_device, pairwise):
    """Texts of other lengths, or more of them in a batch, need graphs of their own: those hold shapes."""
    bundle = bundle_of("merged")
    fixture = Fixture(bundle, fake_device)
    fixture.run()
    captures = fixture.device.driver.captures
    rng = np.random.default_rng(1)
    equal, short = (rng.standard_normal((5, tokens, 24)).astype(np.float32) for tokens in (6, 2))
    for embeddings, more in ((equal, False), (short, True), (equal, False)):
        other = bundle.with_texts(make_texts(MODEL, embeddings[:4], None, embeddings[4:]))
        fixture.backend.use(other)
        latents, _ = fixture.run()
        assert same(latents, by_loop(pairwise(other))[0])
        assert (fixture.device.driver.captures > captures) == more
        captures = fixture.device.driver.captures
    for labels in ([3, 1, 0, 2], [1, 1, 1, 1], [2, 1, 2, 0]):
        batches = make_batches(labels, [0, 1, 2, 3], 4)
        assert same(fixture.run(batches=batches)[0], by_loop(pairwise(other), batches=batches)[0])


def test_other_steps(bundle_of, fake_device, pairwise):
    bundle = bundle_of("dynamic width")
    fixture = Fixture(bundle, fake_device)
    for choice in (SamplerChoice(), SamplerChoice(steps=4), SamplerChoice(steps=5, sampler="dpm-solver++")):
        chosen = resampled(bundle, choice)
        fixture.backend.use(chosen)
        assert same(fixture.run()[0], by_loop(pairwise(chosen))[0]), choice


@pytest.mark.parametrize("kind", ["merged", "dynamic width"])
def test_single_steps(kind, bundle_of, fake_device, pairwise):
    """The text graph's engine takes two texts at once: more go in parts."""
    bundle = bundle_of(kind)
    fixture = Fixture(bundle, fake_device, texts=(2, 6), activation=lambda engine: 0)
    expected, _ = by_loop(pairwise(bundle))
    with ResidentSubnets(fixture.backend, 2) as subnets:
        runner = StepRunner(fixture.backend, subnets, LABELS, 4.0)
        steps = range(bundle.manifest.sampling.steps)
        state = run_steps(runner.steps_of(BATCHES[1], NOISE), State(NOISE.initial(BATCHES[1])), steps)
    assert np.array_equal(state.x, expected[1])
    assert [len(each) for each in texts_seen(fixture.device)] == [2, 1]


def test_texts_that_the_engines_cannot_take_are_refused(bundle_of, fake_device):
    fixture = Fixture(bundle_of("merged"), fake_device, texts=(5, 4))
    message = r"the texts have 6 tokens, but the model was trained with at most 4, .*; encode the texts again"
    with pytest.raises(BackendError, match=message):
        fixture.run()
    with pytest.raises(BackendError, match=message):
        fixture.backend.text_values(np.array([0]))


def test_a_run_without_texts_is_refused(make_bundle, make_checkpoint, fake_device):
    bundle = make_bundle(make_checkpoint(MODEL), steps=6, **KINDS["merged"])
    with pytest.raises(ConfigError, match="this model is conditioned by texts; give a file of their embeddings"):
        Fixture(bundle, fake_device).run(1.0)


def test_any_order_of_the_streams_gives_the_same(bundle_of, fake_device):
    runs = [Fixture(bundle_of("overflowing"), fake_device, seed=seed, graphs=False) for seed in range(3)]
    latents = [each.run()[0] for each in runs]
    assert all(same(latents[0], each) for each in latents[1:])
