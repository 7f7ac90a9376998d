"""Fake quantization computes what an exported bundle computes on ONNX Runtime, whichever layers stay in 16 bits."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from dydit.bundle.manifest import PlanKind
from dydit.bundle.stored_weights import Precision
from dydit.calibrate.activation_ranges import ActivationRanges
from dydit.calibrate.fake_quantization import FakeQuantizedImages, FakeQuantizedSampler, in_8_bits
from dydit.calibrate.observers import ObservedRun, observe
from dydit.calibrate.range_methods import Method
from dydit.diffusion.samplers import Sampler, SamplerConfig
from dydit.diffusion.steps import State, run_steps
from dydit.parity.comparison import relative_l2
from dydit.runtime.backends.registry import open_backend
from dydit.runtime.loop import StepRunner
from dydit.runtime.noise_source import SeededNoise
from dydit.runtime.request import Batch
from dydit.runtime.resident import ResidentSubnets
from tests.fixtures.cpu import require_exact_int8

LAYERS = ("qkv", "proj", "fc1", "fc2")

pytestmark = pytest.mark.numerics

STEPS, LABELS, SCALE, SEGMENTS = 12, (0, 1, 2, 3), 1.5, 4
SAMPLING = SamplerConfig(steps=STEPS)


@pytest.fixture(scope="module")
def segments(make_bundle):
    plan = make_bundle(plan=PlanKind.MAX_SUBNETS, max_subnets=SEGMENTS).manifest.plan
    return [(each.first, each.first + each.count) for each in plan.segments]


@pytest.fixture(scope="module")
def ranges(make_checkpoint, segments) -> ActivationRanges:
    seen = observe(make_checkpoint(), ObservedRun(segments, LABELS, [SCALE], SAMPLING))
    return seen.choose(Method.MINMAX, len(LABELS))


def kept_of(which: str, shape: tuple[int, ...]) -> np.ndarray:
    kept = np.zeros(shape, bool)
    if which == "all":
        kept[:] = True
    elif which == "every second":
        kept.reshape(-1)[::2] = True
    elif which == "by chance":
        kept = np.random.default_rng(0).random(shape) < 0.5
    elif which in LAYERS:
        kept[..., LAYERS.index(which)] = True
    return kept


def with_kept(ranges: ActivationRanges, kept: np.ndarray) -> ActivationRanges:
    rows = tuple(tuple(map(tuple, blocks)) for blocks in kept.tolist())
    return ActivationRanges.model_validate({**ranges.model_dump(), "in_16_bits": rows})


@pytest.mark.parametrize("precision", [Precision.INT8_STATIC, Precision.FP8])
@pytest.mark.parametrize("which", ["none", "all", "every second", "by chance", *LAYERS])
def test_it_is_what_the_exported_bundle_computes(
    which, precision, ranges, segments, make_checkpoint, make_bundle
) -> None:
    """Step by step from the same latents: apart by far less than 8 bits part from fp32.

    Not by nothing: attention in fp16 is computed otherwise, and what lies on the edge between two steps of a scale may
    then fall to either side, as may a token near its router's zero.
    """
    if precision is Precision.INT8_STATIC:
        require_exact_int8()
    kept = kept_of(which, (SEGMENTS, 3, len(LAYERS)))
    bundle = make_bundle(
        plan=PlanKind.MAX_SUBNETS, max_subnets=SEGMENTS, precision=precision, activations=with_kept(ranges, kept)
    )
    sampler = FakeQuantizedSampler(make_checkpoint(), ranges, segments, precision, SAMPLING)
    labels, noise = np.array(LABELS), SeededNoise(5, (4, 8, 8))
    batch = Batch(0, tuple(range(len(LABELS))), labels)
    engine, x = open_backend("onnxruntime", bundle), noise.initial(batch)
    ratios = []
    with ResidentSubnets(engine) as subnets:
        runner = StepRunner(engine, subnets, labels, SCALE)
        for step in range(STEPS - 1):  # nothing is on in the last one
            drawn, modulation = noise.step(batch, step), sampler.condition(step, labels, SCALE)
            chosen, nothing = kept[sampler.segment_of[step]], np.zeros((3, len(LAYERS)), bool)
            ours, eighth, plain = (
                sampler.step(
                    sampler.subnet(step, sampler.layers(step, each)), step, State(x), drawn, modulation, SCALE
                ).x
                for each in (chosen, nothing, None)
            )
            theirs = runner.run(step, State(x), drawn, labels).x_prev
            ratios.append(relative_l2(ours, theirs) / relative_l2(eighth, plain))
            x = plain
    assert np.median(ratios) < 0.3, np.median(ratios, axis=1)


@pytest.mark.parametrize("precision", [Precision.INT8_STATIC, Precision.FP8])
def test_it_is_what_a_smoothed_bundle_computes(
    precision, segments, make_checkpoint, make_bundle, make_smoothing, small_config
) -> None:
    """With layers of both kinds; and what is not quantised is the model, bit for bit."""
    if precision is Precision.INT8_STATIC:
        require_exact_int8()
    smoothing = make_smoothing(small_config, share=0.7)
    seen = observe(make_checkpoint(), ObservedRun(segments, LABELS, [SCALE], SAMPLING), smoothing)
    ranges = seen.choose(Method.MINMAX, len(LABELS)).model_copy(update={"smoothing": smoothing})
    kept = kept_of("by chance", (SEGMENTS, 3, len(LAYERS)))
    bundle = make_bundle(
        plan=PlanKind.MAX_SUBNETS, max_subnets=SEGMENTS, precision=precision, activations=with_kept(ranges, kept)
    )
    sampler, same = (
        FakeQuantizedSampler(make_checkpoint(), each, segments, precision, SAMPLING)
        for each in (ranges, ranges.model_copy(update={"smoothing": None}))
    )
    labels, noise = np.array(LABELS), SeededNoise(5, (4, 8, 8))
    batch = Batch(0, tuple(range(len(LABELS))), labels)
    engine, x = open_backend("onnxruntime", bundle), noise.initial(batch)
    ratios = []
    with ResidentSubnets(engine) as subnets:
        runner = StepRunner(engine, subnets, labels, SCALE)
        for step in range(STEPS - 1):
            drawn, choice = noise.step(batch, step), kept[sampler.segment_of[step]]
            modulation, unmoved = (each.condition(step, labels, SCALE) for each in (sampler, same))
            ours, plain = (
                sampler.step(
                    sampler.subnet(step, sampler.layers(step, each)), step, State(x), drawn, modulation, SCALE
                ).x
                for each in (choice, None)
            )
            unsmoothed = same.subnet(step, same.layers(step, None))
            np.testing.assert_array_equal(plain, same.step(unsmoothed, step, State(x), drawn, unmoved, SCALE).x)
            theirs = runner.run(step, State(x), drawn, labels).x_prev
            ratios.append(relative_l2(ours, theirs) / relative_l2(ours, plain))
            x = plain
    assert np.median(ratios) < 0.3, np.median(ratios, axis=1)


@pytest.mark.parametrize("name", [Sampler.DDPM, Sampler.DPM_SOLVER])
def test_a_run_is_that_of_the_bundle_and_goes_on_from_any_state(
    name, ranges, segments, make_checkpoint, make_bundle
) -> None:
    """Without quantization; of a multistep sampler, with its history."""
    sampling = SamplerConfig(steps=STEPS, sampler=name)
    sampler = FakeQuantizedSampler(make_checkpoint(), ranges, segments, Precision.INT8_STATIC, sampling)
    images, states = FakeQuantizedImages(sampler, 5, 4, (SCALE, 1.0)), []
    made = images.run(None, on_step=states.append)
    assert len(states) == STEPS and np.array_equal(states[-1].x, made)
    for first in (1, 5, STEPS - 1):
        assert np.array_equal(images.run(None, first, states[first - 1]), made)
        forgetful = images.run(None, first, State(states[first - 1].x))
        kept = name is Sampler.DDPM or first == STEPS - 1  # the last step is of first order
        assert np.array_equal(forgetful, made) == kept
    engine = open_backend("onnxruntime", make_bundle(sampler=name))
    with ResidentSubnets(engine) as subnets:
        parts = []
        for scale, batch in images.batches:
            noise = SeededNoise(5, (4, 8, 8))
            runner, state = StepRunner(engine, subnets, batch.labels, scale), State(noise.initial(batch))
            parts.append(run_steps(runner.steps_of(batch, noise), state, range(STEPS)).x)
    assert relative_l2(made, np.concatenate(parts)).max() < 1e-4


@pytest.mark.parametrize(("dtype", "kind"), [(torch.int8, 3), (torch.float8_e4m3fn, 17)])
def test_rounding_to_8_bits_is_that_of_onnxruntime(dtype, kind) -> None:
    """QuantizeLinear and DequantizeLinear, value by value, some of them beyond the range."""
    helper = onnx.helper
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale"], ["y"]),
    ]
    scale = np.float32(0.0371)
    constants = [onnx.numpy_helper.from_array(scale, "scale"), helper.make_tensor("zero", kind, [], [0])]
    ends = [helper.make_tensor_value_info(name, 1, [None]) for name in "xy"]
    graph = helper.make_graph(nodes, "graph", ends[:1], ends[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    spread = np.random.default_rng(0).normal(0, 60 if dtype is torch.int8 else 250, 9999)
    edges = np.arange(-500, 500) / 2  # halves are rounded to even
    x = (np.concatenate([spread, edges]) * scale).astype(np.float32)
    ours = in_8_bits(torch.from_numpy(x), float(scale), dtype).numpy()
    np.testing.assert_array_equal(ours, session.run(None, {"x": x})[0])


def test_rounding_to_8_bits_is_that_of_onnx() -> None:
    values = torch.tensor([-300.0, -127.6, -0.5, 0.5, 1.5, 126.4, 400.0])
    assert in_8_bits(values, 1.0, torch.int8).tolist() == [-128, -128, 0, 0, 2, 126, 127]
    assert in_8_bits(values * 2, 2.0, torch.float8_e4m3fn).tolist() == [-576, -256, -1, 1, 3, 256, 768]
    assert in_8_bits(torch.tensor([900.0]), 1.0, torch.float8_e4m3fn).tolist() == [448], "it saturates"
