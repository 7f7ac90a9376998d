"""A plan of launches, executed on NumPy arrays with ONNX Runtime's engines, is the sampling loop, bit for bit."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from dydit.bundle.manifest import PlanKind, Routing
from dydit.diffusion.coefficients import NOISE
from dydit.diffusion.samplers import Sampler
from dydit.diffusion.steps import State
from dydit.errors import BackendError
from dydit.runtime.device.execute import Executor
from dydit.runtime.device.inputs import HostInputs, pack, unpack
from dydit.runtime.device.launches import INPUTS_READY, INPUTS_TAKEN, LaunchPlan
from dydit.runtime.device.memory_layout import LaunchOptions, RunShape
from dydit.runtime.device.operations import ALIGNMENT, CONDITIONER, EngineId
from dydit.runtime.loop import MemoryStore, StepRunner, sample
from dydit.runtime.noise_source import SeededNoise
from dydit.runtime.request import make_batches
from dydit.runtime.resident import ResidentSubnets
from tests.fixtures.driver_faults import Check, Fault
from tests.fixtures.states import values_of

LABELS, IMAGES = [3, 1, 3, 0, 6], [0, 1, 2, 40, 41]


def noise_of(bundle, seed=11):
    model = bundle.manifest.model
    return SeededNoise(seed, (model.in_channels, model.input_size, model.input_size))


def by_loop(bundle, backend, size, scale=4.0, seed=11, count=5):
    """The state of each batch by the generic loop, and its stats."""
    store, batches = MemoryStore(), make_batches(LABELS[:count], IMAGES[:count], size)
    with ResidentSubnets(backend) as subnets:
        runner = StepRunner(backend, subnets, LABELS[:count], scale)
        stats = sample(runner, batches, noise_of(bundle, seed), store)
    return [values_of(store.load(b)) for b in range(len(batches))], stats


def by_segments(bundle, backend, size, scale=4.0, seed=11, count=5):
    """The state of each batch where a segment that overflows is repeated whole: what the device is to do, by steps."""
    results, noise = [], noise_of(bundle, seed)
    with ResidentSubnets(backend) as subnets:
        runner = StepRunner(backend, subnets, LABELS[:count], scale)
        for batch in make_batches(LABELS[:count], IMAGES[:count], size):
            state = State(noise.initial(batch))
            for segment in bundle.manifest.plan.segments:
                for subnet in (subnets.get, subnets.full):
                    after, overflow = state, 0
                    for step in segment.steps:
                        drawn = noise.step(batch, step) * (bundle.manifest.sampling.coefficients[step][NOISE] != 0)
                        result = subnet(segment.subnet).step(runner.feeds(step, after, drawn, batch.labels))
                        after, overflow = result.state, overflow + result.overflow.sum()
                    if not overflow:
                        break
                state = after
            results.append(values_of(state if bundle.manifest.sampling.multistep else State(state.x)))
    return results


class Run:
    """An executor on a fake device, which stays between runs."""

    def __init__(self, bundle, fake_device, figures, seed=0, **options):
        activation = lambda engine: 777 + 64 * (engine.subnet or 0)  # noqa: E731
        self.bundle, self.options = bundle, LaunchOptions(**options)
        self.device = fake_device(bundle, activation, seed)
        self.executor = Executor(self.device)
        self.figures = figures(bundle.manifest, activation)

    def __call__(self, size, scale=4.0, seed=11, count=5, done=(), store=None, progress=None):
        batches, store = make_batches(LABELS[:count], IMAGES[:count], size), store or MemoryStore()
        shape = RunShape(tuple(len(b.images) for b in batches), scale != 1, done)
        plan = LaunchPlan(self.bundle.manifest, shape, self.figures, self.options, self.executor.state)
        host = HostInputs(self.bundle, plan.layout, batches, noise_of(self.bundle, seed), store.load, scale)

        def deliver(batch, segments, data, repeated):
            store.save(batch, segments, unpack(plan.layout, len(batches[batch].images), data), repeated)

        counts = self.executor.run(plan, host.array, deliver, progress)
        return [values_of(store.load(b)) for b in range(len(batches))], counts


KINDS = {
    "merged": {"routing": Routing.DENSE},
    "per-step": {"routing": Routing.DENSE, "plan": PlanKind.PER_STEP},
    "one": {"routing": Routing.DENSE, "max_subnets": 1},
    "dynamic": {"routing": Routing.DYNAMIC},
    "capacity": {"routing": Routing.CAPACITY},
    "overflowing": {"routing": Routing.CAPACITY, "capacities": (6, 9, 9)},
    "seldom": {"routing": Routing.CAPACITY, "capacities": (12, 14, 14), "plan": PlanKind.PER_STEP},
    "ddim": {"routing": Routing.DENSE, "sampler": Sampler.DDIM},
    "multistep": {"routing": Routing.DENSE, "sampler": Sampler.DPM_SOLVER},
    "multistep dynamic": {"routing": Routing.DYNAMIC, "sampler": Sampler.DPM_SOLVER},
    "multistep seldom": {
        "routing": Routing.CAPACITY,
        "capacities": (12, 14, 14),
        "plan": PlanKind.PER_STEP,
        "sampler": Sampler.DPM_SOLVER,
    },
    "multistep overflowing": {"routing": Routing.CAPACITY, "capacities": (6, 9, 9), "sampler": Sampler.DPM_SOLVER},
}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *((kind, {"graphs": True, "resident": 2}) for kind in KINDS),
        *((kind, {"graphs": False}) for kind in ("merged", "per-step", "overflowing", "multistep")),
        ("one", {"condition_bytes": 3 * 4 * 20 * 64 * 4}),
        ("one", {"condition_bytes": 4 * 4 * 20 * 64 * 4, "graphs": False}),
        ("overflowing", {"conditioning_steps": 2}),
        ("multistep", {"condition_bytes": 3 * 4 * 20 * 64 * 4}),
    ],
)
def test_the_list_is_the_loop(kind, options, make_bundle, fake_device, figures):
    """Five images in batches of two: the last batch is smaller. Of a multistep sampler, its history too."""
    bundle = make_bundle(**KINDS[kind])
    run = Run(bundle, fake_device, figures, **options)
    latents, counts = run(2)
    expected, stats = by_loop(bundle, run.device.backend, 2)
    assert counts.steps == stats.steps
    whole = by_segments(bundle, run.device.backend, 2)
    for got, same, near in zip(latents, whole, expected, strict=True):
        assert np.array_equal(got, same), np.abs(got - same).max()
        # Where a segment of several steps overflows, the loop repeats one step at full capacity and the device all of
        # them, on matrices of another height: equal up to rounding there, and bit for bit in all other cases.
        bound = 1e-5 if kind.endswith("overflowing") else 0
        assert np.abs(got - near).max() <= bound * np.abs(near).max()
    capturing = options.get("graphs", True) and not kind.endswith("dynamic")
    assert bool(run.device.driver.captures) == capturing
    if capturing:
        assert run.device.driver.captures == 2 * len(bundle.manifest.subnets), "one for each of two sizes of batches"
        assert run.device.driver.replays == counts.steps == 3 * bundle.manifest.sampling.steps
    if kind.endswith(("overflowing", "seldom")):
        assert counts.repeated_steps >= stats.repeated_steps > 0 and counts.overflowed_tokens > 0
        assert kind.endswith("overflowing") or counts.repeated_steps == stats.repeated_steps < counts.steps
    else:
        assert counts.repeated_steps == stats.repeated_steps == counts.overflowed_tokens == 0


def test_without_guidance_half_the_rows_run(make_bundle, fake_device, figures):
    bundle = make_bundle(**KINDS["capacity"])
    run = Run(bundle, fake_device, figures)
    (latents,), _ = run(3, scale=1.0, count=3)
    (expected,), _ = by_loop(bundle, run.device.backend, 3, scale=1.0, count=3)
    assert np.array_equal(latents, expected)
    steps = [feeds for engine, feeds in run.device.log if engine != CONDITIONER]
    assert {len(feeds["condition"]) for feeds in steps} == {3}


@pytest.mark.parametrize("kind", ["merged", "overflowing", "multistep"])
def test_any_order_of_the_streams_gives_the_same(kind, make_bundle, fake_device, figures):
    bundle = make_bundle(**KINDS[kind])
    runs = [Run(bundle, fake_device, figures, seed, resident=2)(1, count=3)[0] for seed in range(3)]
    assert all(np.array_equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("kind", ["merged", "multistep"])
def test_runs_in_a_row_use_memory_engines_and_graphs_again(kind, make_bundle, fake_device, figures):
    bundle = make_bundle(**KINDS[kind])
    run = Run(bundle, fake_device, figures)
    run(2, count=4), run(3, count=3), run(3, count=3, scale=1.0), run(2, count=4)
    memory, captures = dict(run.executor.state.buffers), run.device.driver.captures
    for seed, size, scale in ((1, 2, 4.0), (2, 3, 4.0), (3, 3, 1.0), (4, 2, 4.0), (5, 3, 4.0)):
        count = 4 if size == 2 else 3
        latents, _ = run(size, scale, seed, count)
        expected, _ = by_loop(bundle, run.device.backend, size, scale, seed, count)
        assert all(np.array_equal(a, b) for a, b in zip(latents, expected, strict=True))
    assert run.executor.state.buffers == memory and run.device.driver.captures == captures
    assert len(run.executor.state.engines) == 1 + len(bundle.manifest.subnets)
    run.executor.close()
    assert not run.device.driver.memory and not run.device.engines and not run.device.driver.graphs


@pytest.mark.parametrize("kind", ["overflowing", "multistep", "multistep overflowing"])
def test_a_resumed_run_starts_where_its_store_is(kind, make_bundle, fake_device, figures):
    """Of a multistep sampler, with the history that the store has."""
    bundle = make_bundle(**KINDS[kind])
    whole = MemoryStore()
    first = Run(bundle, fake_device, figures, save_segments=True)
    saved = []
    keep = whole.save

    def save(batch, segments, state, repeated):
        saved.append((batch, segments, copy.deepcopy(state), repeated))
        keep(batch, segments, state, repeated)

    whole.save = save
    latents, counts = first(2, store=whole)
    segments = bundle.manifest.plan.segments
    assert [entry[:2] for entry in saved] == [(b, s + 1) for s in range(len(segments)) for b in range(3)]
    assert sum(entry[3] for entry in saved) == counts.repeated_steps

    def resumed(forgetful):
        part = MemoryStore()
        for batch, after, state, repeated in saved:
            if after == (1, 2, len(segments))[batch]:
                part.save(batch, after, State(state.x) if forgetful else state, repeated)
        again, counts = Run(bundle, fake_device, figures)(2, done=(1, 2, len(segments)), store=part)
        assert counts.steps == 2 * 12 - 2 * segments[0].count - segments[1].count
        return [np.array_equal(a, b) for a, b in zip(latents, again, strict=True)]

    assert resumed(forgetful=False) == [True] * 3
    if bundle.manifest.sampling.multistep:
        assert resumed(forgetful=True) == [False] * 3, "the history matters"


@pytest.mark.parametrize("sampler", [Sampler.DDPM, Sampler.DPM_SOLVER])
def test_a_state_on_the_device_is_its_latents_and_the_history_behind_them(sampler, make_bundle, figures):
    """Each begins at an address that engines accept, whatever the batch."""
    bundle = make_bundle(routing=Routing.DENSE, sampler=sampler)
    multistep, rng = sampler is Sampler.DPM_SOLVER, np.random.default_rng(0)
    for size in (1, 2, 3):
        layout = LaunchPlan(bundle.manifest, RunShape((size,), True), figures(bundle.manifest)).layout
        x, history = rng.standard_normal((2, size, 4, 8, 8)).astype(np.float32)
        data = pack(layout, State(x, history if multistep else None))
        assert data.nbytes == layout.state_bytes(size)
        again = unpack(layout, size, data.view(np.uint8))
        assert np.array_equal(again.x, x)
        if not multistep:
            assert again.history is None and data.nbytes == x.nbytes
            continue
        assert np.array_equal(again.history, history) and layout.history_offset(size) % ALIGNMENT == 0
        assert not unpack(layout, size, pack(layout, State(x))).history.any(), "the first step has a history of zeros"


def test_progress_counts_every_step_of_every_batch(make_bundle, fake_device, figures):
    seen = []
    Run(make_bundle(**KINDS["merged"]), fake_device, figures)(2, progress=seen.append)
    assert sum(seen) == 36
    seen.clear()
    Run(make_bundle(**KINDS["overflowing"]), fake_device, figures, graphs=False)(2, progress=seen.append)
    assert seen == [1] * 36, "repeated steps do not count twice"


def test_the_host_waits_once_for_each_segment_at_most(make_bundle, fake_device, figures):
    merged, seldom = (make_bundle(**KINDS[kind]) for kind in ("merged", "seldom"))
    segments = len(seldom.manifest.plan.segments)
    run = Run(merged, fake_device, figures)
    run(5)
    assert run.device.driver.waits == 1, "for the result alone"
    run = Run(merged, fake_device, figures, resident=2)
    run(5)
    assert run.device.driver.waits == len(merged.manifest.plan.segments) - 2 + 1, "before an engine goes"
    run = Run(seldom, fake_device, figures)
    _, counts = run(5)
    repeats = counts.repeated_steps
    assert 0 < repeats < segments == 12 and run.device.driver.waits == segments + repeats + 1


def test_full_capacity_that_overflows_is_an_error(make_bundle, fake_device, figures):
    bundle = make_bundle(**KINDS["overflowing"])
    run = Run(bundle, fake_device, figures)
    plain = run.device.backend.subnet
    run.device.backend.subnet = lambda index, full_capacity=False: plain(index)
    with pytest.raises(
        BackendError, match=r"segment \d drops tokens even at full capacity; export the bundle and rebuild"
    ):
        run(2)
    run.device.backend.subnet = plain
    run(2)
    assert not any(engine.full for engine in run.device.engines), "the one that failed is gone"
    run.executor.close()
    assert not run.device.engines


def test_after_a_failure_the_device_can_be_used_or_closed(make_bundle, fake_device, figures):
    bundle = make_bundle(**KINDS["merged"])
    run = Run(bundle, fake_device, figures)
    evaluate, calls = run.device.evaluate, []

    def fail_once(*args):
        calls.append(args)
        if len(calls) == 20:
            raise BackendError("the device fell off the bus")
        return evaluate(*args)

    run.device.evaluate = fail_once
    with pytest.raises(BackendError, match="fell off"):
        run(2)
    latents, _ = run(2)
    expected, _ = by_loop(bundle, run.device.backend, 2)
    assert all(np.array_equal(a, b) for a, b in zip(latents, expected, strict=True))
    run.executor.close()
    assert not run.device.driver.memory


@pytest.mark.parametrize("event", [INPUTS_READY, INPUTS_TAKEN])
def test_a_wait_that_is_left_out_is_a_fault(event, make_bundle, fake_device, figures):
    run = Run(make_bundle(**KINDS["merged"]), fake_device, figures)
    wait = run.device.wait
    run.device.wait = lambda stream, name: None if name == event else wait(stream, name)
    with pytest.raises(Fault) as caught:
        run(2)
    assert caught.value.check is Check.ORDER
    run.device.driver.faults.clear()


def test_memory_of_a_graph_that_is_freed_is_a_fault(make_bundle, fake_device, figures):
    """Whatever a step reads or writes keeps its place as long as graphs live."""
    run = Run(make_bundle(**KINDS["merged"]), fake_device, figures)
    run(2)
    with run.device.activate():
        run.device.free(run.executor._buffers["step.condition"][0])
    run.executor._buffers["step.condition"] = (run.executor._buffers["condition"][0], 0)
    with pytest.raises(Fault) as caught:
        run(2)
    assert caught.value.check in (Check.FREED, Check.GRAPH_MEMORY)
    run.device.driver.faults.clear()


def test_a_capture_that_fails_is_ended(make_bundle, fake_device, figures):
    run = Run(make_bundle(**KINDS["merged"]), fake_device, figures)
    launch = run.device.launch

    def refuse(engine, *args):
        if run.device.driver.capturing:
            raise BackendError("this engine cannot be captured")
        launch(engine, *args)

    run.device.launch = refuse
    with pytest.raises(BackendError, match="cannot be captured"):
        run(2)
    assert not run.device.driver.capturing and not run.executor.state.graphs
    run.device.launch = launch
    run(2)


def test_too_little_memory_is_said_before_anything_runs(make_bundle, fake_device, figures):
    run = Run(make_bundle(**KINDS["merged"]), fake_device, figures)
    run.device.driver.limit = 10_000
    with pytest.raises(BackendError, match="out of device memory"):
        run(2)
    assert not run.device.log
    run.device.driver.limit = None
    run(2)


def test_engines_are_those_of_the_plan(make_bundle, fake_device, figures):
    """Every step runs on its segment's subnetwork, and only overflowing segments on full forms."""
    bundle = make_bundle(**KINDS["seldom"])
    run = Run(bundle, fake_device, figures, graphs=False)
    run(5)
    engines = {engine for engine, _ in run.device.log}
    full = {engine for engine in engines if engine.full}
    assert engines - full == {CONDITIONER, *(EngineId(i) for i in range(len(bundle.manifest.subnets)))}
    assert full and len(full) < len(bundle.manifest.subnets)
    assert not any(engine.full for engine in run.executor.state.engines)
