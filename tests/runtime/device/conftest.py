"""A device made of NumPy arrays whose streams run in any order that events allow, and ONNX Runtime as its engines."""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections import OrderedDict, deque
from typing import ClassVar

import numpy as np
import pytest

from dydit.bundle.io_spec import check_feeds, subnet_inputs, unit_inputs
from dydit.errors import BackendError
from dydit.runtime.backends.base import BackendOptions
from dydit.runtime.backends.onnxruntime import OnnxRuntimeBackend
from dydit.runtime.device.launches import EngineMemory
from dydit.runtime.device.operations import ALIGNMENT, COMPUTE, COPY, DECODER, TEXT_CONDITIONER
from dydit.runtime.device.residency import engines_of
from dydit.runtime.images.vae_decoder import VaeDecoder

GAP = 4096
MOST_SESSIONS = 64


class PairwiseBackend(OnnxRuntimeBackend):
    """Evaluates conditioning pair by pair, and text by text, so that bits do not depend on what comes together.

    To save time, backends of the same bundle share their latest sessions and all pairs, also after they are closed.
    """

    _recent: ClassVar = OrderedDict()
    _known: ClassVar = {}

    def __init__(self, bundle):
        super().__init__(bundle, BackendOptions(threads=1))
        self._pairs = self._known.setdefault((bundle.path, bundle.manifest.digest), {})

    def _shared(self, *key, make):
        key = (self.bundle.path, self.bundle.manifest.digest, *key)
        session = self._recent.pop(key, None) or make()
        self._recent[key] = session
        if len(self._recent) > MOST_SESSIONS:
            self._recent.popitem(last=False)
        return session

    def _load(self, name, debug, apart):
        return self._shared(name, debug, apart, make=lambda: super(PairwiseBackend, self)._load(name, debug, apart))

    def _open_once(self, file, outputs):
        return self._shared(file, make=lambda: super(PairwiseBackend, self)._open_once(file, outputs))

    def _pair(self, timestep, label):
        if (timestep, label) not in self._pairs:
            one = {"timesteps": np.array([timestep], np.float32), "labels": np.array([label])}
            self._pairs[timestep, label] = super()._conditioning(one)[0, 0]
        return self._pairs[timestep, label]

    def _conditioning(self, feeds):
        labels = feeds["labels"].tolist()
        return np.stack([np.stack([self._pair(t, label) for label in labels]) for t in feeds["timesteps"].tolist()])

    def _text_values(self, feeds):
        parts = [super(PairwiseBackend, self)._text_values(one) for one in texts_apart(feeds)]
        axes = {"text_values": 1, "text_bias": 0}
        return {name: np.concatenate([part[name] for part in parts], axis) for name, axis in axes.items()}


def texts_apart(feeds):
    """The inputs of the text graph for each text."""
    return [{name: feed[i : i + 1] for name, feed in feeds.items()} for i in range(len(feeds["mask"]))]


class FakeDevice:
    """Queues work and does it only when the host waits, choosing between streams by a seeded draw.

    Memory starts as garbage. Reading what nothing wrote, memory that was freed, an engine that is not loaded, freeing
    what queued work uses, a captured context that is launched with other addresses: each fails the test.
    """

    def __init__(
        self, bundle, activation=lambda engine: 1000, seed=0, limit=None, longest=(100, 100), texts=(100, 100)
    ):
        self.bundle, self.activation, self.limit = bundle, activation, limit
        self.extents = {"timesteps": longest[:1], "labels": longest[1:], "latents": (3,), "mask": texts}
        self.free_bytes, self.loads = 1 << 40, []
        self.backend = PairwiseBackend(bundle)
        self.rng = np.random.default_rng(seed)
        self.arena, self.written, self.top = {}, {}, ALIGNMENT
        self.queues = {COMPUTE: deque(), COPY: deque()}
        self.marks, self.done = {}, set()
        self.recording, self.graphs, self.running = None, [], []
        self.engines, self.log, self.waits = {}, [], 0
        self.captures = self.replays = 0

    def activate(self):
        return contextlib.nullcontext()

    def allocate(self, nbytes):
        if self.limit is not None and sum(a.nbytes for a in self.arena.values()) + nbytes > self.limit:
            raise BackendError("out of device memory")
        address = self.top
        self.top += -(-nbytes // ALIGNMENT) * ALIGNMENT + GAP
        self.arena[address] = self.rng.integers(0, 256, nbytes, np.uint8)
        self.written[address] = np.zeros(nbytes, bool)
        return address

    def free(self, address):
        assert not any(self.queues.values()), "memory freed while work is queued"
        del self.arena[address], self.written[address]

    def _find(self, address, nbytes):
        starts = sorted(self.arena)
        start = starts[bisect_right(starts, address) - 1]
        offset = address - start
        assert offset >= 0 and offset + nbytes <= len(self.arena[start]), "outside of every buffer"
        part = slice(offset, offset + nbytes)
        return self.arena[start][part], self.written[start][part]

    def upload(self, to, data, stream):
        assert data.flags.c_contiguous
        raw = np.frombuffer(data.tobytes(), np.uint8)
        self._find(to, raw.nbytes)

        def work():
            bytes_, written = self._find(to, raw.nbytes)
            bytes_[:], written[:] = raw, True

        self._queue(work, stream)

    def download(self, source, nbytes):
        self._wait_for(COMPUTE)
        self.waits += 1
        return self._find(source, nbytes)[0].copy()

    def copy(self, to, source, nbytes):
        self._find(to, nbytes), self._find(source, nbytes)

        def work():
            (a, written), (b, origin) = self._find(to, nbytes), self._find(source, nbytes)
            a[:], written[:] = b.copy(), origin

        self._queue(work, COMPUTE)

    def clear(self, to, nbytes):
        def work():
            bytes_, written = self._find(to, nbytes)
            bytes_[:], written[:] = 0, True

        self._queue(work, COMPUTE)

    def record(self, event, stream):
        mark = object()
        self.marks[event] = mark
        self._queue(lambda: self.done.add(mark), stream)

    def wait(self, stream, event):
        if event in self.marks:
            self._queue(self.marks[event], stream)

    def synchronize(self, event):
        self.waits += 1
        while self.marks[event] not in self.done:
            self._advance()

    def idle(self):
        while any(self.queues.values()):
            self._advance()

    def load(self, engine):
        assert engine not in self.engines, f"{engine} is loaded twice"
        self.engines[engine] = (
            None if engine.subnet is None else self.backend.subnet(engine.subnet, full_capacity=engine.full)
        )

        self.loads.append(engine)

    def memory(self, engine):
        return EngineMemory(self.activation(engine), 10_000)

    def longest(self, engine, name):
        assert engine in self.engines
        return self.extents[name]

    def free_memory(self):
        return self.free_bytes

    def unload(self, engine):
        assert not self.queues[COMPUTE], f"{engine} unloaded while work is queued"
        assert all(engine != key for _, used in self.graphs for key, _ in used), f"{engine} unloaded under its graphs"
        del self.engines[engine]

    def launch(self, engine, inputs, outputs, workspace):
        assert engine in self.engines, f"{engine} is not loaded"
        address, nbytes = workspace
        assert nbytes >= self.activation(engine), "workspace too small"
        for tensor in (*inputs, *outputs):
            assert tensor.address % ALIGNMENT == 0, f"{tensor.name} is not aligned"
        context = (engine, tuple((tensor.name, tensor.shape) for tensor in inputs))
        state = (tuple(inputs), tuple(outputs), workspace)
        assert all(used.get(context, {state}) == {state} for _, used in self.graphs), "a graph lost its context"
        if self.recording is not None:
            self.recording[1].setdefault(context, set()).add(state)

        def work():
            feeds = {}
            for tensor in inputs:
                size = np.dtype(tensor.dtype).itemsize * int(np.prod(tensor.shape))
                raw, written = self._find(tensor.address, size)
                assert written.all(), f"{engine}: {tensor.name} was never written"
                feeds[tensor.name] = raw.copy().view(tensor.dtype).reshape(tensor.shape)
            if nbytes:
                scratch, written = self._find(address, nbytes)
                scratch[:], written[:] = 0xAA, False
            for tensor, value in zip(outputs, self._evaluate(engine, feeds, outputs), strict=True):
                assert (value.shape, value.dtype.name) == (tensor.shape, tensor.dtype)
                raw, written = self._find(tensor.address, value.nbytes)
                raw[:], written[:] = np.frombuffer(value.tobytes(), np.uint8), True
            self.log.append((engine, {name: value.copy() for name, value in feeds.items()}))

        self._queue(work, COMPUTE)

    def _evaluate(self, engine, feeds, outputs):
        if engine == DECODER:
            assert len(feeds["latents"]) <= self.extents["latents"][0]
            return [VaeDecoder(self.bundle.path, self.bundle.manifest.vae, BackendOptions(threads=1)).decode(**feeds)]
        if engine == TEXT_CONDITIONER:
            assert all(a <= b for a, b in zip(feeds["mask"].shape, self.extents["mask"], strict=True))
            values = self.backend._text_values(feeds)
            return [values[tensor.name] for tensor in outputs]
        if engine.subnet is None:
            assert len(feeds["timesteps"]) <= self.extents["timesteps"][0]
            assert len(feeds["labels"]) <= self.extents["labels"][0]
            return [self.backend.conditioning(feeds["timesteps"], feeds["labels"])]
        if self.bundle.manifest.dynamic_width:  # the engine's session on the device's weights, not the host's
            manifest = self.bundle.manifest
            specs = (
                *subnet_inputs(manifest.model, False),
                *unit_inputs(manifest.weights, manifest.model),
            )
            check_feeds(specs, feeds, str(engine))
            results = self.engines[engine]._session.run(feeds, str(engine))
            return [results[tensor.name] for tensor in outputs]
        result = self.engines[engine].step(feeds)
        named = {"x_prev": result.x_prev, "next_history": result.next_history, "token_overflow": result.overflow}
        return [named[tensor.name] for tensor in outputs]

    def begin_capture(self):
        assert self.recording is None
        self.recording = ([], {})

    def end_capture(self):
        (work, used), self.recording = self.recording, None
        assert all(len(states) == 1 for states in used.values()), "a context changed while it was captured"
        self.graphs.append((work, used))
        self.captures += 1
        return self.graphs[-1]

    def replay(self, graph):
        work, used = graph
        assert graph in self.graphs and {engine for engine, _ in used} <= set(self.engines)
        self.replays += 1
        self.running.append(graph)

        def play():
            self.running.remove(graph)
            for each in work:
                each()

        self._queue(play, COMPUTE)

    def drop(self, graph):
        assert graph not in self.running
        self.graphs.remove(graph)

    def _queue(self, work, stream):
        if self.recording is not None:
            assert stream == COMPUTE, "only the compute stream is captured"
            self.recording[0].append(work)
        else:
            self.queues[stream].append(work)

    def _wait_for(self, stream):
        while self.queues[stream]:
            self._advance()

    def _advance(self):
        """Do the first piece of work of a stream that may go on."""
        ready = [q for q in self.queues.values() if q and (callable(q[0]) or q[0] in self.done)]
        assert ready, "the streams wait for each other"
        work = ready[self.rng.integers(len(ready))].popleft()
        if callable(work):
            work()


@pytest.fixture
def fake_device():
    return FakeDevice


@pytest.fixture
def figures():
    """`figures(manifest, activation=1000)`: memory of every engine; each engine weighs differently."""

    def of(manifest, activation=lambda engine: 1000):
        return {
            engine: EngineMemory(activation(engine), 10_000 + 100 * (engine.subnet or 0) + 7 * engine.full)
            for engine in engines_of(manifest)
        }

    return of


@pytest.fixture
def relative_to():
    """|a - b| / |b|."""
    return lambda a, b: float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.fixture
def pairwise():
    """An ONNX Runtime backend whose conditioning is the same in any company."""
    return PairwiseBackend
