"""Whole runs by bound addresses are the loop; on the CPU provider, where binding works alike."""

from __future__ import annotations

import sys

import numpy as np
import onnx
import pytest

from dydit.bundle.manifest import PlanKind, Routing
from dydit.bundle.texts import synthetic_texts
from dydit.errors import BackendError
from dydit.models.pixart.config import PixArtConfig
from dydit.runtime.backends.base import BackendOptions
from dydit.runtime.backends.onnxruntime import OnnxRuntimeBackend
from dydit.runtime.backends.ort_cuda import CudaSessions, OnnxRuntimeDeviceBackend, _BoundEngine, session_memory
from dydit.runtime.backends.session import WEIGHTS_APART
from dydit.runtime.device.cuda import CudaMemory
from dydit.runtime.device.execute import Tensor
from dydit.runtime.device.operations import CONDITIONER, TEXT_CONDITIONER, EngineId
from dydit.runtime.device.residency import engines_of
from dydit.runtime.device.unit_weights import UnitWeights
from dydit.runtime.loop import MemoryStore, StepRunner, sample
from dydit.runtime.noise_source import SeededNoise
from dydit.runtime.request import make_batches
from dydit.runtime.resident import ResidentSubnets
from tests.fixtures.fake_driver import FakeDriver
from tests.fixtures.simulated_device import SimulatedDeviceBackend, SimulatedSessions

LABELS, IMAGES = [3, 1, 3, 0, 6], [0, 1, 2, 40, 41]
OPTIONS = BackendOptions(threads=1)


def run(backend, seed=5, scale=4.0):
    model = backend.bundle.manifest.model
    noise = SeededNoise(seed, (model.in_channels, model.input_size, model.input_size))
    batches, store = make_batches(LABELS, IMAGES, 2), MemoryStore()
    with ResidentSubnets(backend, 2) as subnets:
        stats = sample(StepRunner(backend, subnets, LABELS, scale), batches, noise, store)
    return np.concatenate([store.load(b).x for b in range(len(batches))]), stats


def near(a, b) -> bool:
    """Conditioning rounds otherwise when other labels and steps come together; nothing else may differ."""
    return all(np.linalg.norm(x - y) < 1e-5 * np.linalg.norm(y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    "settings",
    [
        {"routing": Routing.DENSE},
        {"routing": Routing.DYNAMIC, "plan": PlanKind.PER_STEP, "steps": 6},
        {"routing": Routing.CAPACITY, "capacities": (12, 14, 14), "plan": PlanKind.PER_STEP, "steps": 6},
        {"routing": Routing.DYNAMIC, "plan": PlanKind.DYNAMIC_WIDTH},
        {"routing": Routing.CAPACITY, "capacities": (12, 14, 14), "plan": PlanKind.DYNAMIC_WIDTH},
    ],
    ids=["dense", "dynamic", "overflowing", "sliding", "sliding and overflowing"],
)
def test_whole_runs_are_the_loop(settings, make_bundle):
    bundle = make_bundle(**settings)
    backend = SimulatedDeviceBackend(bundle, OPTIONS)
    for seed, scale in ((5, 4.0), (6, 1.0)):
        latents, stats = run(backend, seed, scale)
        expected, theirs = run(OnnxRuntimeBackend(bundle, OPTIONS), seed, scale)
        assert near(latents, expected)
        assert (stats.steps, stats.repeated_steps) == (theirs.steps, theirs.repeated_steps)
    assert stats.repeated_steps == 0 or "capacities" in settings
    driver = backend._sampler.executor.device.driver
    assert len(driver.memory) > 10
    backend.close()
    assert not driver.memory and not driver.faults and not driver.pageable
    with pytest.raises(BackendError, match="this backend was closed; open the bundle again"):
        run(backend)


@pytest.fixture
def pixart_bundle(make_bundle, make_checkpoint):
    """`pixart_bundle(**export settings)`: a bundle of a model that texts condition, with texts for `LABELS`."""
    config = PixArtConfig(hidden_size=64, depth=3, num_heads=4, input_size=8, caption_channels=24, text_tokens=6)

    def make(**settings):
        bundle = make_bundle(make_checkpoint(config), steps=6, **settings)
        return bundle.with_texts(synthetic_texts(config, 7))

    return make


@pytest.mark.parametrize("plan", [PlanKind.PER_STEP, PlanKind.DYNAMIC_WIDTH])
def test_whole_runs_with_texts_are_the_loop(plan, pixart_bundle):
    bundle = pixart_bundle(routing=Routing.CAPACITY, capacities=(12, 14, 14), plan=plan)
    backend = SimulatedDeviceBackend(bundle, OPTIONS)
    for scale in (4.0, 1.0):
        latents, stats = run(backend, scale=scale)
        expected, theirs = run(OnnxRuntimeBackend(bundle, OPTIONS), scale=scale)
        assert near(latents, expected)
        assert (stats.steps, stats.repeated_steps) == (theirs.steps, theirs.repeated_steps)
    backend.close()


def test_steps_find_their_inputs_at_the_same_places(make_bundle):
    """What the provider's graphs ask for: one set of addresses for each session and batch size."""
    seen = {}

    class Noting(SimulatedSessions):
        def launch(self, engine, inputs, outputs, workspace):
            shapes = tuple(each.shape for each in inputs)
            seen.setdefault((engine, shapes), set()).add(tuple(each.address for each in (*inputs, *outputs)))
            super().launch(engine, inputs, outputs, workspace)

    backend = SimulatedDeviceBackend(make_bundle(routing=Routing.DENSE), OPTIONS)
    sampler = backend._sampler
    sampler.executor.device.__class__ = Noting
    run(backend), run(backend, seed=8)
    steps = {key: places for key, places in seen.items() if key[0] != CONDITIONER}
    assert len(steps) == 2 * len(backend.bundle.manifest.subnets), "two batch sizes"
    assert all(len(places) == 1 for places in steps.values())


def test_graphs_are_told_apart_by_shapes_and_addresses(make_bundle):
    """A graph that the provider captured holds addresses: at others it must not be replayed."""
    bundle = make_bundle(routing=Routing.DENSE)
    device = SimulatedSessions(bundle, OPTIONS)
    with device.activate():
        device.load(CONDITIONER)
        engine, places = device._engines[CONDITIONER], [device.allocate(1 << 16) for _ in range(4)]
        for place in places:
            device.clear(place, 1 << 16)
        device.idle()
    engine._graphs = True
    vectors = 6 * bundle.manifest.model.depth + 2
    for steps, labels, out in ((1, 1, 2), (1, 1, 3), (2, 1, 2), (1, 0, 2), (1, 1, 2)):
        inputs = [Tensor("timesteps", "float32", (steps,), places[0]), Tensor("labels", "int64", (1,), places[labels])]
        engine.launch(inputs, [Tensor("condition", "float32", (steps, 1, vectors, 64), places[out])], "conditioning")
    assert list(engine._captured.values()) == [1, 2, 3, 4]


def test_a_capture_that_fails_is_run_again_without_graphs(make_bundle):
    """Once: the provider captures in a session's first runs, not when it is opened."""
    bundle = make_bundle(routing=Routing.DENSE)
    device, vectors = SimulatedSessions(bundle, OPTIONS), 6 * bundle.manifest.model.depth + 2
    given = {"timesteps": np.array([3.0], np.float32), "labels": np.array([1])}
    with device.activate():
        device.load(CONDITIONER)
        inputs = [Tensor(name, each.dtype.name, each.shape, device.allocate(64)) for name, each in given.items()]
        for tensor, each in zip(inputs, given.values(), strict=True):
            device.upload(tensor.address, each, "compute")
        out = Tensor("condition", "float32", (1, 1, vectors, 64), device.allocate(vectors * 256))
        device.clear(out.address, vectors * 256)
        device.idle()
    engine = device._engines[CONDITIONER]

    class Capturing:
        """A session whose runs are refused, as where the provider cannot capture what it is told to."""

        io_binding, runs = engine._session.io_binding, 0

        def run_with_iobinding(self, binding, options):
            self.runs += 1
            raise RuntimeError("operation not permitted when stream is capturing")

    refusing = Capturing()
    engine._graphs, engine._session = True, refusing
    with pytest.warns(UserWarning, match=r"conditioning.onnx runs without CUDA graphs: operation not permitted"):
        engine.launch(inputs, [out], "conditioning")
    expected = OnnxRuntimeBackend(bundle, OPTIONS)._conditioning(given)
    with device.activate():
        data = device.download(out.address, vectors * 256).view(np.float32)
    assert np.array_equal(data.reshape(expected.shape), expected)
    engine.launch(inputs, [out], "conditioning")
    assert refusing.runs == 1 and not engine._graphs
    engine._session = refusing
    with pytest.raises(BackendError, match="onnxruntime failed in conditioning: operation not permitted"):
        engine.launch(inputs, [out], "conditioning")


def test_bf16_is_bound_by_its_onnx_number(tmp_path):
    """NumPy has no such type, and weights that slide are inputs."""
    helper, types = onnx.helper, onnx.TensorProto
    node = helper.make_node("Cast", ["w"], ["y"], to=types.FLOAT)
    values = [helper.make_tensor_value_info(*each, [4]) for each in (("w", types.BFLOAT16), ("y", types.FLOAT))]
    graph = helper.make_graph([node], "cast", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11), tmp_path / "c.onnx")
    engine, memory = _BoundEngine(tmp_path / "c.onnx", "cpu", OPTIONS, 0, graphs=False), CudaMemory(FakeDriver())
    numbers = np.array([1.0, -2.0, 0.5, 96.0], np.float32)
    with memory.activate():
        w, y = memory.allocate(8), memory.allocate(16)
        memory.upload(w, (numbers.view(np.uint32) >> 16).astype(np.uint16), "compute")
        memory.idle()
        engine.launch([Tensor("w", "bfloat16", (4,), w)], [Tensor("y", "float32", (4,), y)], "cast")
        assert np.array_equal(memory.download(y, 16).view(np.float32), numbers)
    memory.close()


def test_what_a_session_cannot_run_is_one_line(make_bundle):
    device = SimulatedSessions(make_bundle(), OPTIONS)
    with device.activate():
        device.load(CONDITIONER)
        place = device.allocate(1 << 20)
        device.clear(place, 1 << 20)
    wrong = [Tensor("timesteps", "int64", (2,), place), Tensor("labels", "int64", (1,), place)]
    out = [Tensor("condition", "float32", (2, 1, 20, 64), place)]
    with device.activate(), pytest.raises(BackendError, match="onnxruntime failed in conditioning") as caught:
        device.launch(CONDITIONER, wrong, out, (0, 0))
        device.idle()
    assert "\n" not in str(caught.value)


def test_memory_is_that_of_the_weights(make_bundle):
    bundle = make_bundle(routing=Routing.CAPACITY, capacities=(12, 14, 14))
    total = bundle.manifest.files["weights.bin"].bytes
    figures = {engine: session_memory(bundle, engine).weights for engine in engines_of(bundle.manifest)}
    assert all(0 < weights < total for weights in figures.values())
    assert figures[EngineId(0)] == figures[EngineId(0, True)] == bundle.manifest.subnets[0].weight_bytes
    sliding = make_bundle(plan=PlanKind.DYNAMIC_WIDTH)
    assert list(engines_of(sliding.manifest)) == [CONDITIONER, EngineId(0)]
    entry, held = sliding.manifest.subnets[0], session_memory(sliding, EngineId(0)).weights
    units = UnitWeights(sliding.manifest).bindings(0)
    assert held == entry.weight_bytes - sum(each.nbytes for each in units), "what has one width only"


def test_weights_of_the_text_graph_are_counted_once(pixart_bundle):
    bundle = pixart_bundle(plan=PlanKind.DYNAMIC_WIDTH)
    model, weights = bundle.manifest.model, bundle.manifest.weights
    figures = {engine: session_memory(bundle, engine).weights for engine in engines_of(bundle.manifest)}
    assert list(figures) == [CONDITIONER, TEXT_CONDITIONER, EngineId(0)]
    graph = onnx.load(bundle.file("text.onnx"), load_external_data=False).graph
    names = {each.name for each in graph.initializer if each.name in weights}
    assert names == {name for name in weights if model.is_text(name)}
    assert figures[TEXT_CONDITIONER] == sum(weights[name].nbytes for name in names)
    units = sum(each.nbytes for each in UnitWeights(bundle.manifest).bindings(0))
    assert sum(figures.values()) + units <= sum(each.nbytes for each in weights.values())


def test_the_gpu_needs_a_driver_layer(make_bundle, monkeypatch):
    from dydit.runtime.backends import onnxruntime

    real = onnxruntime.runtime()
    monkeypatch.setattr(real, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setitem(sys.modules, "pycuda", None)
    monkeypatch.setitem(sys.modules, "cuda", None)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(BackendError, match=r"pycuda cannot be imported .* and cuda-bindings cannot be imported"):
        OnnxRuntimeDeviceBackend(make_bundle(), BackendOptions(device="cuda"))


class TestCudaSessions:
    """What is asked of the CUDA provider, by an onnxruntime that notes it and then runs on the CPU."""

    @pytest.fixture
    def asked(self, monkeypatch):
        from dydit.runtime.backends import onnxruntime

        real, asked = onnxruntime.runtime(), []
        session = real.InferenceSession

        def note(file, settings, providers, **more):
            (name, options), level = providers[0], settings.graph_optimization_level
            apart = settings.get_session_config_entry(WEIGHTS_APART)
            disabled = more.get("disabled_optimizers", [])
            asked.append({"provider": name, "level": level, "disabled": disabled, "apart": apart, **options})
            return session(file, settings, providers=["CPUExecutionProvider"], **more)

        monkeypatch.setattr(real, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
        monkeypatch.setattr(real, "InferenceSession", note)
        monkeypatch.setattr(real, "preload_dlls", lambda: asked.append("libraries"), raising=False)
        return asked

    def test_products_in_fp32_are_not_rounded_to_tf32(self, asked, make_bundle):
        options = BackendOptions(device="cuda")
        with pytest.raises(BackendError, match="could not start its CUDAExecutionProvider"):
            OnnxRuntimeBackend(make_bundle(), options).subnet(0)
        assert asked[0] == "libraries", "before the first session"
        assert asked[1]["provider"] == "CUDAExecutionProvider" and asked[1]["use_tf32"] == "0"
        assert asked[1]["apart"] == "1"
        with pytest.raises(BackendError, match="could not start its CUDAExecutionProvider"):
            _BoundEngine(make_bundle().file("conditioning.onnx"), "cuda", options, 7, graphs=True)
        bound = asked[-1]
        assert (bound["use_tf32"], bound["user_compute_stream"], bound["enable_cuda_graph"]) == ("0", "7", "1")
        assert bound["arena_extend_strategy"] == "kSameAsRequested", "many sessions grow to what they need"
        assert bound["apart"] == "1", "of weights, which are allocated without the arena"

    def test_what_spares_memory_on_the_cpu_is_not_done(self, asked, make_bundle):
        """There fp16 weights are widened, which a GPU does not do."""
        import onnxruntime

        bundle = make_bundle(precision="fp16")
        with pytest.raises(BackendError, match="could not start"):
            OnnxRuntimeBackend(bundle, BackendOptions(device="cuda")).subnet(0)
        assert asked[-1]["level"] == onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        assert asked[-1]["disabled"] == []

    @pytest.mark.parametrize("graphs", [True, False])
    def test_graphs_can_be_left_out(self, graphs, asked, make_bundle):
        bundle = make_bundle(routing=Routing.DENSE)
        device = CudaSessions(bundle, BackendOptions(device="cuda"), graphs, FakeDriver())
        with device.activate(), pytest.raises(BackendError, match="could not start"):
            device.load(EngineId(0))
        assert asked[-1]["enable_cuda_graph"] == str(int(graphs))
