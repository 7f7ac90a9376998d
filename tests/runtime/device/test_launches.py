"""Laws of the list of operations, whatever the plan, the batches and the options: symbolically executed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, find, given, settings
from hypothesis import strategies as st

from dydit.bundle.manifest import Manifest, PlanEntry, PlanKind, Routing, SamplingEntry, SegmentEntry, SubnetEntry
from dydit.bundle.stored_weights import Precision
from dydit.diffusion.coefficients import COEFFICIENTS, NOISE
from dydit.diffusion.samplers import Sampler
from dydit.errors import BackendError, ConfigError
from dydit.models.dit.config import DiTConfig
from dydit.runtime.device import operations as op
from dydit.runtime.device.launches import WORKSPACE, DeviceState, EngineMemory, LaunchPlan
from dydit.runtime.device.memory_fit import fit_resident
from dydit.runtime.device.memory_layout import LaunchOptions, RunShape
from dydit.runtime.device.operations import ALIGNMENT, CONDITIONER, EngineId
from dydit.runtime.device.residency import engines_of, plan_residency

ROW_BYTES = 4 * len(COEFFICIENTS)


@st.composite
def manifests(draw) -> Manifest:
    """Plans of up to 9 steps, on subnetworks that segments may share, of samplers with history and without; unchecked,
    as only the launches read them."""
    counts = draw(st.lists(st.integers(1, 3), min_size=1, max_size=5))
    steps = sum(counts)
    subnets = draw(st.lists(st.integers(0, 3), min_size=len(counts), max_size=len(counts)))
    routing = draw(st.sampled_from([None, *Routing]))
    model = small_model(draw(st.sampled_from([16, 64])))
    full = draw(st.booleans()) and routing is Routing.CAPACITY
    entries = [
        SubnetEntry(
            file=f"subnet-{index:04d}.onnx",
            units=(),
            gated=draw(st.booleans()),
            full_file=f"subnet-{index:04d}-full.onnx" if full else None,
            weight_bytes=0,
        )
        for index in range(4)
    ]
    firsts = [sum(counts[:i]) for i in range(len(counts))]
    noisy = draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=steps, max_size=steps))
    history = draw(st.sampled_from([0.0, -0.5]))
    segments = tuple(
        SegmentEntry(first=first, count=count, subnet=subnet)
        for first, count, subnet in zip(firsts, counts, subnets, strict=True)
    )
    return Manifest.model_construct(
        model=model,
        sampling=SamplingEntry(
            sampler=Sampler.DDPM,
            timesteps=tuple(map(float, range(steps)))[::-1],
            coefficients=tuple((1.0, 1.0, history, noise, 0.0, 0.0, history, history) for noise in noisy),
            cfg_channels=3,
        ),
        plan=PlanEntry(kind=PlanKind.MAX_SUBNETS, segments=segments, macs=1, per_step_macs=1, static_macs=1),
        subnets=tuple(entries),
        routing=routing,
        precision=Precision.FP32,
        max_batch=4,
    )


def small_model(hidden: int):

    return DiTConfig(hidden_size=hidden, depth=2, num_heads=2, patch_size=2, input_size=4, in_channels=3, num_classes=5)


shapes = st.builds(RunShape, st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple), st.booleans(), st.just(()))
options = st.builds(
    LaunchOptions,
    graphs=st.booleans(),
    resident=st.sampled_from([None, 2, 3]),
    condition_bytes=st.sampled_from([1, 30_000, 1 << 30]),
    conditioning_steps=st.sampled_from([2, 100]),
    save_segments=st.booleans(),
)


@dataclass
class Machine:
    """Executes operations on tags instead of numbers: what lies where, and which step of which batch it belongs to."""

    plan: LaunchPlan
    memory: dict[EngineId, EngineMemory]
    state: DeviceState = field(default_factory=DeviceState)
    tags: dict[str, dict[int, tuple]] = field(default_factory=dict)
    bodies: dict[op.GraphKey, tuple] = field(default_factory=dict)
    launched: list[tuple[int, int]] = field(default_factory=list)
    peak: int = 0
    batch: int | None = None
    replayed: int | None = None
    warming: bool = False
    recorded: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.buffers, self.engines = dict(self.state.buffers), list(self.state.engines)
        self.tags |= {name: self.tags.get(name, {}) for name in self.buffers}

    def after(self) -> DeviceState:
        return DeviceState(dict(self.buffers), tuple(self.engines), frozenset(self.bodies))

    def do(self, *ops: op.Operation) -> None:
        for each in ops:
            getattr(self, type(each).__name__)(each)

    # memory

    def Allocate(self, each):
        assert each.buffer not in self.buffers and each.nbytes > 0
        self.buffers[each.buffer], self.tags[each.buffer] = each.nbytes, {}

    def Free(self, each):
        assert not self.bodies or each.buffer in (
            "latents.0",
            "latents.1",
            "labels",
            "labels.all",
            "timesteps",
            "condition",
            "overflow",
            "overflow.visit",
            "records",
            "records.next",
        )
        del self.buffers[each.buffer], self.tags[each.buffer]

    def _within(self, place: op.Address, nbytes: int):
        assert place.offset >= 0 and place.offset + nbytes <= self.buffers[place.buffer], (place, nbytes)

    def _erase(self, place: op.Address, nbytes: int):
        self._within(place, nbytes)
        tags = self.tags[place.buffer]
        for offset in [o for o in tags if place.offset <= o < place.offset + nbytes]:
            del tags[offset]
        for offset, tag in list(tags.items()):
            assert offset < place.offset or offset >= place.offset + nbytes
            if offset < place.offset < offset + tag[-1]:
                del tags[offset]

    def _put(self, place: op.Address, nbytes: int, *tag):
        self._within(place, nbytes)
        self.tags[place.buffer][place.offset] = (*tag, nbytes)

    def _read_zeros(self, place: op.Address, nbytes: int):
        found = self.tags[place.buffer][place.offset]
        assert found[0] == "zeros" and found[1] >= nbytes

    def _put_state(self, place: op.Address, size: int, batch: int, step: int):
        """A batch's latents before a step and, of a multistep sampler, its history."""
        nbytes, layout = size * self.plan.layout.image_bytes, self.plan.layout
        self._put(place, nbytes, "x", batch, step)
        if layout.multistep:
            behind = dataclasses.replace(place, offset=place.offset + layout.history_offset(size))
            self._put(behind, nbytes, "history", batch, step)

    def _put_record(self, place: op.Address, step: int, batch: int | None):
        """A step's coefficients, its gates and, where some step adds noise, its noise or zeros."""
        parts = self.plan.layout.record_parts(place)
        self._put(parts["coefficients"], ROW_BYTES, "coefficients", step)
        if self.plan.layout.gated:
            self._put(parts["gates"], 4 * 2 * 2 * 2, "gates", step)
        if batch is not None:
            noise = ("noise", batch, step) if self.plan.layout.adds_noise(step) else ("zeros",)
            self._put(parts["noise"], self.plan.layout.shape.sizes[batch] * self.plan.layout.image_bytes, *noise)

    def _read(self, place: op.Address, nbytes: int, *tag):
        self._within(place, nbytes)
        found = self.tags[place.buffer].get(place.offset)
        assert found is not None, f"{place} was never written; wanted {tag}"
        assert found == (*tag, nbytes), f"{place} holds {found}, wanted {(*tag, nbytes)}"

    def Clear(self, each):
        self._erase(each.to, each.nbytes)
        self.tags[each.to.buffer] = {0: ("zeros", each.nbytes)}

    def Upload(self, each):
        layout, source = self.plan.layout, each.source
        self._erase(each.to, each.nbytes)
        size = None if source.batch is None else layout.shape.sizes[source.batch]
        if source.kind == "latents":
            first = layout.segments[source.segment].first
            assert each.nbytes == layout.state_bytes(size)
            self._put_state(each.to, size, source.batch, first)
        elif source.kind == "records":
            noisy = source.batch is not None
            assert noisy == any(row[NOISE] for row in layout.manifest.sampling.coefficients)
            steps = layout.segments[source.segment].steps if noisy else range(layout.manifest.sampling.steps)
            stride = layout.record_bytes(size or 0)
            for i, step in enumerate(steps):
                self._put_record(dataclasses.replace(each.to, offset=each.to.offset + i * stride), step, source.batch)
            assert each.nbytes == stride * len(steps)
        elif source.kind == "labels.all":
            for batch, count in enumerate(layout.shape.sizes):
                self._put(
                    op.Address("labels.all", batch * layout.labels_stride),
                    8 * layout.shape.rows(count),
                    "labels",
                    batch,
                )
        elif source.kind == "timesteps":
            for i, chunk in enumerate(layout.all_chunks):
                self._put(
                    op.Address("timesteps", i * layout.timesteps_stride), 4 * len(chunk), "timesteps", chunk.start
                )
        else:
            assert source.kind == "cfg_scale"
            self._put(each.to, 4, "cfg_scale")

    def Copy(self, each):
        self._within(each.source, each.nbytes)
        moved = {
            offset: tag
            for offset, tag in self.tags[each.source.buffer].items()
            if each.source.offset <= offset < each.source.offset + each.nbytes
        }
        assert moved, f"{each} copies nothing that was written"
        self._erase(each.to, each.nbytes)
        for offset, tag in moved.items():
            kept = min(tag[-1], each.source.offset + each.nbytes - offset)
            place = op.Address(each.to.buffer, offset - each.source.offset + each.to.offset)
            self.tags[place.buffer][place.offset] = (*tag[:-1], kept)
        if each.to.buffer == "labels":
            (self.batch,) = {tag[1] for tag in moved.values()}

    # engines

    def LoadEngine(self, each):
        assert each.engine not in self.engines
        self.engines.append(each.engine)
        limit = self.plan.options.resident
        assert limit is None or len([key for key in self.engines if key != CONDITIONER]) <= limit
        self.peak = max(self.peak, sum(self.memory[key].weights for key in self.engines))

    def UnloadEngine(self, each):
        assert each.engine.full or all(graph.subnet != each.engine.subnet for graph in self.bodies)
        self.engines.remove(each.engine)

    def Launch(self, each):
        layout = self.plan.layout
        assert each.engine in self.engines
        need = self.memory[each.engine].activation
        assert self.buffers.get(WORKSPACE, 0) >= need
        batch, size = self.batch, layout.shape.sizes[self.batch]
        places = {b.name: b for b in (*each.inputs, *each.outputs)}
        assert all(b.address.offset % ALIGNMENT == 0 for b in places.values())
        rows = layout.shape.rows(size)
        if each.engine == CONDITIONER:
            self._read(places["labels"].address, 8 * rows, "labels", batch)
            timesteps = places["timesteps"]
            chunk = next(c for c in layout.all_chunks if layout.timesteps(c) == timesteps.address)
            self._read(timesteps.address, 4 * len(chunk), "timesteps", chunk.start)
            out = places["condition"]
            self._erase(out.address, out.nbytes)
            for i, step in enumerate(chunk):
                place = op.Address("condition", i * rows * layout.condition_row)
                self._put(place, rows * layout.condition_row, "condition", batch, step)
            return
        step = self.replayed if each.step is None else each.step
        segment = next(s for s in layout.segments if step in s.steps)
        assert each.engine.subnet == segment.subnet
        assert places["x"].shape[0] == size and places["condition"].shape[0] == rows
        self._read(places["x"].address, places["x"].nbytes, "x", batch, step)
        noisy = layout.manifest.sampling.coefficients[step][NOISE] != 0
        noise = places["noise"]
        if noisy:
            self._read(noise.address, noise.nbytes, "noise", batch, step)
        else:
            self._read_zeros(noise.address, noise.nbytes)
        history = places["history"]
        if layout.multistep:
            self._read(history.address, history.nbytes, "history", batch, step)
        else:
            self._read_zeros(history.address, history.nbytes)
        self._read(places["coefficients"].address, ROW_BYTES, "coefficients", step)
        self._read(places["cfg_scale"].address, 4, "cfg_scale")
        self._read(places["condition"].address, rows * layout.condition_row, "condition", batch, step)
        assert ("gates" in places) == layout.manifest.subnets[segment.subnet].gated
        if "gates" in places:
            self._read(places["gates"].address, places["gates"].nbytes, "gates", step)
        ends = {places[name].address for name in ("x", "history", "x_prev", "next_history")}
        assert len(ends) == 4, "no tensor of a step lies over another"
        for name, tag in (
            ("x_prev", ("x", batch, step + 1)),
            ("next_history", ("history", batch, step + 1)),
            ("token_overflow", ("overflow", batch, step, each.engine.full)),
        ):
            if name in places:
                self._erase(places[name].address, places[name].nbytes)
                self._put(places[name].address, places[name].nbytes, *tag)
        assert ("token_overflow" in places) == layout.capacity
        if not self.warming:
            self.launched.append((batch, step))

    # graphs

    def WarmUp(self, each):
        self.warming, self.replayed = True, self.tags["step.record"][0][1]
        self.do(each.launch)
        self.warming = False

    def Capture(self, each):
        assert self.plan.manifest.routing is not Routing.DYNAMIC and self.plan.options.graphs
        assert each.graph not in self.bodies
        launch, back = each.body
        assert launch.step is None and launch.engine == EngineId(each.graph.subnet)
        assert each.graph.batch == launch.inputs[0].shape[0]
        fixed = {"x.0", "x.1", "zeros", "next_history", "cfg_scale", "step.record", "step.condition", "step.overflow"}
        assert {one.address.buffer for one in (*launch.inputs, *launch.outputs)} <= fixed
        assert (back.to, back.source) == (op.Address("x.0"), op.Address("x.1"))
        self.bodies[each.graph] = each.body

    def Replay(self, each):
        assert each.graph.batch == self.plan.layout.shape.sizes[self.batch], "a graph serves its own batch size"
        self.replayed = each.step
        self.do(*self.bodies[each.graph])

    def DropGraph(self, each):
        del self.bodies[each.graph]

    # streams and the host

    def Record(self, each):
        self.recorded.add(each.event)

    def Wait(self, each):
        assert each.event in self.recorded

    Synchronize = Wait

    def ReadOverflow(self, each):
        for i, batch in enumerate(each.batches):
            for j in range(each.steps):
                step = self.plan.layout.segments[each.segment].first + j
                place = op.Address("overflow", (i * each.steps + j) * each.stride)
                self._read(place, 8 * each.blocks, "overflow", batch, step, each.strict)

    def Download(self, each):
        last = self.plan.layout.segments[each.segments - 1]
        layout, step = self.plan.layout, last.first + last.count
        size = layout.shape.sizes[each.batch]
        assert each.nbytes == layout.state_bytes(size)
        self._read(each.source, size * layout.image_bytes, "x", each.batch, step)
        if layout.multistep:
            behind = each.source.offset + layout.history_offset(size)
            history = dataclasses.replace(each.source, offset=behind)
            self._read(history, size * layout.image_bytes, "history", each.batch, step)


def run(machine: Machine, plan: LaunchPlan, repeats=lambda segment: ()) -> None:
    """A whole run, with its laws about time checked on the way."""
    machine.plan, machine.launched, layout = plan, [], plan.layout
    machine.do(*plan.setup())
    coming = None
    for part in plan.segments():
        segment = layout.segments[part.segment]
        starts = [i for i, each in enumerate(part.run) if _runs_steps(each)]
        waiting = (op.Synchronize, op.ReadOverflow, op.Download)
        waits = [i for i, each in enumerate(part.run) if isinstance(each, waiting)]
        assert all(i > starts[-1] for i in waits), "the host waits inside a segment"
        loads = [i for i, each in enumerate(part.run) if isinstance(each, op.LoadEngine)]
        assert all(starts[0] < i and (not waits or i < waits[0]) for i in loads), "the load overlaps no work"
        assert coming in (None, segment.subnet)
        coming = part.run[loads[0]].engine.subnet if loads else None
        reads = [each for each in part.run if isinstance(each, op.ReadOverflow)]
        assert len(reads) == bool(layout.manifest.subnets[segment.subnet].full_file)
        if not layout.capturing:
            assert not any(isinstance(each, op.Capture | op.Replay) for each in part.run)
        before = len(machine.launched)
        machine.do(*part.run)
        expected = [(batch, step) for batch in layout.waiting(part.segment) for step in segment.steps]
        assert machine.launched[before:] == expected, "every step of every batch once, in order"
        machine.do(*part.settle)
        if reads and (again := repeats(part.segment)):
            before = len(machine.launched)
            machine.do(*plan.repeat(part.segment, again))
            assert machine.launched[before:] == [(batch, step) for batch in again for step in segment.steps]
        machine.do(*part.save)
    assert any(isinstance(each, op.Download) for each in part.save)


def _runs_steps(each: op.Operation) -> bool:
    return isinstance(each, op.Launch | op.Replay) and each.step is not None


def memory_of(manifest) -> dict[EngineId, EngineMemory]:
    return {
        key: EngineMemory(1000 + 300 * (key.subnet or 0) + 77 * key.full, 5000 + 10 * (key.subnet or 0))
        for key in engines_of(manifest)
    }


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(manifests(), shapes, options, st.randoms(use_true_random=False))
def test_laws_of_a_run(manifest, shape, chosen, random):
    memory = memory_of(manifest)
    plan = LaunchPlan(manifest, shape, memory, chosen)
    machine = Machine(plan, memory)

    def repeats(segment):
        return tuple(batch for batch in plan.layout.waiting(segment) if random.random() < 0.5)

    run(machine, plan, repeats)
    assert sum(machine.buffers.values()) == plan.memory.buffers + plan.memory.workspace
    assert plan.memory.workspace == -(-max(each.activation for each in memory.values()) // 256) * 256
    assert machine.peak <= plan.memory.engines
    assert plan.memory.total == plan.memory.buffers + plan.memory.workspace + plan.memory.engines


@settings(max_examples=25, deadline=None)
@given(manifests(), shapes, options)
def test_engine_memory_is_what_it_peaks_at(manifest, shape, chosen):
    memory = memory_of(manifest)
    plan = LaunchPlan(manifest, shape, memory, chosen)
    machine = Machine(plan, memory)
    run(machine, plan, plan.layout.waiting)
    assert machine.peak == plan.memory.engines


@settings(max_examples=40, deadline=None)
@given(manifests(), st.lists(shapes, min_size=2, max_size=3), options)
def test_laws_of_one_run_after_another(manifest, several, chosen):
    """Buffers, engines and graphs of earlier runs are used again where they fit, and only there."""
    memory = memory_of(manifest)
    machine = Machine(LaunchPlan(manifest, several[0], memory, chosen), memory)
    for shape in (*several, *several):
        plan = LaunchPlan(manifest, shape, memory, chosen, machine.after())
        run(machine, plan)
        assert machine.after().buffers == plan.buffers
    grown = dict(machine.buffers)
    plan = LaunchPlan(manifest, several[0], memory, chosen, machine.after())
    setup = plan.setup()
    assert not any(isinstance(each, op.Allocate | op.Free) for each in setup), "nothing grows any more"
    if chosen.resident is None:
        assert not any(isinstance(each, op.LoadEngine | op.UnloadEngine | op.DropGraph) for each in setup)
        again = LaunchPlan(manifest, several[0], memory, chosen, machine.after())
        assert not any(isinstance(each, op.Capture | op.WarmUp) for part in again.segments() for each in part.run)
    assert grown == machine.buffers


@settings(max_examples=40, deadline=None)
@given(manifests(), options, st.data())
def test_laws_of_a_resumed_run(manifest, chosen, data):
    segments = len(manifest.plan.segments)
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple))
    done = data.draw(st.lists(st.integers(0, segments), min_size=len(sizes), max_size=len(sizes)).map(tuple))
    if min(done) == segments:
        return
    shape = RunShape(sizes, True, done)
    memory = memory_of(manifest)
    plan = LaunchPlan(manifest, shape, memory, chosen)
    machine = Machine(plan, memory)
    run(machine, plan, plan.layout.waiting)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.sampled_from([2, 3, 4]), st.booleans(), st.data())
def test_residency_loads_ahead_and_keeps_within_its_limit(subnets, limit, spare, data):
    engines = [EngineId(index) for index in subnets]
    loaded = data.draw(st.lists(st.sampled_from([EngineId(i) for i in range(5)]), unique=True, max_size=limit))
    plan = plan_residency(engines, loaded, limit, spare)
    present = set(loaded) - set(plan.unload) | set(plan.load)
    assert present == set(plan.start)
    for i, (engine, stop) in enumerate(zip(engines, plan.stops, strict=True)):
        assert engine == stop.engine and engine in present
        if i + 1 < len(engines):
            assert (stop.load == engines[i + 1]) == (engines[i + 1] not in present)
        present |= {stop.load} - {None}
        assert len(present) <= limit
        assert set(stop.unload) <= present
        present -= set(stop.unload)
        assert present == set(stop.stay) and len(present) + spare <= limit
    free = plan_residency(engines, loaded, None, spare)
    assert not free.unload and not any(stop.unload for stop in free.stops)
    assert {s.load for s in free.stops} - {None} | set(free.load) == set(engines) - set(loaded)
    loads = len(plan.load) + sum(s.load is not None for s in plan.stops)
    assert loads >= len(free.load) + sum(s.load is not None for s in free.stops)


@settings(max_examples=25, deadline=None)
@given(manifests(), shapes)
def test_one_step_of_a_subnetwork_is_captured_and_replayed_for_every_step(manifest, shape):
    """However many steps a segment has, and however many segments share a subnetwork."""
    plan = LaunchPlan(manifest, shape, memory_of(manifest), LaunchOptions())
    ops, capturing = plan.operations(), manifest.routing is not Routing.DYNAMIC
    captures = [each for each in ops if isinstance(each, op.Capture)]
    replays = [each for each in ops if isinstance(each, op.Replay)]
    subnets, sizes = {segment.subnet for segment in manifest.plan.segments}, set(shape.sizes)
    assert {(each.graph.subnet, each.graph.batch) for each in captures} == (
        {(subnet, size) for subnet in subnets for size in sizes} if capturing else set()
    )
    assert len(captures) == capturing * len(subnets) * len(sizes) == sum(isinstance(each, op.WarmUp) for each in ops)
    assert all([type(one) for one in each.body] == [op.Launch, op.Copy] for each in captures)
    steps = manifest.sampling.steps
    assert len(replays) == capturing * steps * len(shape.sizes)
    to_fixed = [each for each in ops if isinstance(each, op.Copy) and each.to.buffer.startswith("step.")]
    if capturing:
        assert len(to_fixed) == 2 * len(replays), "a record and a condition for each step"
        assert [each.step for each in replays] == [
            step for segment in manifest.plan.segments for _ in shape.sizes for step in segment.steps
        ]


def test_the_engine_that_is_used_last_goes_first():
    a, b, c, d = (EngineId(i) for i in range(4))
    plan = plan_residency([a, b, c, a, d, b], [], 3, spare=False)
    assert [s.unload for s in plan.stops] == [(), (), (c,), (), (), ()]
    assert [s.load for s in plan.stops] == [b, c, None, d, None, None]


def test_residency_is_fitted_to_the_device():
    manifest = find(manifests(), lambda m: len({s.subnet for s in m.plan.segments}) == 4 and m.routing is None)
    memory, shape = memory_of(manifest), RunShape((2, 1), True)

    def total(resident):
        return LaunchPlan(manifest, shape, memory, LaunchOptions(resident=resident)).memory.total

    assert total(2) < total(3) < total(None)
    for resident in (2, 3, None):
        assert fit_resident(manifest, shape, memory, LaunchOptions(), total(resident)).resident == resident
    with pytest.raises(BackendError, match=r"a batch of 2 images needs .* GiB .* use a smaller batch size"):
        fit_resident(manifest, shape, memory, LaunchOptions(), total(2) - 1)


def test_refusals():
    manifest = find(manifests(), lambda m: True)
    with pytest.raises(ConfigError, match="resident is 1, but at least 2 subnetworks have to be loaded"):
        LaunchOptions(resident=1)
    for sizes in ((), (0,), (5,)):
        with pytest.raises(ConfigError, match=r"are outside 1\.\.4"):
            LaunchPlan(manifest, RunShape(sizes, True), memory_of(manifest))


def test_the_whole_run_is_one_list():
    manifest = find(manifests(), lambda m: len(m.plan.segments) > 2)
    plan = LaunchPlan(manifest, RunShape((2,), True), memory_of(manifest))
    parts = LaunchPlan(manifest, RunShape((2,), True), memory_of(manifest))
    ops = plan.operations()
    assert ops[: len(parts.setup())] == parts.setup()
    assert isinstance(ops[-1], op.Download) and ops[-1].segments == len(manifest.plan.segments)
    assert str(EngineId(3, True)) == "subnetwork 3 at full capacity" and str(CONDITIONER) == "conditioning"
