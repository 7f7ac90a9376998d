"""Whole runs on engines in PyTorch are the ordinary loop; on host memory, where the launch list works alike."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dydit.bundle.manifest import PlanKind, Routing
from dydit.bundle.texts import synthetic_texts
from dydit.diffusion.samplers import SamplerChoice
from dydit.errors import BackendError
from dydit.models.config import TokenScope
from dydit.models.pixart.config import PixArtConfig
from dydit.models.uvit.config import UViTConfig
from dydit.planning.resampling import resampled
from dydit.runtime.backends.base import BackendOptions
from dydit.runtime.backends.torch import TorchBackend
from dydit.runtime.backends.torch_cuda import TorchDeviceBackend, without_tf32
from dydit.runtime.device.execute import Tensor
from dydit.runtime.device.operations import CONDITIONER, DECODER, EngineId
from dydit.runtime.device.residency import engines_of
from dydit.runtime.device.torch_engines import TorchEngines, engine_memory, make_engine, tensor_at
from dydit.runtime.loop import MemoryStore, StepRunner, sample
from dydit.runtime.noise_source import SeededNoise
from dydit.runtime.request import make_batches
from dydit.runtime.resident import ResidentSubnets
from tests.fixtures.fake_driver import FakeDriver
from tests.fixtures.host_torch import HostTorchBackend

LABELS, IMAGES = [3, 1, 3, 0, 6], [0, 1, 2, 40, 41]
OPTIONS = BackendOptions(threads=1)
OVERFLOWING = {"routing": Routing.CAPACITY, "capacities": (12, 14, 14)}
SMALL = {"hidden_size": 64, "depth": 3, "num_heads": 4, "input_size": 8}
MODELS = {
    "pixart": PixArtConfig(**SMALL, caption_channels=24, text_tokens=6),
    "uvit": UViTConfig(**SMALL, patch_size=2, in_channels=4, num_classes=7, null_class_row=True),
}


@pytest.fixture
def bundle_of(make_bundle, make_checkpoint, small_config):
    """`bundle_of(model, **export settings)`: a bundle of `dit`, `pixart` or `uvit`, with texts if it takes them; or
    of `static`, a DiT without routers.
    """
    models = {**MODELS, "static": small_config.without_routers()}

    def make(name="dit", **settings):
        checkpoint = make_checkpoint(models[name]) if name in models else None
        bundle = make_bundle(checkpoint, steps=4, **settings)
        return bundle.with_texts(synthetic_texts(MODELS[name], 7)) if name == "pixart" else bundle

    return make


def run(backend, seed=5, scale=4.0):
    model = backend.bundle.manifest.model
    noise = SeededNoise(seed, (model.in_channels, model.input_size, model.input_size))
    batches, store = make_batches(LABELS, IMAGES, 2), MemoryStore()
    with ResidentSubnets(backend, 2) as subnets:
        stats = sample(StepRunner(backend, subnets, LABELS, scale), batches, noise, store)
    return np.concatenate([store.load(b).x for b in range(len(batches))]), stats


def near(a, b, bound=1e-5) -> bool:
    """Products have other heights than step by step, so sums are rounded otherwise; nothing else may differ."""
    return all(np.linalg.norm(x - y) < bound * np.linalg.norm(y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("dit", {**OVERFLOWING, "max_subnets": 3}),
        ("dit", {**OVERFLOWING, "plan": PlanKind.PER_STEP}),
        ("dit", {**OVERFLOWING, "plan": PlanKind.DYNAMIC_WIDTH}),
        ("dit", {"routing": Routing.DENSE}),
        ("static", {}),
        ("dit", {"sampler": "dpm-solver++", "routing": Routing.CAPACITY, "capacities": (15, 15, 15)}),
        ("pixart", {**OVERFLOWING, "max_subnets": 2}),
        ("pixart", {**OVERFLOWING, "plan": PlanKind.DYNAMIC_WIDTH}),
        ("uvit", {"routing": Routing.CAPACITY, "capacities": (14, 16, 14)}),
        ("uvit", {"routing": Routing.CAPACITY, "capacities": (14, 16, 14), "plan": PlanKind.DYNAMIC_WIDTH}),
    ],
)
def test_whole_runs_are_the_loop_with_and_without_graphs(model, settings, bundle_of):
    bundle = bundle_of(model, **settings)
    expected = {}
    with TorchBackend(bundle, OPTIONS) as backend:
        for seed, scale in ((5, 4.0), (6, 1.0)):
            expected[seed, scale] = run(backend, seed, scale)
    for graphs in (True, False):
        backend = HostTorchBackend(bundle, OPTIONS, graphs=graphs)
        for (seed, scale), (latents, theirs) in list(expected.items())[: 1 + graphs]:
            ours, stats = run(backend, seed, scale)
            assert near(ours, latents)
            # The device repeats whole segments; so of a merged plan also steps that did not overflow.
            assert stats.steps == theirs.steps and stats.repeated_steps >= theirs.repeated_steps
            if "plan" in settings:
                assert stats.repeated_steps == theirs.repeated_steps
        device = backend._sampler.executor.device
        assert (device.replays > 0) == graphs
        if "capacities" in settings and model == "dit":
            assert any(theirs.repeated_steps for _, theirs in expected.values()), "no token overflowed"
        backend.close()
        assert not device.driver.memory and not device._engines


def test_graphs_of_a_run_can_be_replayed_alone(bundle_of):
    """For measuring: what they compute is of no use, and a later run is not touched by it."""
    with HostTorchBackend(bundle_of(**OVERFLOWING), OPTIONS) as backend:
        with pytest.raises(BackendError, match="sample a run first"):
            _ = backend.executor
        latents, _ = run(backend)
        device = backend.executor.device
        before = device.replays
        assert backend.replay(2, 4) == backend.bundle.manifest.sampling.steps
        assert backend.replay(3, 6) == 0, "no batch of that size ran"
        with device.activate():
            device.idle()
        assert device.replays == before + len(backend.bundle.manifest.plan.segments)
        assert np.array_equal(run(backend)[0], latents)


def test_other_steps_run_on_the_same_engines(bundle_of):
    bundle = bundle_of(**OVERFLOWING, plan=PlanKind.DYNAMIC_WIDTH)
    other = resampled(bundle, SamplerChoice(steps=3, sampler="dpm-solver++"))
    with TorchBackend(other, OPTIONS) as backend:
        expected, _ = run(backend)
    with HostTorchBackend(bundle, OPTIONS) as backend:
        first, _ = run(backend)
        backend.use(other)
        assert near(run(backend)[0], expected)
        backend.use(bundle)
        assert np.array_equal(run(backend)[0], first)


def test_dynamic_routing_runs_with_all_tokens_and_says_so(bundle_of):
    bundle = bundle_of(routing=Routing.DYNAMIC, plan=PlanKind.DYNAMIC_WIDTH)
    with TorchBackend(bundle, OPTIONS) as backend:
        expected, _ = run(backend)
    with HostTorchBackend(bundle, OPTIONS) as backend:
        with pytest.warns(UserWarning, match="dynamic routing.*--routing capacity"):
            latents, stats = run(backend)
        assert near(latents, expected) and stats.repeated_steps == 0
        assert backend._sampler.executor.device.replays, "shapes do not depend on the data, so graphs are captured"


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_lower_precisions_are_near_the_loop(precision, bundle_of):
    bundle = bundle_of(precision=precision, **OVERFLOWING)
    with TorchBackend(bundle, OPTIONS) as one, HostTorchBackend(bundle, OPTIONS) as other:
        assert near(run(other)[0], run(one)[0], 5e-2)


def test_steps_find_their_inputs_at_the_same_places(bundle_of):
    """What a captured graph relies on: one set of addresses for each engine and set of shapes."""
    with HostTorchBackend(bundle_of(**OVERFLOWING), OPTIONS) as backend:
        run(backend), run(backend, seed=8)
        seen = backend._sampler.executor.device.seen
        steps = {key: places for key, places in seen.items() if key[0].subnet is not None}
        assert len(steps) >= 2 * len(backend.bundle.manifest.subnets), "two batch sizes"
        assert all(len(places) == 1 for places in steps.values())


class Waiting(TorchDispatchMode):
    """Notes the operations for which a host waits for a GPU, or that copy from the host's memory."""

    OPERATIONS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal", "lift_fresh")

    def __init__(self):
        super().__init__()
        self.found, self.count = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            each is not None and each.dtype is torch.bool
            for each in (args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ())
        )
        self.count += 1
        if any(name.startswith(each) for each in self.OPERATIONS) or by_mask:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("model", ["dit", "pixart", "uvit"])
@pytest.mark.parametrize("settings", [OVERFLOWING, {"routing": Routing.DENSE}], ids=["capacity", "dense"])
def test_no_step_waits_for_the_device(model, settings, bundle_of):
    capacities = {"capacities": (14, 16, 14)} if model == "uvit" and "capacities" in settings else {}
    bundle = bundle_of(model, **{**settings, **capacities})
    manifest, noted = bundle.manifest, {}
    with HostTorchBackend(bundle, OPTIONS, graphs=False) as backend:
        device = backend._sampler.executor.device

        def launch(engine, inputs, outputs, workspace):
            feeds = {each.name: device._view(each) for each in inputs}
            # What would be made on the host, beside the device of its inputs, is made on another device here.
            with torch.inference_mode(), torch.device("meta"), Waiting() as mode:
                results = device._engines[engine](feeds)
            assert {results[each.name].device.type for each in outputs} == {"cpu"}
            noted.setdefault(engine, []).append(mode)
            type(device).launch(device, engine, inputs, outputs, workspace)

        device.launch = launch
        run(backend)
    assert set(noted) >= {CONDITIONER, EngineId(0)}
    assert any(engine.full for engine in noted) == any(entry.full_file for entry in manifest.subnets)
    for engine, modes in noted.items():
        assert all(mode.count > 5 and not mode.found for mode in modes), (engine, modes[0].found)


def test_the_check_finds_waits(bundle_of):
    """The step-by-step form asks how many tokens were routed."""
    with TorchBackend(bundle_of(**OVERFLOWING), OPTIONS) as backend, Waiting() as mode:
        run(backend)
    assert "nonzero" in mode.found
    x = torch.arange(4.0)
    for waits in (lambda: x[x > 1], lambda: x.sum().item(), lambda: bool(x.any()), lambda: x[torch.tensor([1])]):
        with Waiting() as mode:
            waits()
        assert mode.found


def test_fp32_products_are_not_rounded_to_tf32_while_engines_run():
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [each.allow_tf32 for each in settings]
    try:
        for each in settings:
            each.allow_tf32 = True
        with pytest.raises(ValueError, match="inside"), without_tf32():
            assert not any(each.allow_tf32 for each in settings)
            raise ValueError("inside")
        assert all(each.allow_tf32 for each in settings)
    finally:
        for each, value in zip(settings, before, strict=True):
            each.allow_tf32 = value


def test_a_capture_that_fails_is_followed_by_the_run_without_graphs(bundle_of):
    """Any error of PyTorch within a capture is one of the capture: the run starts again without."""
    bundle = bundle_of(**OVERFLOWING)
    with HostTorchBackend(bundle, OPTIONS, graphs=False) as backend:
        expected, _ = run(backend)
    with HostTorchBackend(bundle, OPTIONS) as backend:
        backend._sampler.executor.device.records = False
        with pytest.warns(UserWarning, match="PyTorch failed in subnetwork 0.*continuing without CUDA graphs"):
            latents, _ = run(backend)
        assert np.array_equal(latents, expected) and not backend._sampler.executor.device.replays


def test_tokens_are_counted_and_none_beyond_its_slots_is_changed(bundle_of):
    bundle = bundle_of(**OVERFLOWING)
    with TorchBackend(bundle, OPTIONS) as backend:
        weights, manifest = backend._weights, bundle.manifest
        generator = torch.Generator().manual_seed(0)
        model = manifest.model
        shape = (3, model.in_channels, model.input_size, model.input_size)
        feeds = {name: torch.randn(shape, generator=generator) for name in ("x", "history", "noise")}
        feeds |= {"coefficients": torch.randn(8, generator=generator) / 8, "cfg_scale": torch.tensor(2.0)}
        feeds["condition"] = torch.randn((6, *model.condition_shape), generator=generator)
        if manifest.subnets[0].gated:
            feeds["gates"] = torch.ones(model.units.size)
        ours = make_engine(manifest, weights, EngineId(0))(feeds)
        theirs = backend.subnet(0)._model.step(**feeds)
        assert torch.equal(ours["token_overflow"], theirs.overflow) and theirs.overflow.any()
        assert near(ours["x_prev"].numpy(), theirs.x_prev.numpy())
        full = make_engine(manifest, weights, EngineId(0, full=True))(feeds)
        assert not full["token_overflow"].any()
        assert near(full["x_prev"].numpy(), backend.subnet(0, full_capacity=True)._model.step(**feeds).x_prev.numpy())
        assert not near(full["x_prev"].numpy(), theirs.x_prev.numpy())


def test_layers_are_routed_as_a_whole(make_bundle, make_checkpoint, small_config):
    config = small_config.model_copy(update={"token_scope": TokenScope.LAYER})
    bundle = make_bundle(make_checkpoint(config), steps=6, routing=Routing.DENSE)
    with TorchBackend(bundle, OPTIONS) as one, HostTorchBackend(bundle, OPTIONS) as other:
        assert near(run(other)[0], run(one)[0])


def test_memory_at_an_address_is_a_tensor_of_every_type():
    driver = FakeDriver()
    driver.push()
    place = driver.allocate(64)
    for dtype in ("float32", "float16", "bfloat16", "int64", "bool"):
        tensor = tensor_at(Tensor("t", dtype, (2, 3), place), "cpu")
        assert (tensor.dtype, tuple(tensor.shape), tensor.data_ptr()) == (getattr(torch, dtype), (2, 3), place)
        tensor.copy_(torch.tensor([[1, 0, 1], [0, 0, 1]]))
        assert tensor_at(Tensor("t", dtype, (6,), place), "cpu").float().tolist() == [1, 0, 1, 0, 0, 1]
    assert tensor_at(Tensor("t", "float32", (), place), "cpu").shape == ()


def test_weights_are_counted_once(bundle_of):
    bundle = bundle_of(**OVERFLOWING, plan=PlanKind.PER_STEP)
    manifest, memory = bundle.manifest, engine_memory(bundle.manifest)
    assert tuple(memory) == engines_of(manifest)
    assert memory[CONDITIONER].weights == sum(entry.nbytes for entry in manifest.weights.values())
    with TorchBackend(bundle, OPTIONS) as backend:
        stored = {tensor.untyped_storage().data_ptr() for tensor in backend._weights.values()}
        for index in range(len(manifest.subnets)):
            layers = [pair for block in backend.subnet(index)._model.blocks for pair in block.layers.values()]
            tensors = [each for pair in layers for each in pair if each.numel()]
            copies = [each for each in tensors if each.untyped_storage().data_ptr() not in stored]
            assert memory[EngineId(index)].weights == sum(each.nbytes for each in copies)
    wide = bundle_of(plan=PlanKind.DYNAMIC_WIDTH, **OVERFLOWING).manifest
    assert {each.weights for engine, each in engine_memory(wide).items() if engine != CONDITIONER} == {0}


def test_what_pytorch_cannot_run_is_one_line(bundle_of):
    bundle = bundle_of(routing=Routing.DENSE)
    with HostTorchBackend(bundle, OPTIONS) as backend:
        device = backend._sampler.executor.device
        device.load(CONDITIONER)
        with device.activate():
            place = device.allocate(1 << 16)
        inputs = [Tensor("timesteps", "float32", (2,), place), Tensor("labels", "int64", (1,), place + 256)]
        with pytest.raises(BackendError, match="PyTorch failed in conditioning") as caught:
            outputs = [Tensor("condition", "float32", (2, 1, 7, 64), place + 512)]
            TorchEngines.launch(device, CONDITIONER, inputs, outputs, (0, 0))
        assert "\n" not in str(caught.value)
        with pytest.raises(BackendError, match="decode with onnxruntime"):
            device.load(DECODER)
    with pytest.raises(BackendError, match="int8 bundles run on onnxruntime"):
        HostTorchBackend(bundle_of(precision="int8", plan=PlanKind.PER_STEP), OPTIONS)


def test_a_gpu_is_asked_for(bundle_of):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(BackendError, match="sees no CUDA device"):
        TorchDeviceBackend(bundle_of(routing=Routing.DENSE), BackendOptions(device="cuda"))
