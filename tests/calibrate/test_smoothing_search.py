"""A smoothing for a model: chosen alike every time, and where few channels are much larger it keeps steps in 8 bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dydit.bundle.bundle import Bundle
from dydit.bundle.manifest import PlanKind
from dydit.calibrate.observers import ObservedRun, observe
from dydit.calibrate.range_methods import Method
from dydit.calibrate.smoothing_search import FoundSmoothing, find_smoothing
from dydit.calibrate.smoothing_strength import LEAST_GAIN
from dydit.checkpoints.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from dydit.diffusion.samplers import SamplerConfig
from dydit.diffusion.steps import State
from dydit.errors import CalibrationError, ConfigError
from dydit.export.exporter import export, planned_steps
from dydit.export.settings import ExportConfig
from dydit.models.synthetic import synthetic_model
from dydit.parity.comparison import relative_l2
from dydit.runtime.backends.registry import open_backend
from dydit.runtime.loop import StepRunner
from dydit.runtime.resident import ResidentSubnets
from tests.fixtures.cpu import require_exact_int8

LAYERS = ("qkv", "proj", "fc1", "fc2")

pytestmark = pytest.mark.numerics

LABELS, SCALE, STEPS = (0, 1, 2, 3), 1.5, 12
SAMPLING = SamplerConfig(steps=STEPS)
PLAN = {"steps": STEPS, "plan": PlanKind.MAX_SUBNETS, "max_subnets": 2}
LARGE, TIMES = (3, 17, 40), 30.0


@pytest.fixture(scope="module")
def outliers(small_config, tmp_path_factory) -> Checkpoint:
    """A model of whose layers' input channels a few are 30 times larger than they were, and their weights smaller."""
    model, large = synthetic_model(small_config), list(LARGE)
    d = small_config.hidden_size
    with torch.no_grad():
        for block in model.blocks:
            adaln = block.adaLN_modulation[1]
            for first, layer in ((0, block.attn.qkv), (3 * d, block.mlp.fc1)):
                shift, scale = ([first + part + channel for channel in large] for part in (0, d))
                for rows, one in ((shift, 0), (scale, 1)):
                    adaln.weight[rows] *= TIMES
                    adaln.bias[rows] = TIMES * (adaln.bias[rows] + one) - one
                layer.weight[:, large] /= TIMES
            block.attn.qkv.weight[[2 * d + channel for channel in large]] *= TIMES
            block.attn.qkv.bias[[2 * d + channel for channel in large]] *= TIMES
            block.attn.proj.weight[:, large] /= TIMES
            block.mlp.fc1.weight[large] *= TIMES
            block.mlp.fc1.bias[large] *= TIMES
            block.mlp.fc2.weight[:, large] /= TIMES
    path = tmp_path_factory.mktemp("outliers") / "model.safetensors"
    save_checkpoint(path, model, small_config)
    return load_checkpoint(path)


def run_of(checkpoint: Checkpoint) -> ObservedRun:
    return ObservedRun(segments_of(checkpoint), LABELS, [SCALE], SAMPLING)


def segments_of(checkpoint: Checkpoint) -> tuple[tuple[int, int], ...]:
    return tuple(planned_steps(checkpoint, ExportConfig(**PLAN))[1].segments)


@pytest.fixture(scope="module")
def found(outliers) -> FoundSmoothing:
    return find_smoothing(outliers, run_of(outliers))


def test_the_large_channels_are_found_in_every_layer(found, outliers):
    assert found.smoothing.layers == 4 * outliers.config.depth
    for block in range(outliers.config.depth):
        for layer in LAYERS:
            exponents = found.smoothing.exponents(block, layer)
            others = np.delete(exponents, LARGE)
            assert exponents[list(LARGE)].mean() > others.mean() + 1.5, (block, layer)
    assert found.text().startswith(
        "smoothing lowers the error in 12 of 12 layers; on the observed activations, the squared error of their int8"
    )
    assert all(
        choice.error <= (1 - LEAST_GAIN) * choice.unsmoothed for block in found.choices for choice in block.values()
    )


def test_the_same_arguments_give_the_same_smoothing(found, outliers):
    again = find_smoothing(outliers, run_of(outliers))
    assert again.smoothing == found.smoothing


def test_ranges_are_those_of_what_is_divided(found, outliers):
    plain, divided = (observe(outliers, run_of(outliers), smoothing) for smoothing in (None, found.smoothing))
    assert [each.total for each in plain.flat()] == [each.total for each in divided.flat()]
    thresholds = [np.array(each.choose(Method.MINMAX, 4).thresholds) for each in (plain, divided)]
    assert (thresholds[1] < thresholds[0] / 2).all()


def step_errors(exact: Bundle, low: Bundle) -> np.ndarray:
    """Relative L2 of x_prev from exact ones, of every image and every third step, from the same noise, [K, B]."""
    model, rng, errors = exact.manifest.model, np.random.default_rng(0), []
    shape = (len(LABELS), model.in_channels, model.input_size, model.input_size)
    engines = [open_backend("onnxruntime", each) for each in (exact, low)]
    with ResidentSubnets(engines[0]) as first, ResidentSubnets(engines[1]) as second:
        pairs = zip(engines, (first, second), strict=True)
        runners = [StepRunner(engine, subnets, LABELS, SCALE) for engine, subnets in pairs]
        for step in range(0, STEPS, 3):
            x, noise = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
            expected, got = (runner.run(step, State(x), noise, LABELS).x_prev for runner in runners)
            errors.append(relative_l2(got, expected))
    return np.array(errors)


@pytest.mark.parametrize(("precision", "factor"), [("int8-static", 5.0), ("fp8", 0.9)])
def test_a_step_in_8_bits_keeps_more(found, outliers, tmp_path, precision, factor):
    """E4M3 rounds relatively to a value, so there a smoothing changes little."""
    if precision == "int8-static":
        require_exact_int8()
    errors = []
    exact = export(outliers, tmp_path / "exact", ExportConfig(**PLAN))
    for smoothing in (None, found.smoothing):
        ranges = observe(outliers, run_of(outliers), smoothing).choose(Method.MINMAX, len(LABELS))
        chosen = ranges.model_copy(update={"smoothing": smoothing})
        config = ExportConfig(**PLAN, precision=precision, activations=chosen)
        errors.append(np.median(step_errors(exact, export(outliers, tmp_path / f"low-{len(errors)}", config))))
    assert errors[1] > 1e-6 and errors[0] > factor * errors[1], errors


def test_refusals(outliers, tmp_path):
    with pytest.raises(ConfigError, match="at least one label"):
        find_smoothing(outliers, ObservedRun([(0, STEPS)], [], [SCALE], SAMPLING))
    model = outliers.model()
    model.blocks[1].mlp.fc1.weight.data[:] = 3e38
    save_checkpoint(tmp_path / "broken.safetensors", model, outliers.config)
    broken = load_checkpoint(tmp_path / "broken.safetensors")
    with pytest.raises(CalibrationError, match=r"segment 0, block 1, fc2: a value to calibrate on is NaN or infinite"):
        find_smoothing(broken, ObservedRun([(0, STEPS)], LABELS, [SCALE], SAMPLING))
