"""The 8-bit product as ONNX Runtime computes it, held against the formula in float64."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from dydit.bundle.stored_weights import Precision
from dydit.graph import products
from dydit.graph.ops import CONTRIB, DOMAIN, IR_VERSION, OPSET, Ops, function
from dydit.quantization.quantize import quantize
from tests.fixtures.cpu import needs_exact_int8

pytestmark = [pytest.mark.numerics, needs_exact_int8]
IN, OUT = 24, 40
RNG = np.random.default_rng(0)


def layer(out_major: bool) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """What is stored of a layer, and in float64 the weights [IN, OUT] that it stands for, and the bias."""
    weight = RNG.normal(0, 0.1, (1, OUT, IN) if out_major else (1, IN, OUT)).astype(np.float32)
    bias = RNG.normal(size=OUT).astype(np.float32)
    stored, scale = quantize(torch.from_numpy(weight), out_major)
    integers, scales = stored[0].numpy(), scale.numpy().reshape(-1)
    meant = (integers.T if out_major else integers).astype(np.float64) * scales
    return [integers, scales, bias], meant, bias.astype(np.float64)


def run(body, x: np.ndarray, weights: list[np.ndarray]) -> np.ndarray:
    """A function of x and weights, as a graph whose weights are constants."""
    names = ["x", *(f"w{index}" for index in range(len(weights)))]
    target = function("tried", names, body)
    ops = Ops()
    given = ir.Value(name="x", shape=ir.Shape(["T", x.shape[1]]), type=ir.TensorType(ir.DataType.FLOAT))
    constants = [ops.call("", "Constant", (), 1, {"value": ir.tensor(array)})[0] for array in weights]
    (y,) = ops.call(DOMAIN, "tried", [given, *constants], ["y"])
    y.type = ir.TensorType(ir.DataType.FLOAT)
    opsets = {"": OPSET, DOMAIN: 1, CONTRIB: 1}
    graph = ir.Graph([given], [y], nodes=ops.nodes, opset_imports=opsets, name="graph")
    proto = ir.to_proto(ir.Model(graph, ir_version=IR_VERSION, functions=[target]))
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    session = onnxruntime.InferenceSession(proto.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def linear(x: np.ndarray, weights: list[np.ndarray], out_major: bool) -> np.ndarray:
    return run(lambda ops, x, *w: (products.linear(ops, x, w, out_major, Precision.INT8),), x, weights)


def mlp(x: np.ndarray, fc1: list[np.ndarray], fc2: list[np.ndarray], gelu: str) -> np.ndarray:
    return run(lambda ops, x, *w: (products.mlp(ops, x, w[:3], w[3:], None, gelu, Precision.INT8),), x, [*fc1, *fc2])


def rounded(x: np.ndarray) -> np.ndarray:
    """x as uint8 with zero point 128 stands for it, in float64."""
    scale = np.maximum(np.abs(x).max(1, keepdims=True), np.float32(1e-30)) * np.float32(1 / 127)
    return np.rint(x / scale).astype(np.float64) * scale


@pytest.mark.parametrize("out_major", [True, False])
def test_a_layer_is_its_formula(out_major):
    weights, meant, bias = layer(out_major)
    x = (RNG.normal(size=(9, IN)) * 10.0 ** RNG.integers(-3, 4, (9, 1))).astype(np.float32)
    x[4] = 0
    expected = rounded(x) @ meant + bias
    assert np.allclose(linear(x, weights, out_major), expected, rtol=1e-5, atol=1e-5)
    assert np.allclose(expected[4], bias)
    near = x.astype(np.float64) @ meant + bias
    assert 1e-4 < np.linalg.norm(expected - near) / np.linalg.norm(near) < 2e-2


def test_the_largest_values_do_not_saturate():
    weights = [np.full((OUT, IN), 127, np.int8), np.ones(OUT, np.float32), np.zeros(OUT, np.float32)]
    x = np.full((3, IN), 2.0, np.float32)
    assert np.allclose(linear(x, weights, True), 127 * IN * 2.0, rtol=1e-6)


@pytest.mark.parametrize("out_major", [True, False])
def test_a_token_does_not_depend_on_the_others(out_major):
    weights, _, _ = layer(out_major)
    x = (RNG.normal(size=(64, IN)) * 10.0 ** RNG.integers(-3, 4, (64, 1))).astype(np.float32)
    whole = linear(x, weights, out_major)
    for rows in (slice(0, 1), slice(5, 12), slice(63, 64)):
        assert (linear(x[rows], weights, out_major) == whole[rows]).all()


@pytest.mark.parametrize("gelu", ["tanh", "none"])
def test_the_mlp_keeps_what_gelu_gives(gelu):
    """After GELU the zero point is 32: nothing is cut off, and the error is that of a step of the row's scale."""
    (fc1, meant1, bias1), square = layer(True), np.float64
    fc2 = [
        RNG.integers(-127, 128, (OUT, OUT)).astype(np.int8),
        np.full(OUT, 1e-3, np.float32),
        np.ones(OUT, np.float32),
    ]
    x = (RNG.normal(size=(32, IN)) * 10.0 ** RNG.integers(-2, 2, (32, 1))).astype(np.float32)
    inner = torch.nn.functional.gelu(torch.from_numpy(rounded(x) @ meant1 + bias1), approximate=gelu).numpy()
    assert inner.min() < -0.16, "negative values are tried"
    scale = np.maximum(inner.max(1, keepdims=True) / 223, 0.17004 / 32)
    q = np.rint(inner / scale)
    assert q.min() >= -32 and q.max() <= 223
    expected = (q * scale) @ (fc2[0].astype(square) * fc2[1]) + 1
    got = mlp(x, fc1, fc2, gelu)
    # A value on the edge between two steps may fall to either side, as GELU is computed in fp32 there.
    edge = scale * 127e-3
    assert (np.abs(got - expected) <= 1e-4 * np.abs(expected).max(1, keepdims=True) + 2 * edge).all()
    assert np.median(np.abs(got - expected)) < 1e-5


def test_no_token_at_all():
    weights, _, _ = layer(True)
    assert linear(np.empty((0, IN), np.float32), weights, True).shape == (0, OUT)
