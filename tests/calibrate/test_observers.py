"""What is watched is what a subnetwork's layers see, and 8 bits with its ranges keep the picture."""

from __future__ import annotations

import numpy as np
import pytest

from dydit.bundle.manifest import PlanKind
from dydit.bundle.stored_weights import Precision
from dydit.calibrate.activation_ranges import Observations
from dydit.calibrate.observers import ObservedRun, observe
from dydit.calibrate.range_methods import Method
from dydit.diffusion.samplers import Sampler, SamplerConfig
from dydit.errors import CalibrationError, ConfigError
from dydit.inspection.trace import trace_tokens
from dydit.models.config import parse_config
from dydit.parity.comparison import relative_l2
from dydit.runtime.pipeline import DyDiTPipeline
from tests.fixtures.cpu import require_exact_int8

LAYERS = ("qkv", "proj", "fc1", "fc2")

pytestmark = pytest.mark.numerics

STEPS, LABELS, SCALE = 12, (0, 1, 2, 3), 1.5
SAMPLING = SamplerConfig(steps=STEPS)


@pytest.fixture(scope="module")
def bundle(make_bundle):
    return make_bundle(plan=PlanKind.MAX_SUBNETS, max_subnets=4)


@pytest.fixture(scope="module")
def segments(bundle):
    return [(each.first, each.first + each.count) for each in bundle.manifest.plan.segments]


@pytest.fixture(scope="module")
def seen(make_checkpoint, segments) -> Observations:
    return observe(make_checkpoint(), ObservedRun(segments, LABELS, [SCALE], SAMPLING))


@pytest.mark.parametrize("sampler", [Sampler.DDPM, Sampler.DPM_SOLVER])
def test_every_value_that_enters_a_layer_is_counted(sampler, make_checkpoint, make_bundle):
    """All tokens enter attention, and of the MLP those that sampling routes; heads and groups that are on."""
    bundle = make_bundle(plan=PlanKind.MAX_SUBNETS, max_subnets=4, sampler=sampler)
    segments = [(each.first, each.first + each.count) for each in bundle.manifest.plan.segments]
    sampling = SamplerConfig(steps=STEPS, sampler=sampler)
    seen = observe(make_checkpoint(), ObservedRun(segments, LABELS, [SCALE], sampling))
    model, masks = bundle.manifest.model, bundle.manifest.checkpoint_masks()
    tokens = trace_tokens(bundle, LABELS, SCALE).tokens  # [S, L, rows, N]
    for index, (first, end) in enumerate(segments):
        for block in range(model.depth):
            counts = [histogram.total for histogram in seen.histograms[index][block]]
            heads, groups = (model.units.of_group(masks, name)[first:end, block].sum(1) for name in ("heads", "groups"))
            routed = tokens[first:end, block].sum(axis=(1, 2))
            every = 2 * len(LABELS) * model.tokens
            assert counts[0] == (every * model.hidden_size * (heads > 0)).sum()
            assert counts[1] == (every * model.head_dim * heads).sum()
            assert counts[2] == (routed * model.hidden_size * (groups > 0)).sum()
            assert counts[3] == (routed * model.group_dim * groups).sum()


def test_the_same_arguments_give_the_same_counts_whatever_the_batch(seen, make_checkpoint, segments):
    again = observe(make_checkpoint(), ObservedRun(segments, LABELS, [SCALE], SAMPLING))
    assert all((a.counts == b.counts).all() for a, b in zip(seen.flat(), again.flat(), strict=True))
    halves = observe(make_checkpoint(), ObservedRun(segments, LABELS, [SCALE], SAMPLING, batch=2))
    assert [a.total for a in seen.flat()] == [b.total for b in halves.flat()]


def test_segments_together_are_the_whole_run(seen, make_checkpoint):
    whole = observe(make_checkpoint(), ObservedRun([(0, STEPS)], LABELS, [SCALE], SAMPLING))
    assert all((a.counts == b.counts).all() for a, b in zip(seen.together().flat(), whole.flat(), strict=True))


@pytest.mark.parametrize("precision", [Precision.INT8_STATIC, Precision.FP8])
def test_8_bits_keep_the_picture(precision, seen, bundle, make_bundle):
    if precision is Precision.INT8_STATIC:
        require_exact_int8()
    ranges = seen.choose(Method.MINMAX, len(LABELS))
    low = make_bundle(plan=PlanKind.MAX_SUBNETS, max_subnets=4, precision=precision, activations=ranges)
    images = []
    for each in (bundle, low):
        with DyDiTPipeline.from_bundle(each.path, threads=1) as pipe:
            images.append(pipe(list(LABELS), SCALE, seed=0, output_type="latent").latents)
    distances = relative_l2(images[1], images[0])
    assert (distances > 1e-4).all() and (distances < 0.1).all()


def test_units_with_holes_between_them_get_a_copy(seen, make_bundle):
    """Compilers take an 8-bit constant as it is, so no graph may put several windows together."""
    import onnx

    ranges = seen.choose(Method.MINMAX, len(LABELS))
    low = make_bundle(plan=PlanKind.MAX_SUBNETS, max_subnets=4, precision=Precision.INT8_STATIC, activations=ranges)
    ends = [entry.offset + entry.nbytes for entry in low.manifest.weights.values()]
    copied = 0
    for entry in low.manifest.subnets:
        graph = onnx.load(low.file(entry.file), load_external_data=False).graph
        eighths = {each.name for each in graph.initializer if each.data_type == onnx.TensorProto.INT8}
        assert eighths and not any(set(node.input) & eighths for node in graph.node if node.op_type == "Concat")
        for tensor in (each for each in graph.initializer if "[" in each.name and each.name in eighths):
            place = {each.key: each.value for each in tensor.external_data}
            copied += int(place["offset"]) >= max(ends)
    assert copied, "some subnetwork has units with holes between them"


def test_refusals(seen, make_bundle, make_checkpoint):
    from dydit.export.settings import ExportConfig

    ranges = seen.choose(Method.MINMAX, len(LABELS))
    with pytest.raises(CalibrationError, match="has 4 segments, 3 blocks and 4 layers per block, but this plan has 2"):
        make_bundle(max_subnets=2, precision=Precision.INT8_STATIC, activations=ranges)
    with pytest.raises(ConfigError, match="int8-static needs a calibration, of `dydit calibrate --activations minmax`"):
        parse_config(ExportConfig, {"precision": "int8-static"})
    with pytest.raises(ConfigError, match="fp16 takes no calibrated activations; only int8-static and fp8 do"):
        parse_config(ExportConfig, {"precision": "fp16", "activations": ranges})
    with pytest.raises(ConfigError, match="at least one label"):
        observe(make_checkpoint(), ObservedRun([(0, STEPS)], [], [SCALE], SAMPLING))


def test_names_of_what_is_not_finite(seen):
    empty = Observations(1, 2, LAYERS)
    with pytest.raises(CalibrationError, match="segment 0, block 1, fc2: a value to calibrate on is NaN or infinite"):
        empty.add(0, 1, LAYERS[3], np.array([np.nan]))
    with pytest.raises(CalibrationError, match="no activations were observed"):
        empty.choose(Method.MSE, 1)
