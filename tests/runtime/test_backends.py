"""The contract that every backend keeps, held against the dense masked model."""

from __future__ import annotations

import shutil
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from dydit.bundle.bundle import Bundle
from dydit.bundle.manifest import PlanKind, Routing
from dydit.bundle.stored_weights import Precision
from dydit.diffusion.samplers import Sampler
from dydit.diffusion.steps import State
from dydit.errors import BackendError
from dydit.models.config import Routers
from dydit.runtime.backends.base import BackendOptions
from dydit.runtime.backends.registry import BACKENDS, backend_status, open_backend
from dydit.runtime.loop import StepRunner
from dydit.runtime.resident import ResidentSubnets
from tests.fixtures.packages import OPENVINO

pytestmark = pytest.mark.numerics

OPTIONS = BackendOptions(threads=1)
ONE_STEP = 1e-5  # relative L2 of one fp32 step against PyTorch
KINDS = {
    "merged": {},
    "per-step": {"plan": PlanKind.PER_STEP},
    "capacity": {"routing": Routing.CAPACITY},
    "dense": {"routing": Routing.DENSE},
    "all-channels": {"cfg_channels": 4},
    "sliding": {"plan": PlanKind.DYNAMIC_WIDTH},
    "sliding-capacity": {"plan": PlanKind.DYNAMIC_WIDTH, "routing": Routing.CAPACITY},
    "sliding-dense": {"plan": PlanKind.DYNAMIC_WIDTH, "routing": Routing.DENSE},
    "multistep": {"sampler": Sampler.DPM_SOLVER},
    "multistep-sliding-capacity": {
        "sampler": Sampler.DPM_SOLVER,
        "plan": PlanKind.DYNAMIC_WIDTH,
        "routing": Routing.CAPACITY,
    },
}


HERE = [name for name in BACKENDS if name != "openvino" or find_spec(name)]


@pytest.fixture(params=["onnxruntime", "torch", OPENVINO])
def backend_name(request) -> str:
    return request.param


def inputs(bundle: Bundle, batch: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    model, rng = bundle.manifest.model, np.random.default_rng(seed)
    shape = (2, batch, model.in_channels, model.input_size, model.input_size)
    x, noise = rng.standard_normal(shape).astype(np.float32)
    return x, noise, rng.integers(0, model.num_classes, batch)


def check_steps(name, bundle, checkpoint, reference, relative, cases, options=OPTIONS):
    backend = open_backend(name, bundle, options)
    with ResidentSubnets(backend, debug=True) as subnets:
        for step, batch, scale in cases:
            x, noise, labels = inputs(bundle, batch, seed=step)
            history = inputs(bundle, batch, seed=step + 1000)[0] if bundle.manifest.sampling.multistep else None
            state = State(x, history)
            result = StepRunner(backend, subnets, labels, scale).run(step, state, noise, labels)
            expected = reference(checkpoint, bundle, step, state, noise, labels, scale)
            assert np.array_equal(result.tokens, expected.tokens)
            if checkpoint.config.dynamic:
                assert 0 < expected.tokens.mean() < 1
            assert relative(result.x_prev, expected.x_prev) < ONE_STEP
            assert result.x_prev.dtype == np.float32 and not result.overflow.any()
            if bundle.manifest.sampling.multistep:
                assert relative(result.next_history, expected.next_history) < ONE_STEP
                assert result.next_history.dtype == np.float32
            else:
                assert result.next_history is None and not expected.next_history.any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_the_masked_model(backend_name, kind, make_bundle, make_checkpoint, reference, relative):
    """First, middle and last step; one image, odd, maximal; with guidance and without."""
    bundle = make_bundle(**KINDS[kind])
    masks = bundle.masks
    assert 0 < masks.mean() < 1 and len(np.unique(masks, axis=0)) > 4
    last = bundle.manifest.sampling.steps - 1
    cases = [(0, 1, 4.0), (last // 2, 3, 1.5), (last, 16, 4.0), (last // 3, 2, 1.0), (3, 1, 0.0)]
    check_steps(backend_name, bundle, make_checkpoint(), reference, relative, cases)


@pytest.mark.parametrize("plan", [PlanKind.MAX_SUBNETS, PlanKind.DYNAMIC_WIDTH])
@pytest.mark.parametrize("routers", [Routers.NONE, Routers.ALL_ROUTED])
def test_other_models(backend_name, routers, plan, make_bundle, make_checkpoint, small_config, reference, relative):
    """A static DiT, and routers without an always-on unit, whose blocks may have nothing on."""
    checkpoint = make_checkpoint(small_config.model_copy(update={"routers": routers}), flops_ratio=0.15)
    bundle = make_bundle(checkpoint, plan=plan)
    if routers is Routers.ALL_ROUTED:
        assert not bundle.manifest.model.units.any(bundle.masks).all(), "some block has nothing on"
    check_steps(backend_name, bundle, checkpoint, reference, relative, [(0, 2, 4.0), (5, 3, 1.0), (11, 1, 2.0)])


@pytest.mark.parametrize("name", ["onnxruntime", "torch"])
def test_packed_matrices_are_the_same_function(name, make_bundle, make_checkpoint, reference, relative):
    options = BackendOptions(threads=1, packed=True)
    check_steps(name, make_bundle(), make_checkpoint(), reference, relative, [(4, 3, 4.0)], options)


@pytest.mark.parametrize(("precision", "bar"), [(Precision.FP16, 1e-3), (Precision.BF16, 1e-2)])
def test_lower_precision_is_the_same_function_less_exactly(
    backend_name, precision, bar, make_bundle, make_checkpoint, reference, relative
):
    bundle, checkpoint = make_bundle(precision=precision), make_checkpoint()
    if backend_name == "onnxruntime" and precision is Precision.BF16:
        with pytest.raises(BackendError, match=r"no bf16 matrix products on the CPU; .*--backend torch"):
            open_backend(backend_name, bundle, OPTIONS)
        return
    backend, (x, noise, labels) = open_backend(backend_name, bundle, OPTIONS), inputs(bundle, 3)
    with ResidentSubnets(backend, debug=True) as subnets:
        result = StepRunner(backend, subnets, labels, 4.0).run(6, State(x), noise, labels)
    expected = reference(checkpoint, bundle, 6, State(x), noise, labels, 4.0)
    assert (result.tokens != expected.tokens).mean() < 0.01
    assert 1e-6 < relative(result.x_prev, expected.x_prev) < bar


@pytest.mark.parametrize("precision", [Precision.FP16, Precision.BF16])
def test_torch_widens_weights_that_the_cpu_does_not_multiply(precision, make_bundle, monkeypatch, relative):
    """Both ways are near each other; only the one in 16 bits rounds what enters a product."""
    bundle = make_bundle(precision=precision)
    x, noise, labels = inputs(bundle, 3)
    made = []
    for there in (False, True):
        monkeypatch.setattr("dydit.runtime.backends.torch_products.multiplies", lambda dtype, _there=there: _there)
        backend = open_backend("torch", bundle, OPTIONS)
        with ResidentSubnets(backend) as subnets:
            types = {weight.dtype for weight, _ in subnets.get(0)._model.blocks[1].layers.values()}
            made.append(StepRunner(backend, subnets, labels, 4.0).run(6, State(x), noise, labels).x_prev)
        assert types == {getattr(torch, precision.dtype) if there else torch.float32}
    assert 1e-5 < relative(*made) < 1e-2


def test_fp16_weights_may_be_widened_at_load_or_in_each_step(make_bundle, relative):
    """Packed sessions widen all at once, others a layer at a time: the same products, whose sums may round apart."""
    bundle = make_bundle(precision=Precision.FP16)
    x, noise, labels = inputs(bundle, 3)
    made = []
    for packed in (False, True):
        backend = open_backend("onnxruntime", bundle, BackendOptions(threads=1, packed=packed))
        with ResidentSubnets(backend) as subnets:
            made.append(StepRunner(backend, subnets, labels, 4.0).run(6, State(x), noise, labels).x_prev)
    assert relative(*made) < 1e-4


def test_conditioning_is_that_of_the_blocks(backend_name, make_bundle, make_checkpoint, relative):
    bundle, model = make_bundle(), make_checkpoint().model()
    labels = np.array([3, model.config.null_class, 0])
    timesteps = np.array([999, 0, 17, 500], np.float32)
    table = open_backend(backend_name, bundle, OPTIONS).conditioning(timesteps, labels)
    assert table.shape == (4, 3, 6 * model.config.depth + 2, model.config.hidden_size) and table.dtype == np.float32
    with torch.no_grad():
        for i, t in enumerate(timesteps.tolist()):
            c = model.t_embedder(torch.tensor([t])) + model.y_embedder(torch.from_numpy(labels))
            layers = [*model.blocks, model.final_layer]
            chunks = [layer.adaLN_modulation(c).view(3, -1, model.config.hidden_size) for layer in layers]
            expected = torch.cat(chunks, 1).numpy()
            expected[:, [1, 4, 7, 10, 13, 16, 19]] += 1
            assert relative(table[i], expected) < 1e-6


def test_overflow_is_counted_alike_and_full_capacity_has_none(make_bundle, relative):
    bundle = make_bundle(routing=Routing.CAPACITY, capacities=(3, 5, 16))
    x, noise, labels = inputs(bundle, 4)
    results = {}
    for name in HERE:
        backend = open_backend(name, bundle, OPTIONS)
        with ResidentSubnets(backend, debug=True) as subnets:
            runner = StepRunner(backend, subnets, labels, 4.0)
            feeds = runner.feeds(6, State(x), noise, labels)
            index = next(s.subnet for s in bundle.manifest.plan.segments if 6 in s.steps)
            results[name] = tight, full = subnets.get(index).step(feeds), subnets.full(index).step(feeds)
        rows = 2 * len(x)
        assert tight.overflow[0] == tight.tokens[0].sum() - 3 * rows > 0
        assert tight.overflow[2] == 0 and not full.overflow.any()
        assert relative(tight.x_prev, full.x_prev) > 1e-4, "dropped tokens change the result"
    (tight, full), *others = results.values()
    assert others
    for other_tight, other_full in others:
        assert np.array_equal(tight.overflow, other_tight.overflow)
        assert np.array_equal(tight.tokens, other_tight.tokens)
        assert relative(tight.x_prev, other_tight.x_prev) < ONE_STEP
        assert relative(tight.residuals, other_tight.residuals) < ONE_STEP
        assert relative(full.x_prev, other_full.x_prev) < ONE_STEP


def test_debug_outputs_are_extra(backend_name, make_bundle):
    bundle = make_bundle()
    backend, (x, noise, labels) = open_backend(backend_name, bundle, OPTIONS), inputs(bundle, 2)
    results = []
    for debug in (False, True):
        with ResidentSubnets(backend, debug=debug) as subnets:
            results.append(StepRunner(backend, subnets, labels, 4.0).run(5, State(x), noise, labels))
    plain, debug = results
    assert plain.tokens is None and plain.residuals is None
    assert debug.tokens.shape == (3, 4, 16) and debug.residuals.shape == (3, 4, 16, 64)
    assert np.allclose(plain.x_prev, debug.x_prev, rtol=1e-5, atol=1e-5)


def test_wrong_feeds_are_named(backend_name, make_bundle):
    bundle = make_bundle()
    backend, (x, noise, labels) = open_backend(backend_name, bundle, OPTIONS), inputs(bundle, 2)
    with ResidentSubnets(backend) as subnets:
        feeds = StepRunner(backend, subnets, labels, 4.0).feeds(0, State(x), noise, labels)
        subnet = subnets.get(0)
        for name, value, message in (
            ("x", x.astype(np.float64), "'x' is float64, expected float32"),
            ("noise", noise[:1], "'noise' has shape"),
            ("history", feeds["history"][:1], "'history' has shape"),
            ("condition", feeds["condition"][:3], "condition has 3 rows for 2 images"),
            ("y", labels, "unknown input 'y'"),
        ):
            with pytest.raises(BackendError, match=message):
                subnet.step({**feeds, name: value})
        with pytest.raises(BackendError, match="'noise' is missing"):
            subnet.step({name: value for name, value in feeds.items() if name != "noise"})
    with pytest.raises(BackendError, match="was closed"):
        subnet.step(feeds)
    with pytest.raises(BackendError, match="'timesteps' is int64, expected float32"):
        backend.conditioning(np.array([1]), np.array([1]))
    with pytest.raises(BackendError, match="'labels' is int32"):
        backend.conditioning(np.array([1], np.float32), np.array([1], np.int32))


def test_unknown_backends_name_those_there_are(make_bundle):
    with pytest.raises(BackendError, match="unknown backend 'jax'; available: onnxruntime, torch, openvino, tensorrt"):
        open_backend("jax", make_bundle())
    with pytest.raises(BackendError, match="unknown device 'tpu'; known: cpu, cuda"):
        open_backend("torch", make_bundle(), BackendOptions(device="tpu"))
    for name, device, message in (
        (
            "onnxruntime",
            "npu",
            r"onnxruntime runs on cpu and cuda, not on npu; .*--device cpu\), or .*--backend openvino",
        ),
        ("openvino", "cuda", r"openvino runs on cpu, gpu and npu, not on cuda; .*, or .*--backend onnxruntime"),
        ("openvino", "gpu:1", "'gpu:1': only the first one can be used; use device='gpu'"),
    ):
        with pytest.raises(BackendError, match=message):
            open_backend(name, make_bundle(), BackendOptions(device=device))
    with pytest.raises(BackendError, match="threads is -1, but must not be negative"):
        open_backend("torch", make_bundle(), BackendOptions(threads=-1))


def test_status_lists_what_works():
    status = {name: (works, detail) for name, works, detail in backend_status()}
    assert all(status[name][0] and "devices: cpu" in status[name][1] for name in HERE)
    for name in ("tensorrt", "tensorrt-rtx"):
        works, detail = status[name]
        assert works or "pip install" in detail or "no driver or GPU was found here" in detail


def test_missing_packages_say_what_to_install(make_bundle, monkeypatch):
    bundle = make_bundle()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match=r"pip install 'dydit\[cpu\]'"):
        open_backend("onnxruntime", bundle)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(BackendError, match=r"PyTorch cannot be imported .* pip install 'dydit\[export\]'"):
        open_backend("torch", bundle)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(BackendError, match=r"openvino cannot be imported .* pip install 'dydit\[openvino\]'"):
        open_backend("openvino", bundle)
    works = {name: (ok, "pip install" in detail) for name, ok, detail in backend_status()}
    assert works["onnxruntime"] == works["torch"] == works["openvino"] == (False, True)


def test_debug_without_onnx_says_what_to_install(make_bundle, monkeypatch):
    backend = open_backend("onnxruntime", make_bundle(), OPTIONS)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(BackendError, match=r"needs onnx, which is not installed: pip install 'dydit\[export\]'"):
        backend.subnet(0, debug=True)


def test_no_cuda_here(backend_name, make_bundle):
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(BackendError, match="--device cpu"):
        open_backend(backend_name, make_bundle(), BackendOptions(device="cuda"))


def test_a_graph_that_does_not_load_is_one_line(make_bundle, tmp_path):
    bundle = make_bundle()
    copy = tmp_path / "bundle"
    shutil.copytree(bundle.path, copy)
    (copy / bundle.manifest.subnets[0].file).write_bytes(b"not a graph")
    backend = open_backend("onnxruntime", Bundle(copy, bundle.manifest), OPTIONS)
    with pytest.raises(BackendError, match=r"cannot load .*subnet-0000.onnx") as caught:
        backend.subnet(0)
    assert "\n" not in str(caught.value)


def test_torch_weights_are_one_map_of_the_file(make_bundle):
    """Whatever a subnetwork cuts, the file stays as it is."""
    from dydit.runtime.backends.torch import mapped_weights

    bundle = make_bundle()
    weights = mapped_weights(bundle, torch.device("cpu"))
    assert weights.keys() == bundle.manifest.weights.keys()
    starts = {weights[name].data_ptr() - entry.offset for name, entry in bundle.manifest.weights.items()}
    assert len(starts) == 1
    weights["embed.bias"].zero_()
    assert np.count_nonzero(bundle.weight("embed.bias"))
