"""The linear layers of a block: `Gemm` in fp32, fp16 and bf16; in 8 bits a product between two scalings.

Calibrated, int8-static and fp8: QuantizeLinear and DequantizeLinear around MatMul, with one scale for what enters a
layer in a segment and one for each output channel of its weight, as compilers of engines read them. Zero points are 0.
A layer that stays in 16 bits is one of fp16 among them.

int8, for activations x [T, K] and weights W [K, N], sums over k in exact 32-bit integers:

    y[t, n] = s[t] * w[n] * sum_k (q[t, k] - z) * Q[k, n] + b[n]

    Q = round(W / w), int8, with w[n] = max_k |W[k, n]| / 127, from the export (`dydit.quantization.quantize`)
    q = round(x / s) + z, uint8, with a scale s[t] for each token from its own largest value, so that neither another
        token nor another image of the batch changes a result

z is 128 for values of both signs, s[t] = max_k |x[t, k]| / 127. GELU gives nothing below -0.17004, so after it z is 32:
32 steps of uint8 serve what is negative and 223 the rest, s[t] = max(max_k x[t, k] / 223, 0.17004 / 32).

uint8 by int8 is what the AVX-512 and AVX kernels of ONNX Runtime are fast for (VNNI); int8 by int8 is slower there than
fp32. The operators are ONNX Runtime's own (domain com.microsoft).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import onnx_ir as ir

from dydit.bundle.stored_weights import Precision
from dydit.graph.ops import CONTRIB, DATA_TYPES, Ops

_BOTH_SIGNS, _AFTER_GELU = 128, 32  # zero points
_GELU_MINIMUM = 0.17004
_TINY = 1e-30  # a row of zeros has a scale, too


def weight_parts(precision: Precision) -> tuple[str, ...]:
    """What is stored of a linear layer, in the order in which functions take it."""
    return ("weight", "scale", "bias") if precision.in_8_bits else ("weight", "bias")


def layer_precision(precision: Precision, layer: str, fp16_layers: Collection[str]) -> Precision:
    """The precision of a layer, where the layers `fp16_layers` stay in fp16."""
    return precision.attention if layer in fp16_layers else precision


def weight_names(layer: str, precision: Precision) -> tuple[str, ...]:
    """The names of what a layer takes as inputs of a function: `layer_weight`, `layer_bias`; its scales, in 8 bits."""
    parts = (*weight_parts(precision), *(["input_scale"] if precision.is_calibrated else []))
    return tuple(f"{layer}_{part}" for part in parts)


def linear(
    ops: Ops, x: ir.Value, weights: Sequence[ir.Value], out_major: bool, precision: Precision, bias: bool = True
) -> ir.Value:
    """x [T, K] times a layer's weights, [N, K] where they are stored `out_major` and else [K, N], to [T, N].

    `weights` as `weight_names` lists them. x and the result are in the precision's `dtype`.
    """
    if precision.is_calibrated:
        weight, scale, added, input_scale = weights
        d = _as_in_8_bits(ops, x, input_scale, precision)
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
    precision: Precision,
    last: Precision | None = None,
) -> ir.Value:
    """leaving(gates * GELU(entering(x))), tanh form; x [T, D], `channel_gates` [channels that are on] or None.

    `precision`: of the first layer, of x and of the gates; `last`: of the other one and the result, where it differs.
    """
    if precision is not Precision.INT8:
        last = last or precision
        inner = _gated(ops, ops.Gelu(linear(ops, x, entering, True, precision), approximate="tanh"), channel_gates)
        return linear(ops, ops.between(inner, precision, last), leaving, False, last)
    weight, scale, added = leaving
    # GELU with its bias in one pass.
    inner = ops.call(CONTRIB, "FastGelu", (linear(ops, x, entering, True, precision, bias=False), entering[-1]), 1)[0]
    inner = _gated(ops, inner, channel_gates)
    return ops.Add(_integer_product(ops, inner, weight, scale, False, *_after_gelu(ops, inner)), added)


def _as_in_8_bits(ops: Ops, x: ir.Value, scale: ir.Value, precision: Precision) -> ir.Value:
    """What x is when it has been stored with a scale []."""
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
    """Scales [T, 1] and zero point for what GELU gives."""
    largest = ops.Mul(ops.ReduceMax(x, ops.constant([1])), ops.constant(1 / (255 - _AFTER_GELU), np.float32))
    return ops.Max(largest, ops.constant(_GELU_MINIMUM / _AFTER_GELU, np.float32)), _AFTER_GELU


def _integer_product(
    ops: Ops, x: ir.Value, weight: ir.Value, scale: ir.Value, out_major: bool, row_scales: ir.Value, zero_point: int
) -> ir.Value:
    """The formula above without b."""
    flat = ops.Reshape(row_scales, ops.constant([-1]))
    zeros = ops.ConstantOfShape(ops.Shape(flat), value=ir.tensor(np.full(1, zero_point, np.uint8)))
    q = ops.QuantizeLinear(x, flat, zeros, axis=0)
    one, zero = ops.constant(1, np.float32), ops.constant(zero_point, np.uint8)
    weight = ops.Transpose(weight, perm=[1, 0]) if out_major else weight
    (y,) = ops.call(CONTRIB, "MatMulIntegerToFloat", (q, weight, one, scale, zero), 1)
    return ops.Mul(y, row_scales)
