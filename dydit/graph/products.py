"""The linear layers of a block as ONNX: `Gemm` in fp32, fp16 and bf16; with 8 bits, a product of scaled values.

int8-static and fp8 have QuantizeLinear and DequantizeLinear before MatMul, which compilers of engines read. There is
one scale for the input of a layer in a segment, and one for each output channel of its weight. Zero points are 0.
Layers that stay in fp16 are written as in fp16.

int8, for activations x [T, K] and weights W [K, N], sums over k in exact 32-bit integers:

    y[t, n] = s[t] * w[n] * sum_k (q[t, k] - z) * Q[k, n] + b[n]

    Q = round(W / w), int8, with w[n] = max_k |W[k, n]| / 127, from the export (`dydit.quantization.quantize`)
    q = round(x / s) + z, uint8, with a scale s[t] for each token from its own largest value, so that no other token and
        no other image of the batch changes a result

For values of both signs, z is 128 and s[t] = max_k |x[t, k]| / 127. GELU has no output below -0.17004, so after it z
is 32: 32 steps of uint8 are for negative values and 223 for the others, s[t] = max(max_k x[t, k] / 223, 0.17004 / 32).

The AVX-512 and AVX kernels of ONNX Runtime are fast for uint8 by int8 (VNNI); int8 by int8 is slower there than fp32.
The operators are ONNX Runtime's own (domain com.microsoft).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import onnx_ir as ir

from dydit.bundle.stored_weights import Precision
from dydit.graph.ops import CONTRIB, DATA_TYPES, Ops

_BOTH_SIGNS, _AFTER_GELU = 128, 32  # zero points
_GELU_MINIMUM = 0.17004
_TINY = 1e-30  # so that the scale of a row of zeros is not 0
_ALIGNED = 16


def padding(precision: Precision, channels: int) -> int:
    """The number of zeros to append to the input channels of a product.

    The tensor cores' 8-bit kernels read rows in pieces of 16 bytes, so with calibrated 8 bits the number of input
    channels must be a multiple of 16. Outputs are fp32, of which a multiple of 4 is enough.
    """
    return -channels % _ALIGNED if precision.is_calibrated else 0


def weight_parts(precision: Precision) -> tuple[str, ...]:
    """The stored tensors of a linear layer, in the order in which functions take them."""
    return ("weight", "scale", "bias") if precision.in_8_bits else ("weight", "bias")


def layer_precision(precision: Precision, layer: str, fp16_layers: Collection[str]) -> Precision:
    """The precision of a layer, where the layers `fp16_layers` stay in fp16."""
    return precision.attention if layer in fp16_layers else precision


def weight_names(layer: str, precision: Precision) -> tuple[str, ...]:
    """The names of the inputs that a function has for a layer: `layer_weight`, `layer_bias`, and scales with 8 bits."""
    parts = (*weight_parts(precision), *(["input_scale"] if precision.is_calibrated else []))
    return tuple(f"{layer}_{part}" for part in parts)


def linear(
    ops: Ops, x: ir.Value, weights: Sequence[ir.Value], out_major: bool, precision: Precision, bias: bool = True
) -> ir.Value:
    """x [T, K] times a layer's weight, [N, K] if it is stored `out_major`, else [K, N]. Returns [T, N].

    `weights`: the values that `weight_names` lists. x and the result have the precision's `dtype`.
    """
    if precision.is_calibrated:
        weight, scale, added, input_scale = weights
        d = _fake_quantized(ops, x, input_scale, precision)
        w = ops.DequantizeLinear(weight, scale, axis=0 if out_major else 1)
        return ops.Add(ops.MatMul(d, ops.Transpose(w, perm=[1, 0]) if out_major else w), added)
    if precision is not Precision.INT8:
        return ops.Gemm(x, *weights, **({"transB": 1} if out_major else {}))
    weight, scale, added = weights
    y = _integer_product(ops, x, weight, scale, out_major, *_symmetric(ops, x))
    return ops.Add(y, added) if bias else y


def mlp(
    ops: Ops,
    x: ir.Value,
    entering: Sequence[ir.Value],
    leaving: Sequence[ir.Value],
    channel_gates: ir.Value | None,
    gelu: str,
    precision: Precision,
    last: Precision | None = None,
) -> ir.Value:
    """leaving(gates * GELU(entering(x))); x [T, D], `channel_gates` [active channels] or None.

    `gelu`: "tanh" or "none", as the attribute `approximate` of the operator Gelu.

    `entering`, `leaving`: what the two layers take (`weight_names`). `precision`: that of the entering layer, x and the
    gates. `last`: that of the leaving layer and the result, by default the same.
    """
    if precision is not Precision.INT8:
        last = last or precision
        inner = _gated(ops, ops.Gelu(linear(ops, x, entering, True, precision), approximate=gelu), channel_gates)
        return linear(ops, ops.between(inner, precision, last), leaving, False, last)
    weight, scale, added = leaving
    # One operator adds the bias of the entering layer and computes GELU.
    operator = "FastGelu" if gelu == "tanh" else "BiasGelu"
    inner = ops.call(CONTRIB, operator, (linear(ops, x, entering, True, precision, bias=False), entering[-1]), 1)[0]
    inner = _gated(ops, inner, channel_gates)
    return ops.Add(_integer_product(ops, inner, weight, scale, False, *_after_gelu(ops, inner)), added)


def _fake_quantized(ops: Ops, x: ir.Value, scale: ir.Value, precision: Precision) -> ir.Value:
    """x, quantized to 8 bits and dequantized again. `scale`: []."""
    kind = DATA_TYPES[precision.weight_dtype]
    zero = ops.call("", "Constant", (), 1, {"value": ir.tensor(np.zeros((), kind.numpy()), dtype=kind)})[0]
    return ops.DequantizeLinear(ops.QuantizeLinear(x, scale, zero), scale)


def _gated(ops: Ops, inner: ir.Value, channel_gates: ir.Value | None) -> ir.Value:
    return inner if channel_gates is None else ops.Mul(inner, channel_gates)


def _symmetric(ops: Ops, x: ir.Value) -> tuple[ir.Value, int]:
    """Scales [T, 1] and zero point for values of both signs."""
    axis = ops.constant([1])
    largest = ops.Max(ops.ReduceMax(x, axis), ops.Neg(ops.ReduceMin(x, axis)), ops.constant(_TINY, np.float32))
    return ops.Mul(largest, ops.constant(1 / 127, np.float32)), _BOTH_SIGNS


def _after_gelu(ops: Ops, x: ir.Value) -> tuple[ir.Value, int]:
    """Scales [T, 1] and zero point for the output of GELU."""
    largest = ops.Mul(ops.ReduceMax(x, ops.constant([1])), ops.constant(1 / (255 - _AFTER_GELU), np.float32))
    return ops.Max(largest, ops.constant(_GELU_MINIMUM / _AFTER_GELU, np.float32)), _AFTER_GELU


def _integer_product(
    ops: Ops, x: ir.Value, weight: ir.Value, scale: ir.Value, out_major: bool, row_scales: ir.Value, zero_point: int
) -> ir.Value:
    """The formula of the module without b."""
    flat = ops.Reshape(row_scales, ops.constant([-1]))
    zeros = ops.ConstantOfShape(ops.Shape(flat), value=ir.tensor(np.full(1, zero_point, np.uint8)))
    q = ops.QuantizeLinear(x, flat, zeros, axis=0)
    one, zero = ops.constant(1, np.float32), ops.constant(zero_point, np.uint8)
    weight = ops.Transpose(weight, perm=[1, 0]) if out_major else weight
    (y,) = ops.call(CONTRIB, "MatMulIntegerToFloat", (q, weight, one, scale, zero), 1)
    return ops.Mul(y, row_scales)
