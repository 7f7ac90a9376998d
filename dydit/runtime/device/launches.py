"""A whole run on a device as a list of operations, computed in plain Python.

Setup comes first: it allocates the buffers and uploads what the whole run needs. Each segment is computed just before
it runs, over all batches:

    with dynamic width, the unit weights of the segment come to the front (`dydit.runtime.device.unit_weights`)
    for each batch: records of steps (with their noise), labels and latents are copied to the segment's buffers;
                    condition is computed on the device, and so is what the steps take of the batch's texts, unless it
                    was the last batch that ran;
                    the steps run, each reading what the one before wrote; the latents are copied to the next buffer
    meanwhile:      after the first batch the next segment's engine is loaded, and after each batch the records and
                    texts of the next are uploaded on the copy stream
    with capacity routing: the overflow counters are read once; batches that overflowed run the whole segment again, at
                    full capacity, from the latents and noise with which they started it

Between the steps of a batch, neither the host nor the device waits for the other. Between batches, the compute stream
waits for the next noise, which the host draws and uploads.

With graphs, one step of a subnetwork is captured for each batch size, and replayed for every step of every segment that
runs it; a repetition at full capacity is not captured. A graph is dropped with its engine. It is valid only while its
execution context keeps its shapes and addresses, so before each replay, two copies bring the step's record and
condition to fixed addresses. The graph itself reads x.0, writes x.1 and copies that back to x.0. Two graphs, for even
and odd steps, would save this copy of a batch's latents, but would need twice the captures and execution contexts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from dydit.bundle.io_spec import TEXT_ROWS
from dydit.bundle.manifest import Manifest
from dydit.runtime.device import operations as op
from dydit.runtime.device.memory_layout import LaunchOptions, Layout, RunShape
from dydit.runtime.device.operations import (
    COMPUTE,
    CONDITIONER,
    COPY,
    TEXT_CONDITIONER,
    Address,
    EngineId,
    GraphKey,
    HostArray,
    Operation,
    UnitOrder,
    aligned,
)
from dydit.runtime.device.residency import Stop, conditioners_of, engine_of, engines_of, plan_residency
from dydit.runtime.device.unit_weights import SCRATCH

WORKSPACE = "workspace"
INPUTS_READY, INPUTS_TAKEN, SEGMENT_DONE = "inputs ready", "inputs taken", "segment done"
_TEXTS = ("embeddings", "mask")
_OUTSIDE_GRAPHS = (
    *("latents.0", "latents.1", "labels", "labels.all", "timesteps", "condition", "records", "records.next"),
    *("overflow", "overflow.visit", SCRATCH),
    *(*_TEXTS, *(f"{name}.next" for name in _TEXTS), f"{TEXT_ROWS}.all"),
)


@dataclass(frozen=True)
class EngineMemory:
    """Bytes of device memory: of an execution context's activations, and of the loaded engine (its weights)."""

    activation: int
    weights: int


@dataclass(frozen=True)
class DeviceState:
    """What earlier runs left on the device: buffers with their bytes, engines, graphs, the order of unit weights."""

    buffers: Mapping[str, int] = field(default_factory=dict)
    engines: tuple[EngineId, ...] = ()
    graphs: frozenset[GraphKey] = frozenset()
    unit_order: UnitOrder | None = None


@dataclass(frozen=True)
class MemoryTotal:
    """Bytes of device memory of a run: its buffers, the shared workspace, engines at their peak."""

    buffers: int
    workspace: int
    engines: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.buffers + self.workspace + self.engines


@dataclass(frozen=True)
class SegmentOps:
    """A segment: what runs; then, where a batch overflowed, `LaunchPlan.repeat`; then what is saved.

    `settle` frees engines between `run` and the repetition, while nothing runs.
    """

    segment: int
    run: tuple[Operation, ...]
    settle: tuple[Operation, ...]
    save: tuple[Operation, ...]


class LaunchPlan:
    """The operations of a run. `memory`: what each engine that it may load needs (`engines_of` names them).

    Call `setup`, then iterate over `segments`, calling `repeat` for a segment before the next one is requested.
    """

    def __init__(
        self,
        manifest: Manifest,
        shape: RunShape,
        memory: Mapping[EngineId, EngineMemory],
        options: LaunchOptions | None = None,
        state: DeviceState | None = None,
    ):
        self.manifest, self.shape = manifest, shape
        self.options, self._state = options or LaunchOptions(), state or DeviceState()
        self.layout = Layout(manifest, shape, self.options)
        self._memory = memory
        self._engines = [self._engine(index) for index in self.layout.visited]
        repeats = any(self._may_overflow(index) for index in self.layout.visited)
        loaded = [key for key in self._state.engines if key.subnet is not None and not key.full]
        self._full = {key for key in self._state.engines if key.full}  # one that stays, or one that a failed run left
        self._residency = plan_residency(self._engines, loaded, self.options.resident, repeats)
        self._captured = set(self._state.graphs)
        self._unit_order = self._state.unit_order
        self._batch_of_texts: int | None = None  # whose keys and values the engines find
        self._taken = False  # whether INPUTS_TAKEN was recorded

    @cached_property
    def buffers(self) -> dict[str, int]:
        """Bytes of every buffer during the run; those of earlier runs stay where they are large enough."""
        need = max(self._memory[key].activation for key in engines_of(self.manifest, self.layout.visited))
        required = {**self.layout.buffers, WORKSPACE: aligned(need)}
        held = dict(self._state.buffers)
        return held | {name: max(nbytes, held.get(name, 0)) for name, nbytes in required.items() if nbytes}

    @property
    def memory(self) -> MemoryTotal:
        """The most memory that the run takes."""
        weights = {key: each.weights for key, each in self._memory.items()}
        workspace = self.buffers.get(WORKSPACE, 0)
        conditioners = sum(weights[key] for key in conditioners_of(self.manifest))
        engines = conditioners + self._residency.peak_bytes(weights, repeats=self.layout.capacity)
        return MemoryTotal(sum(self.buffers.values()) - workspace, workspace, engines)

    def setup(self) -> tuple[Operation, ...]:
        """The operations before the first segment."""
        held = self._state.buffers
        changed = [name for name, nbytes in self.buffers.items() if held.get(name) != nbytes]
        ops: list[Operation] = []
        if any(name not in _OUTSIDE_GRAPHS for name in changed):
            ops += self._drop(self._captured)
        ops += self._unload(self._residency.unload)
        if not self.manifest.dynamic_width:
            ops += self._unload(sorted(self._full, key=str))
            self._full.clear()
        ops += [op.Free(name) for name in changed if name in held]
        ops += [op.Allocate(name, self.buffers[name]) for name in changed]
        engines = [key for key in conditioners_of(self.manifest) if key not in self._state.engines]
        ops += [op.LoadEngine(key) for key in (*engines, *self._residency.load)]
        if "zeros" in self.buffers:
            ops.append(op.Clear(Address("zeros"), self.buffers["zeros"]))
        ops += self._uploads()
        if self.layout.unit_weights is not None and self._unit_order is None:
            ops += self.layout.unit_weights.fill()
            self._unit_order = self.layout.unit_weights.stored
        return (*ops, *self._fetch(self.layout.visited[0], self.layout.waiting(self.layout.visited[0])[0]))

    def segments(self) -> Iterator[SegmentOps]:
        """Segment after segment. Each is computed when it is requested."""
        visited = self.layout.visited
        for index, segment in enumerate(visited):
            stop = self._residency.stops[index]
            following = visited[index + 1] if index + 1 < len(visited) else None
            run = self._run(segment, stop, following)
            settle: list[Operation] = []
            if stop.unload:
                settle = [op.Record(SEGMENT_DONE, COMPUTE), op.Synchronize(SEGMENT_DONE), *self._unload(stop.unload)]
            last = following is None
            save = [
                op.Download(
                    batch,
                    segment + 1,
                    self.layout.latents(segment + 1, batch),
                    self.layout.state_bytes(self.shape.sizes[batch]),
                )
                for batch in self.layout.waiting(segment)
                if last or self.options.save_segments
            ]
            yield SegmentOps(segment, tuple(run), tuple(settle), tuple(save))

    def repeat(self, segment: int, batches: Sequence[int]) -> tuple[Operation, ...]:
        """Run a segment again for some batches, at full capacity."""
        engine = self._engine(segment, full=True)
        ops: list[Operation] = [] if engine in self._full else [op.LoadEngine(engine)]
        for place, batch in enumerate(batches):
            ops += [
                op.Upload(Address(source.kind), source, nbytes)
                for source, nbytes in self._inputs(segment, batch).items()
            ]
            ops += self._visit(segment, batch, place, engine)
        ops.append(self._read_overflow(segment, batches, strict=True))
        if self.manifest.dynamic_width:  # later segments use the same engine
            self._full.add(engine)
            return tuple(ops)
        return (*ops, op.UnloadEngine(engine))

    def operations(self) -> tuple[Operation, ...]:
        """All operations, for a run in which no tokens overflow."""
        return (*self.setup(), *(each for part in self.segments() for each in (*part.run, *part.settle, *part.save)))

    def _uploads(self) -> list[Operation]:
        """Upload what the whole run needs, and the latents that it starts from."""
        kinds = {"cfg_scale", "timesteps", "labels.all", f"{TEXT_ROWS}.all"}
        if not self.layout.noisy:
            kinds.add("records")
        sizes = self.layout.buffers | {"cfg_scale": 4}
        ops: list[Operation] = [
            op.Upload(Address(name), HostArray(name), sizes[name]) for name in sizes if name in kinds
        ]
        for batch, size in enumerate(self.shape.sizes):
            behind = self.shape.behind(batch)
            if behind < len(self.layout.segments):
                source = HostArray("latents", batch, behind)
                ops.append(op.Upload(self.layout.latents(behind, batch), source, self.layout.state_bytes(size)))
        return ops

    def _inputs(self, segment: int, batch: int) -> dict[HostArray, int]:
        """What a batch needs from the host for a segment, and its bytes: noise, and texts unless it ran last."""
        inputs: dict[HostArray, int] = {}
        if self.layout.noisy:
            nbytes = self.layout.record_bytes(self.shape.sizes[batch])
            inputs[HostArray("records", batch, segment)] = self.layout.segments[segment].count * nbytes
        if self.layout.has_texts and batch != self._batch_of_texts:
            inputs |= {HostArray(each.name, batch): each.nbytes for each in self.layout.text_bindings()[0]}
        return inputs

    def _fetch(self, segment: int, batch: int) -> list[Operation]:
        """Upload a batch's inputs for a segment while other work runs, once those before were copied away."""
        inputs = self._inputs(segment, batch)
        if not inputs:
            return []
        wait: list[Operation] = [op.Wait(COPY, INPUTS_TAKEN)] if self._taken else []
        uploads = [op.Upload(Address(f"{each.kind}.next"), each, nbytes, COPY) for each, nbytes in inputs.items()]
        return [*wait, *uploads, op.Record(INPUTS_READY, COPY)]

    def _take(self, segment: int, batch: int) -> list[Operation]:
        """Copy what was fetched for a batch. If a repetition has left its texts in place, they are not needed."""
        inputs = self._inputs(segment, batch)
        if not inputs:
            return []
        self._taken = True
        copies = [op.Copy(Address(each.kind), Address(f"{each.kind}.next"), nbytes) for each, nbytes in inputs.items()]
        return [op.Wait(COMPUTE, INPUTS_READY), *copies, op.Record(INPUTS_TAKEN, COMPUTE)]

    def _run(self, segment: int, stop: Stop, following: int | None) -> list[Operation]:
        batches, ops = self.layout.waiting(segment), self._arrange(segment)
        for place, batch in enumerate(batches):
            ops += self._take(segment, batch)
            ops += self._visit(segment, batch, place, stop.engine)
            if place == 0 and stop.load:
                ops.append(op.LoadEngine(stop.load))
            if place + 1 < len(batches):
                ops += self._fetch(segment, batches[place + 1])
            elif following is not None:
                ops += self._fetch(following, self.layout.waiting(following)[0])
        if self._may_overflow(segment):
            ops.append(self._read_overflow(segment, batches))
        return ops

    def _arrange(self, segment: int) -> list[Operation]:
        """Bring the segment's units to the front: for all batches, and for those that repeat it."""
        if self.layout.unit_weights is None:
            return []
        assert self._unit_order is not None, "setup comes first"
        subnet = self.manifest.plan.segments[segment].subnet
        ops, self._unit_order = self.layout.unit_weights.enter(self._unit_order, subnet)
        return list(ops)

    def _visit(self, segment: int, batch: int, place: int, engine: EngineId) -> list[Operation]:
        """Run a segment for a batch whose noise and texts have been uploaded."""
        layout, size = self.layout, self.shape.sizes[batch]
        count, nbytes = layout.segments[segment].count, layout.state_bytes(size)
        labels = op.Copy(
            Address("labels"), Address("labels.all", batch * layout.labels_stride), 8 * self.shape.rows(size)
        )
        ops: list[Operation] = [labels, op.Copy(Address("x.0"), layout.latents(segment, batch), nbytes)]
        if layout.has_texts:
            ops += self._prepare_texts(batch)
        for chunk in layout.chunks(segment):
            inputs, outputs = layout.conditioning_bindings(chunk, size)
            ops.append(op.Launch(CONDITIONER, None, inputs, outputs))
            for step in chunk:
                ops += self._step(segment, chunk, step, size, engine)
        result = Address("x.0" if layout.staged else f"x.{count % 2}")
        ops.append(op.Copy(layout.latents(segment + 1, batch), result, nbytes))
        if self._may_overflow(segment):
            counters = count * layout.overflow_stride
            ops.append(op.Copy(Address("overflow", place * counters), Address("overflow.visit"), counters))
        return ops

    def _prepare_texts(self, batch: int) -> list[Operation]:
        """Make the texts of a batch those that steps read."""
        source = Address(f"{TEXT_ROWS}.all", batch * self.layout.labels_stride)
        ops: list[Operation] = [op.Copy(Address(TEXT_ROWS), source, 8 * self.shape.rows(self.shape.sizes[batch]))]
        if batch != self._batch_of_texts:
            ops.append(op.Launch(TEXT_CONDITIONER, None, *self.layout.text_bindings()))
            self._batch_of_texts = batch
        return ops

    def _step(self, segment: int, chunk: range, step: int, size: int, engine: EngineId) -> list[Operation]:
        """One step. The first step of a segment reads x.0; at fixed addresses, all of them do."""
        layout, first = self.layout, self.layout.segments[segment].first
        subnet = self.manifest.plan.segments[segment].subnet
        record, condition = layout.record(segment, step, size), layout.condition(chunk, step, size)
        counters = layout.overflow(segment, step)
        if not layout.staged:
            places = layout.step_bindings(subnet, size, (step - first) % 2, record, condition, counters)
            return [op.Launch(engine, step, *places)]
        ops: list[Operation] = [
            op.Copy(Address("step.record"), record, layout.record_bytes(size)),
            op.Copy(Address("step.condition"), condition, layout.condition_bytes(size)),
        ]
        if layout.capturing and not engine.full:
            ops += self._replayed(subnet, step, size, engine)
        else:
            ops += self._at_fixed_addresses(subnet, step, size, engine)
        if layout.capacity:
            ops.append(op.Copy(counters, Address("step.overflow"), layout.overflow_bytes))
        return ops

    def _at_fixed_addresses(
        self, subnet: int, step: int | None, size: int, engine: EngineId
    ) -> tuple[op.Launch, op.Copy]:
        """A step from x.0 to x.1, which is then copied back."""
        fixed = (Address(f"step.{name}") for name in ("record", "condition", "overflow"))
        launch = op.Launch(engine, step, *self.layout.step_bindings(subnet, size, 0, *fixed))
        return launch, op.Copy(Address("x.0"), Address("x.1"), self.layout.state_bytes(size))

    def _replayed(self, subnet: int, step: int, size: int, engine: EngineId) -> list[Operation]:
        """A step by its graph, which is captured when it is first needed."""
        shape = self.shape
        key = GraphKey(subnet, size, shape.rows(size), shape.texts, shape.text_tokens)
        ops: list[Operation] = []
        if key not in self._captured:
            self._captured.add(key)
            body = self._at_fixed_addresses(subnet, None, size, engine)
            ops = [op.WarmUp(body[0]), op.Capture(key, body)]
        return [*ops, op.Replay(key, step)]

    def _read_overflow(self, segment: int, batches: Sequence[int], strict: bool = False) -> op.ReadOverflow:
        count, blocks = self.layout.segments[segment].count, self.manifest.model.depth
        stride = self.layout.overflow_stride
        return op.ReadOverflow(Address("overflow"), segment, tuple(batches), count, stride, blocks, strict)

    def _engine(self, segment: int, full: bool = False) -> EngineId:
        return engine_of(self.manifest, self.manifest.plan.segments[segment].subnet, full)

    def _may_overflow(self, segment: int) -> bool:
        return self.manifest.subnets[self.manifest.plan.segments[segment].subnet].full_file is not None

    def _unload(self, engines: Sequence[EngineId]) -> list[Operation]:
        """Unload engines, and before them the graphs that were captured from them."""
        graphs = [graph for graph in self._captured if engine_of(self.manifest, graph.subnet) in engines]
        return [*self._drop(graphs), *(op.UnloadEngine(key) for key in engines)]

    def _drop(self, graphs: Sequence[GraphKey] | set[GraphKey]) -> list[Operation]:
        ops: list[Operation] = [op.DropGraph(graph) for graph in sorted(graphs, key=dataclasses.astuple)]
        self._captured.difference_update(tuple(graphs))
        return ops
