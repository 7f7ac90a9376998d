"""Weights that slide on a device: the right units in front, the fewest copies, and runs that are the host's, bit for
bit, however they follow one another."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dydit.bundle.manifest import Manifest, PlanKind, Routing, SubnetEntry
from dydit.bundle.stored_weights import WeightEntry
from dydit.diffusion.samplers import Sampler
from dydit.diffusion.steps import State
from dydit.errors import BackendError
from dydit.models.config import Routers
from dydit.runtime.backends.base import BackendOptions
from dydit.runtime.device import operations as op
from dydit.runtime.device.backend import DeviceBackend
from dydit.runtime.device.execute import Executor
from dydit.runtime.device.launches import LaunchPlan
from dydit.runtime.device.memory_fit import fit_resident
from dydit.runtime.device.memory_layout import LaunchOptions, RunShape
from dydit.runtime.device.operations import CONDITIONER, EngineId
from dydit.runtime.device.residency import engines_of
from dydit.runtime.device.unit_weights import SCRATCH, UNITS, UnitWeights
from dydit.runtime.device.whole_runs import DeviceSampler
from dydit.runtime.dynamic_width import Arrangement
from dydit.runtime.loop import MemoryStore, StepRunner, sample
from dydit.runtime.noise_source import SeededNoise
from dydit.runtime.request import make_batches
from dydit.runtime.resident import ResidentSubnets
from tests.fixtures.states import values_of

LABELS, IMAGES = [3, 1, 3, 0, 6], [0, 1, 2, 40, 41]
ENGINE, FULL = EngineId(0), EngineId(0, full=True)
KINDS = {
    "dynamic": {"routing": Routing.DYNAMIC},
    "dense": {"routing": Routing.DENSE},
    "capacity": {"routing": Routing.CAPACITY},
    "overflowing": {"routing": Routing.CAPACITY, "capacities": (12, 14, 14)},
    "multistep": {"routing": Routing.DENSE, "sampler": Sampler.DPM_SOLVER},
}
TIGHT = {"routing": Routing.CAPACITY, "capacities": (6, 9, 9)}


@pytest.fixture
def sliding(make_bundle, make_checkpoint, small_config):
    """`sliding(empty=False, **settings)`: a bundle; `empty`: one whose blocks have nothing on in some steps."""

    def make(empty=False, **chosen):
        if empty and "capacities" in chosen:
            chosen["capacities"] = (9, 9, 9)  # fewer of its tokens are routed
        all_routed = small_config.model_copy(update={"routers": Routers.ALL_ROUTED})
        checkpoint = make_checkpoint(all_routed, flops_ratio=0.15) if empty else None
        bundle = make_bundle(checkpoint, plan=PlanKind.DYNAMIC_WIDTH, **chosen)
        parts = [units for entry in bundle.manifest.subnets for block in entry.units for units in block]
        assert any(not units for units in parts) == empty and len(bundle.manifest.subnets) > 4
        return bundle

    return make


class EverySegment:
    """A store other than `MemoryStore`, so that every segment is stored; it lists all that it was given."""

    def __init__(self):
        self.saved, self.memory = [], MemoryStore()
        self.done, self.load = self.memory.done, self.memory.load

    def save(self, batch, segments, state, repeated):
        self.saved.append((batch, segments, copy.deepcopy(state)))
        self.memory.save(batch, segments, state, repeated)


class Pair:
    """A fake device and the host's loop, each of which leaves its weights as the last run did."""

    def __init__(self, bundle, fake_device, figures, pairwise, **options):
        self.bundle, self.device, self.host = bundle, fake_device(bundle), pairwise(bundle)
        self.executor = Executor(self.device)
        chosen = LaunchOptions(**options)
        self.sampler = DeviceSampler(self.executor, bundle, figures(bundle.manifest), chosen)

    def given(self, size, seed):
        model = self.bundle.manifest.model
        noise = SeededNoise(seed, (model.in_channels, model.input_size, model.input_size))
        return make_batches(LABELS, IMAGES, size), noise

    def on_device(self, size, scale=4.0, seed=11, store=None):
        batches, noise = self.given(size, seed)
        store = store or MemoryStore()
        stats = self.sampler.sample(batches, noise, store, scale)
        return [values_of(store.load(b)) for b in range(len(batches))], stats

    def by_loop(self, size, scale=4.0, seed=11, store=None):
        batches, noise = self.given(size, seed)
        store = store or MemoryStore()
        with ResidentSubnets(self.host) as subnets:
            stats = sample(StepRunner(self.host, subnets, LABELS, scale), batches, noise, store)
        return [values_of(store.load(b)) for b in range(len(batches))], stats

    def same(self, *arguments, **named):
        """Run both; returns the stats of the device's run."""
        (ours, stats), (theirs, expected) = self.on_device(*arguments, **named), self.by_loop(*arguments, **named)
        assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
        assert (stats.steps, stats.repeated_steps) == (expected.steps, expected.repeated_steps)
        return stats


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_runs_are_the_loop(kind, empty, graphs, sliding, fake_device, figures, pairwise):
    """Several in a row: batches of three and two, then of two and one without guidance, then the first ones again."""
    bundle = sliding(empty, **KINDS[kind])
    pair = Pair(bundle, fake_device, figures, pairwise, graphs=graphs, resident=2)
    repeated = [pair.same(size, scale, seed).repeated_steps for size, scale, seed in ((3, 4.0, 1), (2, 1.0, 2))]
    captures, memory = pair.device.driver.captures, dict(pair.executor.state.buffers)
    repeated.append(pair.same(3, seed=3).repeated_steps)
    assert all(segment.count == 1 for segment in bundle.manifest.plan.segments) or kind != "overflowing"
    assert any(repeated) == (kind == "overflowing")
    assert bool(captures) == (graphs and kind != "dynamic")
    assert pair.device.driver.captures == captures and pair.executor.state.buffers == memory
    full = [FULL] if kind == "overflowing" else []
    assert pair.device.loads == [CONDITIONER, ENGINE, *full], "each engine is loaded once"
    pair.executor.close()
    assert not pair.device.driver.memory and not pair.device.engines and not pair.device.driver.graphs


@pytest.mark.parametrize("graphs", [True, False])
def test_segments_of_several_steps_and_masks_that_come_back(graphs, sliding, fake_device, figures, pairwise):
    bundle = sliding(steps=80, **KINDS["dense"])
    segments = bundle.manifest.plan.segments
    assert any(segment.count > 1 for segment in segments) and len(bundle.manifest.subnets) < len(segments)
    pair = Pair(bundle, fake_device, figures, pairwise, graphs=graphs)
    pair.same(3), pair.same(2, seed=4)


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("sampler", [Sampler.DDPM, Sampler.DPM_SOLVER])
def test_a_resumed_run_starts_from_the_stored_order(empty, sampler, sliding, fake_device, figures, pairwise):
    bundle = sliding(empty, **KINDS["overflowing"], sampler=sampler)
    first = EverySegment()
    Pair(bundle, fake_device, figures, pairwise).on_device(2, store=first)
    last, pair = len(bundle.manifest.plan.segments), Pair(bundle, fake_device, figures, pairwise)
    results = []
    for run in (pair.on_device, pair.by_loop):
        store = MemoryStore()
        for batch, after, state in first.saved:
            if after == (3, 5, last)[batch]:
                store.save(batch, after, state, 0)
        results.append(run(2, store=store))
    assert all(np.array_equal(a, b) for a, b in zip(results[0][0], results[1][0], strict=True))
    assert results[0][1].steps == results[1][1].steps == last - 3 + last - 5


def test_segments_that_overflow_are_repeated_on_their_own_units(
    sliding, make_bundle, fake_device, figures, pairwise, relative_to
):
    """Nearly all of them, and the plan of static subnetworks says the same."""
    pair = Pair(sliding(**TIGHT), fake_device, figures, pairwise)
    latents, stats = pair.on_device(2)
    static = make_bundle(plan=PlanKind.PER_STEP, **TIGHT)
    other, expected = Pair(static, fake_device, figures, pairwise).on_device(2)
    assert stats.repeated_steps == expected.repeated_steps > 12
    assert relative_to(np.concatenate(latents), np.concatenate(other)) < 1e-4


def test_any_order_of_the_streams_gives_the_same(sliding, fake_device, figures, pairwise):
    bundle, results = sliding(True, **KINDS["overflowing"]), []
    for seed in range(3):
        pair = Pair(bundle, lambda bundle, seed=seed: fake_device(bundle, seed=seed), figures, pairwise)
        results.append(pair.on_device(1)[0])
    assert all(np.array_equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("empty", [False, True])
def test_units_move_only_where_some_toggle_and_none_comes_from_the_host_again(empty, sliding, figures):
    manifest = sliding(empty, **KINDS["dense"]).manifest
    plan = LaunchPlan(manifest, RunShape((2, 2, 1), True), figures(manifest), LaunchOptions())
    uploads = [each for each in plan.setup() if isinstance(each, op.Upload) and each.source.kind == "weights"]
    axis = manifest.model.units
    slides = {name: each for name, each in manifest.weights.items() if name in set(unit_names(manifest))}
    assert [each.source.name for each in uploads] == unit_names(manifest) and len(uploads) == len(slides)
    assert [each.nbytes for each in uploads] == [slides[each.source.name].nbytes for each in uploads]
    host, total, captures = Arrangement(axis), 0, []
    zeros = manifest.model.num_heads
    before = [set(range(zeros))] * len(axis.parts)
    for part in plan.segments():
        entry = manifest.subnets[manifest.plan.segments[part.segment].subnet]
        now = [set(units) or {zeros} for _, units in axis.zip(entry.units)]
        exchanged = len(host.arrange(entry.units))
        exchanged += sum((zeros in a) != (zeros in b) for a, b in zip(before, now, strict=True))
        copies = [i for i, each in enumerate(part.run) if isinstance(each, op.Copy) and touches_units(each)]
        assert len(copies) == 3 * 3 * exchanged, "three tensors of a part, three copies for each"
        assert exchanged <= sum(len(b) for a, b in zip(before, now, strict=True) if a != b), "what differs, at most"
        launches = [i for i, each in enumerate(part.run) if isinstance(each, op.Launch | op.WarmUp | op.Replay)]
        assert max(copies, default=-1) < launches[0], "batches follow one another without moves"
        assert not any(isinstance(each, op.Upload) and each.source.kind == "weights" for each in part.run)
        captures += [each for each in part.run if isinstance(each, op.Capture)]
        before, total = now, total + exchanged
    assert total > (30 if empty else 1)
    assert [each.graph.subnet for each in captures[::2]] == list(range(len(manifest.subnets))), "of two sizes each"
    captured = [one for each in captures for one in each.body if isinstance(one, op.Copy)]
    assert captured and not any(touches_units(one) for one in captured)


def unit_names(manifest):
    heads, groups = (("qkv.weight", "qkv.bias", "proj.weight"), ("fc1.weight", "fc1.bias", "fc2.weight"))
    return [f"blocks.{b}.{name}" for b in range(manifest.model.depth) for part in (heads, groups) for name in part]


def touches_units(each: op.Copy) -> bool:
    return not {each.to.buffer, each.source.buffer}.isdisjoint({UNITS, SCRATCH})


def test_one_engine_and_the_weights_are_what_memory_is_counted_for(sliding, figures):
    for kind in ("dense", "overflowing"):
        manifest = sliding(**KINDS[kind]).manifest
        memory, shape = figures(manifest), RunShape((2,), True)
        wanted = {CONDITIONER, ENGINE} | ({FULL} if kind == "overflowing" else set())
        assert set(engines_of(manifest)) == wanted and len(engines_of(manifest)) == len(wanted)
        plan = LaunchPlan(manifest, shape, memory)
        assert plan.memory.engines == sum(memory[engine].weights for engine in wanted)
        assert plan.memory.buffers > plan.buffers[UNITS] > 0
        total = plan.memory.total
        assert fit_resident(manifest, shape, memory, LaunchOptions(), total).resident is None
        with pytest.raises(BackendError, match=r"a batch of 2 images needs .* GiB .* with its one engine loaded, but"):
            fit_resident(manifest, shape, memory, LaunchOptions(), total - 1)


@pytest.mark.parametrize("at", [1, 2, 3, 40])
def test_where_moving_failed_the_weights_are_read_again(at, sliding, fake_device, figures, pairwise):
    pair = Pair(sliding(True, **KINDS["dense"]), fake_device, figures, pairwise)
    copy, calls = pair.device.copy, []

    def failing(to, source, nbytes):
        scratch = pair.executor._buffers[SCRATCH][0]
        calls.append(scratch in (to, source))
        if calls.count(True) == at and calls[-1]:
            raise BackendError("the device fell off the bus")
        copy(to, source, nbytes)

    pair.device.copy = failing
    with pytest.raises(BackendError, match="fell off"):
        pair.on_device(2)
    assert pair.executor.state.unit_order is None
    pair.device.copy = copy
    pair.same(2)


def test_a_full_engine_that_drops_tokens_does_not_stay_twice(sliding, fake_device, figures, pairwise):
    pair = Pair(sliding(**KINDS["overflowing"]), fake_device, figures, pairwise)
    plain = pair.device.backend.subnet
    pair.device.backend.subnet = lambda index, full_capacity=False: plain(index)
    with pytest.raises(BackendError, match="drops tokens even at full capacity"):
        pair.on_device(2)
    assert FULL in pair.executor.state.engines
    pair.device.engines[FULL] = plain(0, full_capacity=True)
    assert pair.on_device(2)[1].repeated_steps > 0
    assert pair.executor.state.engines.count(FULL) == 1


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_single_steps_slide_too(kind, empty, sliding, fake_device, pairwise):
    """In an order that jumps about, two subnetworks open at a time, from the same latents as the host."""
    bundle, devices = sliding(empty, **KINDS[kind]), []

    def make():
        devices.append(fake_device(bundle))
        return devices[-1]

    class Backend(DeviceBackend):
        name = "fake"

    backend, host = Backend(bundle, BackendOptions(), make), pairwise(bundle)
    model, steps = bundle.manifest.model, bundle.manifest.sampling.steps
    noise, batch = (
        SeededNoise(5, (model.in_channels, model.input_size, model.input_size)),
        make_batches([3, 1], [0, 1], 2)[0],
    )
    x, overflowed = noise.initial(batch), 0
    with ResidentSubnets(backend, 2) as ours, ResidentSubnets(host, 2) as theirs:
        runners = [StepRunner(host, theirs, [3, 1], 4.0), StepRunner(backend, ours, [3, 1], 4.0)]
        for step in [*range(steps), 0, steps - 1, steps // 2, *reversed(range(steps))]:
            wanted, got = (runner.run(step, State(x), noise.step(batch, step), batch.labels) for runner in runners)
            assert np.array_equal(got.x_prev, wanted.x_prev) and np.array_equal(got.overflow, wanted.overflow)
            overflowed += got.overflow.any()
            x = wanted.x_prev if step < steps - 1 else noise.initial(batch)
    assert bool(overflowed) == (kind == "overflowing")
    (device,) = devices
    assert device.loads.count(ENGINE) == 1 and set(device.engines) == {CONDITIONER}
    backend.close()
    assert not device.driver.memory and not device.engines


# UnitWeights alone, on bytes.


@st.composite
def slides(draw):
    """Units of the groups of each block, and subnetworks on them."""
    counts = draw(st.lists(st.lists(st.integers(1, 5), min_size=2, max_size=2), min_size=1, max_size=2))
    subset = {n: st.sets(st.integers(0, n - 1)).map(lambda units: tuple(sorted(units))) for n in range(1, 6)}
    units = st.tuples(*[st.tuples(*[subset[count] for count in block]) for block in counts])
    entry = {"file": st.just("sliding.onnx"), "gated": st.just(False), "weight_bytes": st.just(0)}
    return counts, draw(st.lists(st.builds(SubnetEntry, units=units, **entry), min_size=1, max_size=5))


@settings(max_examples=80, deadline=None)
@given(
    slides(), st.lists(st.integers(0, 4), min_size=1, max_size=12), st.sampled_from(["float32", "float16", "bfloat16"])
)
def test_inputs_are_the_units_that_are_on(make_axis, drawn, visits, dtype):
    """Whatever is visited in whatever order: by content, and always at the same addresses."""
    (counts, subnets), rng = drawn, np.random.default_rng(0)
    axis = make_axis(counts)
    shapes, parts = {}, {}
    for part in axis.parts:
        for layer in part.group.layers:
            unit = {layer.weight: (layer.unit_features, layer.features), layer.bias: (layer.unit_features,)}
            for tensor in set(unit) & set(part.group.unit_tensors):
                shapes[part.stored(tensor)], parts[part.stored(tensor)] = (part.group.count, *unit[tensor]), part
    names = [part.stored(tensor) for part in axis.parts for tensor in part.group.unit_tensors]
    weights = {name: WeightEntry(offset=0, shape=shapes[name], dtype=dtype) for name in names}
    manifest = Manifest.model_construct(model=SimpleNamespace(units=axis), subnets=tuple(subnets), weights=weights)
    stored = {
        name: rng.integers(1, 256, (each.shape[0], each.nbytes // each.shape[0]), np.uint8)
        for name, each in weights.items()
    }
    slots = UnitWeights(manifest)
    memory = {name: rng.integers(1, 256, nbytes, np.uint8) for name, nbytes in slots.buffers.items()}
    noted: list[op.UnitOrder | None] = []

    def at(place, nbytes):
        assert place.offset + nbytes <= len(memory[place.buffer])
        return memory[place.buffer][place.offset : place.offset + nbytes]

    def do(ops):
        copies = 0
        for each in ops:
            if isinstance(each, op.Arranged):
                noted.append(each.order)
                continue
            to = at(each.to, each.nbytes)
            if isinstance(each, op.Upload):
                to[:] = stored[each.source.name].reshape(-1)
            elif isinstance(each, op.Clear):
                to[:] = 0
            else:
                assert noted[-1] is None, "while units move nothing is known"
                to[:] = at(each.source, each.nbytes).copy()
                copies += 1
        return copies

    do(slots.fill())
    assert noted == [slots.stored]
    places, addresses = slots.stored, set()
    for visit in visits:
        index = visit % len(subnets)
        ops, places = slots.enter(places, index)
        do(ops)
        assert noted[-1] == places
        assert slots.enter(places, index) == ((), places), "nothing moves that is there"
        bindings = slots.bindings(index)
        assert [each.name for each in bindings] == names
        addresses.add(tuple(each.address for each in bindings))
        for each in bindings:
            part, (_, rows, *rest) = parts[each.name], shapes[each.name]
            wanted = subnets[index].units[part.block][part.index]
            assert each.shape == (max(1, len(wanted)) * rows, *rest) and each.address.offset % op.ALIGNMENT == 0
            found = at(each.address, each.nbytes).reshape(max(1, len(wanted)), -1)
            if wanted:
                assert {row.tobytes() for row in found} == {stored[each.name][unit].tobytes() for unit in wanted}
            else:
                assert not found.any()
    assert len(addresses) == 1, "equal shapes are equal bindings"
