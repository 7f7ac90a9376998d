"""The sampling loop: the same images whatever the batch, plan, routing or backend."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from dydit.bundle.manifest import PlanKind, Routing
from dydit.diffusion.noise import normals
from dydit.diffusion.samplers import Sampler
from dydit.diffusion.steps import State
from dydit.errors import BackendError
from dydit.runtime.backends.base import Backend, BackendOptions, StepResult, Subnet
from dydit.runtime.backends.registry import open_backend
from dydit.runtime.loop import Conditioner, MemoryStore, StepRunner, sample
from dydit.runtime.noise_source import SeededNoise
from dydit.runtime.request import make_batches
from dydit.runtime.resident import ResidentSubnets, default_residency

pytestmark = pytest.mark.numerics

LABELS, IMAGES = [3, 1, 3, 0, 6, 2, 5], [0, 1, 2, 3, 40, 41, 42]


def shape_of(bundle) -> tuple[int, ...]:
    model = bundle.manifest.model
    return (model.in_channels, model.input_size, model.input_size)


def run(
    bundle, size=7, name="onnxruntime", scale=4.0, labels=LABELS, images=IMAGES, resident=None, noise=None, **kwargs
):
    """Latents of a whole run, and its stats."""
    backend = open_backend(name, bundle, BackendOptions(threads=1))
    batches, store = make_batches(labels, images, size), MemoryStore()
    with ResidentSubnets(backend, resident) as subnets:
        runner = StepRunner(backend, subnets, labels, scale)
        stats = sample(runner, batches, noise or SeededNoise(11, shape_of(bundle)), store, **kwargs)
    return np.concatenate([store.load(b).x for b in range(len(batches))]), stats


@pytest.fixture(scope="module")
def merged(make_bundle):
    return make_bundle()


@pytest.fixture(scope="module")
def latents(merged):
    return run(merged)[0]


def test_an_image_is_the_same_alone_and_in_any_batch(merged, latents, relative):
    for size in (1, 3):
        again, _ = run(merged, size)
        assert max(relative(a, b) for a, b in zip(again, latents, strict=True)) < 1e-4
    alone, _ = run(merged, labels=LABELS[4:5], images=IMAGES[4:5])
    assert relative(alone[0], latents[4]) < 1e-4
    assert relative(latents[0], latents[2]) > 0.1, "same label, other noise"


def test_torch_and_onnxruntime_agree(merged, latents, relative):
    other, _ = run(merged, name="torch")
    assert max(relative(a, b) for a, b in zip(other, latents, strict=True)) < 1e-3


@pytest.mark.parametrize(
    "settings",
    [{"plan": PlanKind.PER_STEP}, {"max_subnets": 1}, {"routing": Routing.DENSE}, {"routing": Routing.CAPACITY}],
    ids=["per-step", "one-subnet", "dense", "capacity"],
)
def test_plans_and_routings_agree(settings, make_bundle, latents, relative):
    other, stats = run(make_bundle(**settings))
    assert max(relative(a, b) for a, b in zip(other, latents, strict=True)) < 1e-4
    assert stats.repeated_steps == 0


def test_steps_that_overflow_are_repeated_at_full_capacity(make_bundle, latents, relative):
    tight = make_bundle(routing=Routing.CAPACITY, capacities=(6, 9, 9))
    again, stats = run(tight)
    assert 0 < stats.repeated_steps <= stats.steps == 12
    assert max(relative(a, b) for a, b in zip(again, latents, strict=True)) < 1e-4
    _, stats = run(make_bundle(routing=Routing.CAPACITY))
    assert stats.repeated_steps == 0


def test_guidance_one_runs_half_the_rows(merged, relative):
    """Without guidance the unconditional rows are not computed, and the result is what they would have cancelled to."""
    backend = open_backend("onnxruntime", merged, BackendOptions(threads=1))
    x = np.stack([normals(1, 0, 0, 256).reshape(shape_of(merged))])
    labels = np.array([2])
    with ResidentSubnets(backend) as subnets:
        plain, guided = (StepRunner(backend, subnets, labels, scale) for scale in (1, 4.0))
        feeds = plain.feeds(4, State(x), x, labels), guided.feeds(4, State(x), x, labels)
        assert [len(f["condition"]) for f in feeds] == [1, 2]
        one = {**feeds[1], "cfg_scale": np.asarray(1, np.float32)}
        index = next(s.subnet for s in merged.manifest.plan.segments if 4 in s.steps)
        assert relative(subnets.get(index).step(one).x_prev, plain.run(4, State(x), x, labels).x_prev) < 1e-5
        assert relative(guided.run(4, State(x), x, labels).x_prev, plain.run(4, State(x), x, labels).x_prev) > 1e-3


class CountedNoise(SeededNoise):
    steps: list[int] = []  # noqa: RUF012

    def step(self, batch, step):
        self.steps.append(step)
        return super().step(batch, step)


def test_noise_is_drawn_only_where_it_is_added(merged, make_bundle):
    CountedNoise.steps.clear()
    run(merged, noise=CountedNoise(11, shape_of(merged)))
    assert CountedNoise.steps == list(range(11)), "the last DDPM step adds none"
    for settings, noisy in (
        ({"sampler": Sampler.DDIM}, []),
        ({"sampler": Sampler.DPM_SOLVER}, []),
        ({"sampler": Sampler.DDIM, "eta": 0.5}, list(range(11))),
    ):
        CountedNoise.steps.clear()
        bundle = make_bundle(**settings)
        run(bundle, noise=CountedNoise(11, shape_of(bundle)))
        assert CountedNoise.steps == noisy


def test_progress_counts_every_step_of_every_batch(merged):
    seen = []
    run(merged, size=4, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 24) for i in range(1, 25)]


def test_latents_that_are_not_finite_name_the_segment(merged):
    class Broken(SeededNoise):
        def step(self, batch, step):
            noise = super().step(batch, step).copy()
            if step == 5:
                noise[1] = np.nan
            return noise

    index = next(i for i, s in enumerate(merged.manifest.plan.segments) if 5 in s.steps)
    with pytest.raises(BackendError, match=rf"image 1 hold NaN or infinite values after segment {index} \(steps"):
        run(merged, noise=Broken(11, shape_of(merged)))


@pytest.mark.parametrize("sampler", [Sampler.DDPM, Sampler.DPM_SOLVER])
def test_a_run_goes_on_from_where_its_store_is(sampler, make_bundle):
    bundle = make_bundle(sampler=sampler)
    latents, _ = run(bundle)
    backend = open_backend("onnxruntime", bundle, BackendOptions(threads=1))
    batches, noise, done = make_batches(LABELS, IMAGES, 7), SeededNoise(11, shape_of(bundle)), []

    class Stop(Exception):
        pass

    class Stopping(MemoryStore):
        def save(self, batch, segments, state, repeated):
            super().save(batch, segments, state, repeated)
            if segments == 2 and not done:
                done.append(batch)
                raise Stop

    store = Stopping()
    with ResidentSubnets(backend, 2) as subnets:
        runner = StepRunner(backend, subnets, LABELS, 4.0)
        with pytest.raises(Stop):
            sample(runner, batches, noise, store)
        seen = []
        stats = sample(runner, batches, noise, store, lambda *now: seen.append(now))
    first = sum(s.count for s in bundle.manifest.plan.segments[:2])
    assert stats.steps == 12 - first and seen[0] == (first + 1, 12)
    assert np.array_equal(store.load(0).x, latents)
    assert (store.load(0).history is None) == (sampler is Sampler.DDPM)


def test_a_multistep_run_is_the_same_in_any_batch_and_on_any_backend(make_bundle, relative):
    bundle = make_bundle(sampler=Sampler.DPM_SOLVER)
    latents, _ = run(bundle)
    for again in (run(bundle, 3)[0], run(make_bundle(sampler=Sampler.DPM_SOLVER, plan=PlanKind.DYNAMIC_WIDTH))[0]):
        assert max(relative(a, b) for a, b in zip(again, latents, strict=True)) < 1e-4
    other, _ = run(bundle, name="torch")
    assert max(relative(a, b) for a, b in zip(other, latents, strict=True)) < 1e-3
    tight, stats = run(make_bundle(sampler=Sampler.DPM_SOLVER, routing=Routing.CAPACITY, capacities=(6, 9, 9)))
    assert stats.repeated_steps > 0, "a repeated step starts from the same history"
    assert max(relative(a, b) for a, b in zip(tight, latents, strict=True)) < 1e-4


def test_conditioning_is_computed_for_whole_segments_or_in_bounded_pieces(merged):
    backend = open_backend("onnxruntime", merged, BackendOptions(threads=1))
    calls = []
    plain = backend.conditioning
    backend.conditioning = lambda t, y: calls.append((len(t), len(y))) or plain(t, y)
    null = merged.manifest.model.null_class
    vectors = 4 * (6 * 3 + 2) * 64
    segments = merged.manifest.plan.segments
    once = Conditioner(backend, [*LABELS, null])
    rows = [once.rows(step, np.array([3, 1, null])) for step in range(12) for _ in range(2)]
    assert calls == [(12, 7)], "all segments fit into one table"
    calls.clear()
    room = max(s.count for s in segments)
    grouped = Conditioner(backend, [*LABELS, null], budget=room * 7 * vectors)
    for step in range(12):
        assert np.allclose(grouped.rows(step, np.array([3, 1, null])), rows[2 * step], atol=1e-6)
    assert sum(steps for steps, _ in calls) == 12 and all(steps <= room and labels == 7 for steps, labels in calls)
    ends = np.cumsum([steps for steps, _ in calls])
    assert set(ends) <= {s.first + s.count for s in segments}, "a table ends where a segment does"
    calls.clear()
    pieces = Conditioner(backend, [*LABELS, null], budget=2 * 3 * vectors)
    again = [pieces.rows(step, np.array([3, 1, null])) for step in range(12) for _ in range(2)]
    assert all(steps <= 2 and labels == 3 for steps, labels in calls) and len(calls) == sum(
        -(-s.count // 2) for s in segments
    )
    assert all(np.allclose(a, b, atol=1e-6) for a, b in zip(rows, again, strict=True))
    calls.clear()
    Conditioner(backend, [*LABELS, null], budget=1).rows(0, np.array([3, 3]))
    assert calls == [(1, 1)]


class LoggedBackend(Backend):
    """Loads nothing; tells what is loaded."""

    name = "logged"

    def __init__(self, bundle):
        super().__init__(bundle)
        self.open: set[tuple[int, bool]] = set()
        self.threads: dict[int, str] = {}
        self.peak = 0

    def _conditioning(self, feeds):
        raise NotImplementedError

    def subnet(self, index, full_capacity=False, debug=False):
        backend = self
        if index == 99:
            raise BackendError("no such graph")

        class Logged(Subnet):
            def _step(self, feeds) -> StepResult:
                raise NotImplementedError

            def close(self):
                super().close()
                backend.open.discard((index, full_capacity))

        self.threads[index] = threading.current_thread().name
        self.open.add((index, full_capacity))
        self.peak = max(self.peak, len(self.open))
        return Logged(self, index)


def test_few_subnetworks_are_resident_and_the_next_loads_in_the_background(make_bundle):
    bundle = make_bundle(plan=PlanKind.PER_STEP)
    backend = LoggedBackend(bundle)
    with ResidentSubnets(backend, 2) as subnets:
        for index in range(8):
            subnets.get(index)
            subnets.prefetch(index + 1)
            assert len(subnets) <= 2
        assert backend.open <= {(6, False), (7, False), (8, False)}
        assert all(name != threading.main_thread().name for name in backend.threads.values())
        assert backend.peak <= 3, "the one that goes may overlap the one that comes"
    assert not backend.open, "closing frees all, what was prefetched too"


def test_all_stay_resident_without_a_limit_and_full_forms_go_with_their_subnetwork(make_bundle):
    bundle = make_bundle(plan=PlanKind.PER_STEP)
    backend = LoggedBackend(bundle)
    with ResidentSubnets(backend) as subnets:
        for index in range(8):
            assert subnets.get(index) is subnets.get(index)
        assert len(backend.open) == 8
    with ResidentSubnets(backend, 2) as subnets:
        subnets.get(0)
        assert subnets.full(0) is subnets.full(0)
        subnets.get(1)
        assert (0, True) in backend.open
        subnets.get(2)
        assert backend.open == {(1, False), (2, False)}
    assert default_residency(bundle.manifest) == 2
    assert default_residency(make_bundle().manifest) is None


def test_an_error_while_prefetching_shows_when_it_is_needed(make_bundle):
    with ResidentSubnets(LoggedBackend(make_bundle()), 2) as subnets:
        subnets.prefetch(99)
        with pytest.raises(BackendError, match="no such graph"):
            subnets.get(99)
    with ResidentSubnets(LoggedBackend(make_bundle()), 2) as subnets:
        subnets.prefetch(99)
