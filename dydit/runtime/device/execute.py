"""Runs the operations of a `LaunchPlan` on a `Device`.

This is the only interpreter of the operations. Its device is `dydit.runtime.device.cuda`, on the driver of a GPU or,
in tests, on a simulated one whose streams run in any order that the events allow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from dydit.errors import BackendError, DyditError
from dydit.runtime.device import operations as op
from dydit.runtime.device.launches import WORKSPACE, DeviceState, EngineMemory, LaunchPlan
from dydit.runtime.device.operations import Address, Binding, EngineId, GraphKey, HostArray, Operation, UnitOrder


class CaptureError(BackendError):
    """Work cannot be captured in a graph here. It can be run without."""


class WorkspaceError(BackendError):
    """An engine needs more memory for its activations than was known when the run was planned."""


class Tensor(NamedTuple):
    """An input or output of an engine at an address of the device."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    address: int


class Device(Protocol):
    """What a device can do. Addresses are integers. Work is queued on named streams, unless the method waits."""

    def activate(self) -> AbstractContextManager[Any]:
        """Make the device usable from this thread."""

    def allocate(self, nbytes: int) -> int:
        """Allocate memory, 256-byte aligned. Raises `BackendError` if there is not enough."""

    def free(self, address: int) -> None:
        """Free memory."""

    def upload(self, to: int, data: np.ndarray, stream: str) -> None:
        """Copy contiguous host data to the device; the host may change it as soon as this returns."""

    def download(self, source: int, nbytes: int) -> np.ndarray:
        """Wait for the compute stream and return bytes, uint8 [nbytes]."""

    def copy(self, to: int, source: int, nbytes: int) -> None:
        """Copy within the device, on the compute stream."""

    def clear(self, to: int, nbytes: int) -> None:
        """Zero bytes, on the compute stream."""

    def record(self, event: str, stream: str) -> None:
        """Record an event at the end of a stream."""

    def wait(self, stream: str, event: str) -> None:
        """Make a stream wait for an event."""

    def synchronize(self, event: str) -> None:
        """Make the host wait for an event."""

    def idle(self) -> None:
        """Make the host wait for all queued work."""

    def free_memory(self) -> int:
        """Bytes that are free now."""

    def load(self, engine: EngineId) -> None:
        """Load an engine."""

    def unload(self, engine: EngineId) -> None:
        """Free an engine and its contexts."""

    def memory(self, engine: EngineId) -> EngineMemory:
        """What a loaded engine needs."""

    def longest(self, engine: EngineId, name: str) -> tuple[int, ...]:
        """The largest shape of an input that a loaded engine takes."""

    def launch(
        self, engine: EngineId, inputs: Sequence[Tensor], outputs: Sequence[Tensor], workspace: tuple[int, int]
    ) -> None:
        """Run an engine on the compute stream; `workspace`: address and bytes for its activations."""

    def begin_capture(self) -> None:
        """Record what is queued on the compute stream from here on, instead of running it. May raise `CaptureError`."""

    def end_capture(self) -> Any:
        """The graph of what was recorded."""

    def replay(self, graph: Any) -> None:
        """Run a graph, on the compute stream."""

    def drop(self, graph: Any) -> None:
        """Free a graph that is not running."""

    def close(self) -> None:
        """Free all that is left, and the device itself: it cannot be used any more."""


Host = Callable[[HostArray], np.ndarray]
"""Returns data to upload, contiguous."""
Deliver = Callable[[int, int, np.ndarray, int], None]
"""`deliver(batch, segments, bytes, repeated)`: latents after `segments` segments; steps repeated since then."""
Progress = Callable[[int], None]
"""`progress(steps)`: this many more steps of a batch were launched."""


@dataclass
class RunCounts:
    """What a run did: steps of a batch, how many of them were repeated, and tokens above the capacity."""

    steps: int = 0
    repeated_steps: int = 0
    overflowed_tokens: int = 0


class Executor:
    """Runs plans on a device, which keeps buffers, engines and graphs from one run to the next until `close`."""

    def __init__(self, device: Device):
        self.device = device
        self._buffers: dict[str, tuple[int, int]] = {}
        self._engines: list[EngineId] = []
        self._graphs: dict[GraphKey, Any] = {}
        self._unit_order: UnitOrder | None = None
        self._do: dict[type, Callable[[Any], None]] = {
            op.Allocate: self._allocate,
            op.Free: lambda o: device.free(self._buffers.pop(o.buffer)[0]),
            op.Clear: lambda o: device.clear(self._at(o.to), o.nbytes),
            op.Copy: lambda o: device.copy(self._at(o.to), self._at(o.source), o.nbytes),
            op.Arranged: self._arranged,
            op.Launch: self._launch,
            op.WarmUp: lambda o: self._launch(o.launch),
            op.Capture: self._capture,
            op.Replay: lambda o: device.replay(self._graphs[o.graph]),
            op.DropGraph: lambda o: device.drop(self._graphs.pop(o.graph)),
            op.LoadEngine: self._load_for_run,
            op.UnloadEngine: self._unload,
            op.Record: lambda o: device.record(o.event, o.stream),
            op.Wait: lambda o: device.wait(o.stream, o.event),
            op.Synchronize: lambda o: device.synchronize(o.event),
        }

    @property
    def state(self) -> DeviceState:
        """What is on the device now."""
        sizes = {name: nbytes for name, (_, nbytes) in self._buffers.items()}
        return DeviceState(sizes, tuple(self._engines), frozenset(self._graphs), self._unit_order)

    def run(self, plan: LaunchPlan, host: Host, deliver: Deliver, progress: Progress | None = None) -> RunCounts:
        """Run a plan made for this executor's `state`. Raises `BackendError` as the device does."""
        counts, again = RunCounts(), dict.fromkeys(range(len(plan.shape.sizes)), 0)
        with self.device.activate():
            try:
                self._perform(plan.setup(), host)
                for part in plan.segments():
                    overflowed = self._perform(part.run, host, counts, progress)
                    self._perform(part.settle, host)
                    for batch in overflowed:
                        again[batch] += plan.manifest.plan.segments[part.segment].count
                    if overflowed:
                        self._perform(plan.repeat(part.segment, overflowed), host)
                    for each in part.save:
                        assert isinstance(each, op.Download)
                        data = self.device.download(self._at(each.source), each.nbytes)
                        counts.repeated_steps += again[each.batch]
                        deliver(each.batch, each.segments, data, again[each.batch])
                        again[each.batch] = 0
            except BaseException:
                with suppress(DyditError):
                    self.device.idle()
                raise
        return counts

    def do(self, ops: Sequence[Operation], host: Host) -> None:
        """Run operations that belong to no plan."""
        with self.device.activate():
            self._perform(ops, host)

    def replay(self, subnets: Sequence[int], batch: int, rows: int) -> int:
        """Queue the captured steps of an earlier run again, without what lies between them; returns their number.

        `subnets`: the subnetwork of each step; `batch`, `rows`: of the run's batches. 0 if one was not captured. What
        the steps compute is of no use: this is for measuring them.
        """
        graphs = {key.subnet: graph for key, graph in self._graphs.items() if (key.batch, key.rows) == (batch, rows)}
        if not graphs.keys() >= set(subnets):
            return 0
        with self.device.activate():
            for subnet in subnets:
                self.device.replay(graphs[subnet])
        return len(subnets)

    def load(self, engine: EngineId) -> None:
        """Load an engine ahead of a run."""
        with self.device.activate():
            self._load(op.LoadEngine(engine))

    def unload(self, engine: EngineId) -> None:
        """Free an engine that `load` loaded."""
        with self.device.activate():
            self._unload(op.UnloadEngine(engine))

    def drop_graphs(self) -> None:
        """Free the captured graphs: they are of the steps of one manifest."""
        with self.device.activate():
            self.device.idle()
            self._all(tuple(op.DropGraph(graph) for graph in self._graphs))

    def close(self) -> None:
        """Free everything on the device, and the device."""
        try:
            self.free()
        finally:
            self.device.close()

    def free(self) -> None:
        """Free what this executor has on the device. It can be used again."""
        self._unit_order = None
        with self.device.activate():
            with suppress(DyditError):
                self.device.idle()
            self._all(tuple(op.DropGraph(graph) for graph in self._graphs))
            self._all(tuple(op.UnloadEngine(engine) for engine in self._engines))
            self._all(tuple(op.Free(name) for name in self._buffers))

    def _perform(
        self,
        ops: Sequence[Operation],
        host: Host,
        counts: RunCounts | None = None,
        progress: Progress | None = None,
    ) -> tuple[int, ...]:
        """Run operations in order; returns the batches that overflowed."""
        overflowed: list[int] = []
        for each in ops:
            if isinstance(each, op.Upload):
                data = host(each.source)
                assert data.nbytes == each.nbytes, each
                self.device.upload(self._at(each.to), data, each.stream)
            elif isinstance(each, op.ReadOverflow):
                overflowed += self._read_overflow(each, counts)
            else:
                self._do[type(each)](each)
            if isinstance(each, op.Launch | op.Replay) and each.step is not None:
                if counts is not None:
                    counts.steps += 1
                if progress:
                    progress(1)
        return tuple(overflowed)

    def _read_overflow(self, each: op.ReadOverflow, counts: RunCounts | None) -> list[int]:
        data = self.device.download(self._at(each.source), each.nbytes).view(np.int64)
        tokens = data.reshape(len(each.batches), each.steps, -1)[:, :, : each.blocks].sum(axis=(1, 2))
        if each.strict and tokens.any():
            raise BackendError(
                f"segment {each.segment} drops tokens even at full capacity; export the bundle and rebuild its engines"
            )
        if counts is not None:
            counts.overflowed_tokens += int(tokens.sum())
        return [batch for batch, count in zip(each.batches, tokens, strict=True) if count]

    def _all(self, ops: Sequence[Operation]) -> None:
        for each in ops:
            self._do[type(each)](each)

    def _at(self, place: Address) -> int:
        return self._buffers[place.buffer][0] + place.offset

    def _allocate(self, each: op.Allocate) -> None:
        self._buffers[each.buffer] = (self.device.allocate(each.nbytes), each.nbytes)

    def _arranged(self, each: op.Arranged) -> None:
        self._unit_order = each.order

    def _load(self, each: op.LoadEngine) -> None:
        self.device.load(each.engine)
        self._engines.append(each.engine)

    def _load_for_run(self, each: op.LoadEngine) -> None:
        self._load(each)
        need, (_, nbytes) = self.device.memory(each.engine).activation, self._buffers.get(WORKSPACE, (0, 0))
        if need > nbytes:
            raise WorkspaceError(f"{each.engine} needs a workspace of {need} bytes, but {nbytes} were expected")

    def _unload(self, each: op.UnloadEngine) -> None:
        self.device.unload(each.engine)
        self._engines.remove(each.engine)

    def _launch(self, each: op.Launch) -> None:
        inputs, outputs = ([self.tensor(binding) for binding in row] for row in (each.inputs, each.outputs))
        self.device.launch(each.engine, inputs, outputs, self._buffers.get(WORKSPACE, (0, 0)))

    def tensor(self, binding: Binding) -> Tensor:
        """A binding with its address on the device."""
        return Tensor(binding.name, binding.dtype, binding.shape, self._at(binding.address))

    def _capture(self, each: op.Capture) -> None:
        self.device.begin_capture()
        try:
            self._all(each.body)
        except BaseException as error:
            with suppress(DyditError):
                self.device.drop(self.device.end_capture())
            if isinstance(error, BackendError) and not isinstance(error, CaptureError):
                # What cannot be captured may well run: calls that wait or allocate are refused only in a capture.
                raise CaptureError(str(error)) from error
            raise
        self._graphs[each.graph] = self.device.end_capture()
