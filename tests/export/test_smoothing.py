"""A smoothed model is the model: bit for bit in fp32, in PyTorch and in graphs; and what its bundle holds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dydit.bundle.bundle import Bundle
from dydit.bundle.manifest import Routing
from dydit.bundle.stored_weights import Precision
from dydit.calibrate.activation_ranges import ActivationRanges
from dydit.diffusion.process import Process
from dydit.errors import CalibrationError
from dydit.export.weights import write_weights
from dydit.graph.library import FunctionLibrary
from dydit.graph.saving import save_graph
from dydit.graph.sources import Windows
from dydit.graph.writer import subnet_graph
from dydit.models.architecture import UnitLayer
from dydit.models.dit.graph import conditioning_graph
from dydit.models.dit.layout import stored_tensors
from dydit.models.registry import architecture_of
from dydit.models.sliced import Linear, SlicedBlock, plain_linear
from dydit.models.transformer.modulation import modulation_factors
from dydit.models.transformer.smoothed import smoothed_tensors
from dydit.models.uvit.config import UViTConfig
from dydit.parity.parity import compare_weights
from dydit.quantization.smoothing import Smoothing
from dydit.reports.parity_report import Status

HEADS, GROUPS = ((0, 2), (1, 2, 3), (3,)), ((1, 3), (0, 1), (0, 2, 3))
UNITS = tuple(zip(HEADS, GROUPS, strict=True))


def with_factors(weights: dict[str, torch.Tensor]) -> Linear:
    """Layers over smoothed weights, whose modulation is smoothed, too: what is left is after GELU."""

    def linear(block: SlicedBlock, layer: UnitLayer, x: torch.Tensor) -> torch.Tensor:
        factor = weights.get(f"blocks.{block.index}.{layer.name}.factor")
        return plain_linear(block, layer, x if factor is None else x * factor[block.slots[1]].flatten())

    return linear


U_VIT = UViTConfig(
    hidden_size=64,
    depth=3,
    num_heads=4,
    patch_size=2,
    input_size=8,
    in_channels=4,
    num_classes=7,
    null_class_row=True,
    process=Process(),
)


@pytest.mark.parametrize("model", [None, U_VIT], ids=["dit", "uvit"])
@settings(deadline=None, max_examples=30)  # the first makes a checkpoint
@given(seed=st.integers(0, 10_000), share=st.floats(0, 1))
def test_a_smoothed_model_is_the_same_bit_for_bit(make_checkpoint, make_smoothing, model, seed, share):
    """A DiT has the factors of qkv and fc1 in its modulation, a U-ViT in its LayerNorms."""
    checkpoint = make_checkpoint(model)
    config, rng = checkpoint.config, np.random.default_rng(seed)
    known = architecture_of(config)
    smoothing = make_smoothing(config, seed, share)
    axis = config.units
    order = axis.nested([tuple(rng.permutation(part.group.count).tolist()) for part in axis.parts])
    plain = dict(known.stored_tensors(checkpoint.state, config, order))
    moved = dict(known.stored_tensors(checkpoint.state, config, order, smoothing))
    state = [torch.from_numpy(rng.normal(size=(2, 4, 8, 8)).astype(np.float32)) for _ in range(3)]
    modulation = known.conditioning(config, plain, torch.tensor([400]), torch.tensor([1, 2, 7, 7]))[0]
    rest = (torch.tensor([0.1, 1.0, 0.2, 0.3, 0.4, -0.5, 0.15, 0.9]), torch.tensor(2.5))
    expected = known.sliced(config, plain, UNITS, 3).step(*state, *rest, modulation, debug=True)
    sliced = known.sliced(config, moved, UNITS, 3, linear=with_factors(moved))
    factors = known.condition_factors(config, smoothing)
    modulation = modulation if factors is None else modulation * torch.from_numpy(factors)
    found = sliced.step(*state, *rest, modulation, debug=True)
    assert torch.equal(found.residuals, expected.residuals) and torch.equal(found.x_prev, expected.x_prev)
    assert torch.equal(found.next_history, expected.next_history)
    assert torch.equal(found.tokens, expected.tokens)
    untouched = {layer for layer in axis.layer_names if not any(layer in block for block in smoothing.blocks)}
    for layer in axis.layer_names:
        changed = any(
            not torch.equal(plain[f"blocks.{b}.{layer}.weight"], moved[f"blocks.{b}.{layer}.weight"]) for b in range(3)
        )
        assert changed or layer in untouched


@pytest.mark.parametrize("gated", [frozenset(), frozenset({(0, 1), (2, 1), (1, 0)})])
@pytest.mark.parametrize("routing", list(Routing))
def test_graphs_of_a_smoothed_model_are_the_same_bit_for_bit(
    make_bench, make_smoothing, sessions, tmp_path, routing, gated
):
    bench, (open_session, run_session) = make_bench(), sessions
    config = bench.config
    smoothing = make_smoothing(config, 5)
    smoothing = smoothing.model_copy(update={"blocks": (*smoothing.blocks[:2], {})})  # and one as it is
    spec = bench.spec(HEADS, GROUPS, routing, gated, (16, 16, 16) if routing is Routing.CAPACITY else None)
    tensors = smoothed_tensors(stored_tensors, bench.model.state_dict(), config, smoothing, config.units.every_unit)
    entries = write_weights(tmp_path / "weights.bin", tensors, config)
    library = FunctionLibrary(config, bench.cfg_channels)
    save_graph(subnet_graph(config, spec, library, Windows(entries)), tmp_path / "graph.onnx")
    save_graph(conditioning_graph(config, Windows(entries), Precision.FP32, smoothing), tmp_path / "conditioning.onnx")
    save_graph(conditioning_graph(config, Windows(entries), Precision.FP32), tmp_path / "plain.onnx")
    asked = {"timesteps": np.array([500], np.float32), "labels": np.array([0, 1, 7, 7])}
    moved, plain = (
        run_session(open_session(tmp_path / f"{name}.onnx"), asked)["condition"][0]
        for name in ("conditioning", "plain")
    )
    assert np.array_equal(moved, plain * modulation_factors(config, smoothing)) and not np.array_equal(moved, plain)
    feeds = {**bench.feeds(), "condition": plain, "gates": np.ones(24, np.float32)}
    if gated:
        feeds["gates"].reshape(6, 4)[[1, 5], 3] = 0
    expected = bench.run(spec, feeds)
    found = run_session(open_session(tmp_path / "graph.onnx"), {**feeds, "condition": moved})
    assert np.array_equal(found["x_prev"], expected["x_prev"])


def ranges_with(smoothing: Smoothing | None, segments: int = 2, depth: int = 3) -> ActivationRanges:
    fours, none = (((value,) * 4,) * depth for value in (4.0, 0.0))
    return ActivationRanges(
        method="minmax",
        images=1,
        thresholds=(fours,) * segments,
        clipped=(none,) * segments,
        smoothing=smoothing,
    )


@pytest.mark.parametrize("precision", ["int8-static", "fp8"])
def test_a_bundle_holds_what_was_smoothed(make_checkpoint, make_bundle, make_smoothing, precision):
    checkpoint = make_checkpoint()
    smoothing = make_smoothing(checkpoint.config, 3)
    chosen = {"precision": precision, "max_subnets": 2}
    bundle = make_bundle(activations=ranges_with(smoothing), **chosen)
    plain = make_bundle(activations=ranges_with(None), **chosen)
    assert Bundle.open(bundle.path).manifest.smoothing == smoothing and plain.manifest.smoothing is None
    assert '"smoothing"' not in (plain.path / "manifest.json").read_text()
    assert bundle.manifest.checkpoint_sha256 == plain.manifest.checkpoint_sha256 == checkpoint.sha256
    surplus = bundle.manifest.weights.keys() - plain.manifest.weights.keys()
    smoothed = [b for b, block in enumerate(smoothing.blocks) if "fc2" in block]
    assert surplus == {f"blocks.{b}.fc2.factor" for b in smoothed} and smoothed
    for block in smoothed:
        factor = bundle.weight(f"blocks.{block}.fc2.factor")
        by_unit = np.empty_like(factor)
        by_unit[list(bundle.manifest.unit_order[block][1])] = factor
        assert np.array_equal(by_unit.reshape(-1), 1 / smoothing.divisor(block, "fc2"))
    for each in (bundle, plain):
        hop = compare_weights(each, checkpoint)
        assert hop.status is Status.PASSED, hop.detail
    other = bundle.manifest.model_copy(update={"smoothing": make_smoothing(checkpoint.config, 4)})
    assert compare_weights(Bundle(bundle.path, other), checkpoint).status is Status.FAILED


def test_a_smoothing_of_another_model_is_refused(make_bundle, make_smoothing, small_config):
    other = make_smoothing(small_config.model_copy(update={"hidden_size": 128}), 0, 1)
    with pytest.raises(CalibrationError, match=r"block 0, qkv, is for 128 channels, but the model has 64"):
        make_bundle(precision="fp8", max_subnets=2, activations=ranges_with(other))
    unknown = Smoothing(blocks=({}, {"fc3": "0" * 64}, {}))
    with pytest.raises(CalibrationError, match="the layer 'fc3', which the model's blocks do not have"):
        make_bundle(precision="fp8", max_subnets=2, activations=ranges_with(unknown))
    with pytest.raises(ValueError, match="the smoothing and the thresholds have different numbers of blocks"):
        ranges_with(other, depth=2)


def test_precisions_that_are_not_calibrated_leave_weights_alone(make_checkpoint, make_smoothing):
    """A calibration that has a smoothing may be used for its token capacities."""
    from dydit.export.input_scales import planned_smoothing
    from dydit.export.settings import ExportConfig

    config = ExportConfig(precision="fp8", activations=ranges_with(make_smoothing(make_checkpoint().config, 0)))
    assert planned_smoothing(make_checkpoint().config, config) is not None
    plain = config.model_copy(update={"precision": Precision.FP16})
    assert planned_smoothing(make_checkpoint().config, plain) is None
