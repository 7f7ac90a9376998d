"""The parts of a subnetwork as ONNX local functions, one per kind of block; the main graph only calls them.

Shapes: x [rows, N, D]; modulation vectors [rows, 1, D]; T = rows*N tokens, flattened over the batch before routing. A
function's weights are inputs, so it does not know whether they are constants or graph inputs, nor how wide they are.
The arithmetic is that of `dydit.models.dit`, in the order that rounds alike. Below fp32, only matrix products and
attention work in the lower type: values are cast at their edges, and the residual stream, modulation, routers and the
sampler's formula stay in fp32 (DESIGN, decision 9).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import onnx_ir as ir

from dydit.bundle.manifest import Routing
from dydit.bundle.stored import Precision
from dydit.export.ops import Ops, function
from dydit.models.config import ModelConfig

NORM_EPS = 1e-6
Values = Sequence[ir.Value]
_VECTORS = ("shift", "scale", "gate")
_ROUTER = ("router0_w", "router0_b", "router2_w", "router2_b")
_MLP = ("fc1_w", "fc1_b", "fc2_w", "fc2_b")


def _modulate(ops: Ops, x: ir.Value, ones: ir.Value, shift: ir.Value, scale: ir.Value) -> ir.Value:
    normed = ops.LayerNormalization(x, ones, axis=-1, epsilon=NORM_EPS)
    return ops.Add(ops.Mul(normed, scale), shift)


def _flat(ops: Ops, x: ir.Value) -> ir.Value:
    """[rows, N, ...] to [T, ...product]."""
    return ops.Flatten(x, axis=2)


def attention_function(config: ModelConfig, gated: bool, precision: Precision) -> ir.Function:
    """x + gate * proj(gates * attention(modulated x)), for any number of heads.

    Weights: qkv [h*3*hd, D] head-major, proj [h*hd, D]; `gates` [h]; `qkv_shape` = (rows, N, h or -1, 3*hd). Attention
    is the operator of that name below fp32, so that compilers fuse it, and three operators in fp32, which none fuses.
    """
    inputs = ["x", "ones", *_VECTORS, "qkv_w", "qkv_b", "proj_w", "proj_b", "qkv_shape", *(["gates"] if gated else [])]

    def body(
        ops: Ops, x: ir.Value, ones: ir.Value, shift: ir.Value, scale: ir.Value, gate: ir.Value, *rest: ir.Value
    ) -> Values:
        qkv_w, qkv_b, proj_w, proj_b, qkv_shape, *gates = rest
        hidden = ops.to_precision(_flat(ops, _modulate(ops, x, ones, shift, scale)), precision)
        qkv = ops.Reshape(ops.Gemm(hidden, qkv_w, qkv_b, transB=1), qkv_shape)  # [rows, N, h, 3*hd]
        q, k, v = (ops.Transpose(part, perm=[0, 2, 1, 3]) for part in ops.split(qkv, 3, 3))  # [rows, h, N, hd]
        if precision is Precision.FP32:
            scaled = ops.Mul(q, ops.constant(config.head_dim**-0.5, np.float32))
            scores = ops.MatMul(scaled, ops.Transpose(k, perm=[0, 1, 3, 2]))
            mixed = ops.MatMul(ops.Softmax(scores, axis=-1), v)
        else:
            mixed = ops.Attention(q, k, v, scale=config.head_dim**-0.5)
        mixed = ops.Transpose(mixed, perm=[0, 2, 1, 3])  # [rows, N, h, hd]
        if gates:
            mixed = ops.Mul(mixed, ops.Unsqueeze(ops.to_precision(gates[0], precision), ops.constant([1])))
        out = ops.to_fp32(ops.Gemm(_flat(ops, mixed), proj_w, proj_b), precision)
        return (ops.Add(x, ops.Mul(gate, ops.Reshape(out, ops.Shape(x)))),)

    return function("attention_gated" if gated else "attention", inputs, body)


def attention_none_function(precision: Precision) -> ir.Function:
    """Attention with no head on: only the projection's bias is left."""

    def body(ops: Ops, x: ir.Value, gate: ir.Value, proj_b: ir.Value) -> Values:
        return (ops.Add(x, ops.Mul(gate, ops.to_fp32(proj_b, precision))),)

    return function("attention_none", ["x", "gate", "proj_b"], body)


def mlp_function(config: ModelConfig, routing: Routing | None, gated: bool, precision: Precision) -> ir.Function:
    """x + token_mask * gate * fc2(gates * GELU(fc1(modulated x))), with tokens routed as asked (None: no routing).

    Weights: fc1 [g*gs, D], fc2 [g*gs, D] group-major; `gates` [g]; `capacity`: token slots per image. Outputs: x, then
    with routing the token mask bool [T], then with capacity the overflow int64 [1].
    """
    inputs = ["x", "ones", *_VECTORS, *_MLP]
    inputs += _ROUTER if routing else ()
    inputs += ["capacity"] if routing is Routing.CAPACITY else []
    inputs += ["gates"] if gated else []

    def body(
        ops: Ops, x: ir.Value, ones: ir.Value, shift: ir.Value, scale: ir.Value, gate: ir.Value, *rest: ir.Value
    ) -> Values:
        values = dict(zip(inputs[5:], rest, strict=True))
        hidden = ops.to_precision(_flat(ops, _modulate(ops, x, ones, shift, scale)), precision)  # [T, D]

        def mlp(tokens: ir.Value) -> ir.Value:
            inner = ops.Gelu(ops.Gemm(tokens, values["fc1_w"], values["fc1_b"], transB=1), approximate="tanh")
            if gated:
                gates = ops.to_precision(values["gates"], precision)
                inner = ops.Mul(inner, _per_channel(ops, gates, config.group_dim))
            return ops.Gemm(inner, values["fc2_w"], values["fc2_b"])

        if routing is None:
            branch, extra = mlp(hidden), list[ir.Value]()
        else:
            mask = _token_mask(ops, _flat(ops, x), *(values[name] for name in _ROUTER))
            branch, extra = _ROUTED[routing](ops, config.tokens, precision, hidden, mask, values.get("capacity"), mlp)
            extra = [mask, *extra]
        branch = ops.to_fp32(ops.Reshape(branch, ops.Shape(x)), precision)
        return (ops.Add(x, ops.Mul(gate, branch)), *extra)

    return function(
        "_".join(["mlp", *([routing.value] if routing else []), *(["gated"] if gated else [])]), inputs, body
    )


def mlp_none_function(routed: bool, precision: Precision) -> ir.Function:
    """The MLP with no group on: fc2's bias on the routed tokens."""
    inputs = ["x", "gate", "fc2_b", *(_ROUTER if routed else ())]

    def body(ops: Ops, x: ir.Value, gate: ir.Value, fc2_b: ir.Value, *router: ir.Value) -> Values:
        branch = ops.Mul(gate, ops.to_fp32(fc2_b, precision))
        if not routed:
            return (ops.Add(x, branch),)
        tokens = _flat(ops, x)
        mask = _token_mask(ops, tokens, *router)
        shape = ops.Concat(ops.Shape(x, start=0, end=2), ops.constant([1]), axis=0)
        on = ops.Reshape(ops.Cast(mask, to=ir.DataType.FLOAT), shape)
        return (ops.Add(x, ops.Mul(branch, on)), mask)

    return function("mlp_none_routed" if routed else "mlp_none", inputs, body)


def _per_channel(ops: Ops, gates: ir.Value, group_dim: int) -> ir.Value:
    """Gates of groups [g] to gates of channels [g*gs]."""
    wide = ops.Expand(ops.Unsqueeze(gates, ops.constant([1])), ops.constant([1, group_dim]))
    return ops.Reshape(wide, ops.constant([-1]))


def _token_mask(ops: Ops, tokens: ir.Value, w0: ir.Value, b0: ir.Value, w2: ir.Value, b2: ir.Value) -> ir.Value:
    """Which of the T tokens enter the MLP, bool [T]: router logit above 0, decided in fp32."""
    logits = ops.Gemm(ops.Relu(ops.Gemm(tokens, w0, b0, transB=1)), w2, b2, transB=1)
    return ops.Reshape(ops.Greater(logits, ops.constant(0, np.float32)), ops.constant([-1]))


MlpBody = Callable[[ir.Value], ir.Value]
Branch = tuple[ir.Value, list[ir.Value]]  # [T, D], and the overflow where there can be one


def _where(ops: Ops, precision: Precision, mask: ir.Value, rows: ir.Value) -> ir.Value:
    """Rows [T, D] where the mask [T] is on, else 0. A choice, not a product: 0 * inf would be NaN."""
    zero = ops.to_precision(ops.constant(0, np.float32), precision)
    return ops.Where(ops.Unsqueeze(mask, ops.constant([1])), rows, zero)


def _dense(
    ops: Ops, tokens: int, precision: Precision, hidden: ir.Value, mask: ir.Value, _: ir.Value | None, mlp: MlpBody
) -> Branch:
    """Compute all, multiply by the mask."""
    return _where(ops, precision, mask, mlp(hidden)), []


def _dynamic(
    ops: Ops, tokens: int, precision: Precision, hidden: ir.Value, mask: ir.Value, _: ir.Value | None, mlp: MlpBody
) -> Branch:
    """NonZero gives the ids of routed tokens; gather them, and scatter their results into zeros."""
    ids = ops.Reshape(ops.NonZero(mask), ops.constant([-1]))
    out = mlp(ops.Gather(hidden, ids, axis=0))
    zeros = ops.ConstantOfShape(ops.Shape(hidden), value=ir.tensor(np.zeros(1, np.float32)))
    return ops.ScatterND(ops.to_precision(zeros, precision), ops.Unsqueeze(ids, ops.constant([1])), out), []


def _capacity(
    ops: Ops,
    tokens: int,
    precision: Precision,
    hidden: ir.Value,
    mask: ir.Value,
    capacity: ir.Value | None,
    mlp: MlpBody,
) -> Branch:
    """Prefix-sum compaction into `slots = rows * capacity` rows, static shapes throughout.

    slot = CumSum(mask) - 1 numbers the routed tokens. Token ids are scattered into their slots; tokens that are not
    routed go to one spare slot at the end. The way back is a gather: y[slot] where the token fits.
    """
    total = ops.Shape(mask)  # [1], T
    rows = ops.Div(total, ops.constant([tokens]))
    slots = ops.Mul(rows, capacity)
    count = ops.Cast(mask, to=ir.DataType.INT64)
    slot = ops.Sub(ops.CumSum(count, ops.constant(0)), ops.constant([1]))
    fits = ops.And(mask, ops.Less(slot, slots))
    empty = ops.ConstantOfShape(ops.Add(total, ops.constant([1])), value=ir.tensor(np.zeros(1, np.int64)))
    target = ops.Where(fits, slot, total)
    ids = ops.Range(ops.constant(0), ops.Squeeze(total), ops.constant(1))
    table = ops.Slice(ops.ScatterElements(empty, target, ids, axis=0), ops.constant([0]), slots, ops.constant([0]))
    out = mlp(ops.Gather(hidden, table, axis=0))
    home = ops.Where(fits, slot, ops.constant([0]))
    routed = ops.ReduceSum(count, keepdims=1)
    overflow = ops.Max(ops.Sub(routed, slots), ops.constant([0]))
    return _where(ops, precision, fits, ops.Gather(out, home, axis=0)), [overflow]


_ROUTED = {Routing.DENSE: _dense, Routing.DYNAMIC: _dynamic, Routing.CAPACITY: _capacity}


def embed_function(config: ModelConfig) -> ir.Function:
    """Latents [B, C, S, S] to tokens [rows, N, D]: patches, projection, position; repeated where rows = 2B."""
    side, p, c = config.input_size // config.patch_size, config.patch_size, config.in_channels

    def body(
        ops: Ops, x: ir.Value, modulation: ir.Value, weight: ir.Value, bias: ir.Value, position: ir.Value
    ) -> Values:
        patches = ops.Reshape(x, ops.constant([-1, c, side, p, side, p]))
        patches = ops.Transpose(patches, perm=[0, 2, 4, 1, 3, 5])  # [B, side, side, C, p, p]
        tokens = ops.Gemm(ops.Reshape(patches, ops.constant([-1, c * p * p])), weight, bias)
        tokens = ops.Add(ops.Reshape(tokens, ops.constant([-1, config.tokens, config.hidden_size])), position)
        # Two copies, then as many rows as wanted: with Tile by a computed count TensorRT loses the bound on the size.
        rows = ops.Shape(modulation, start=0, end=1)
        return (ops.Slice(ops.Concat(tokens, tokens, axis=0), ops.constant([0]), rows, ops.constant([0])),)

    return function("embed", ["x", "modulation", "weight", "bias", "position"], body)


def final_function(config: ModelConfig) -> ir.Function:
    """Tokens [rows, N, D] to the model's output [rows, C or 2C, S, S]."""
    side, p, c = config.input_size // config.patch_size, config.patch_size, config.out_channels

    def body(
        ops: Ops, x: ir.Value, ones: ir.Value, shift: ir.Value, scale: ir.Value, weight: ir.Value, bias: ir.Value
    ) -> Values:
        out = ops.Gemm(_flat(ops, _modulate(ops, x, ones, shift, scale)), weight, bias, transB=1)
        patches = ops.Reshape(out, ops.constant([-1, side, side, p, p, c]))
        image = ops.Transpose(patches, perm=[0, 5, 1, 3, 2, 4])
        return (ops.Reshape(image, ops.constant([-1, c, config.input_size, config.input_size])),)

    return function("final", ["x", "ones", "shift", "scale", "weight", "bias"], body)


def sampler_function(config: ModelConfig, cfg_channels: int) -> ir.Function:
    """Classifier-free guidance and the sampler's formula (`dydit.diffusion.coefficients`).

    The first B rows of the output are conditional, the last B unconditional; without guidance these are the same rows
    and the guided prediction is the conditional one, whatever the scale.
    """

    def body(
        ops: Ops, x: ir.Value, noise: ir.Value, coefficients: ir.Value, cfg_scale: ir.Value, out: ir.Value
    ) -> Values:
        batch, zero, axis = ops.Shape(x, start=0, end=1), ops.constant([0]), ops.constant([0])
        end = ops.constant([np.iinfo(np.int64).max])

        def channels(value: ir.Value, first: int, last: int) -> ir.Value:
            return ops.Slice(value, ops.constant([first]), ops.constant([last]), ops.constant([1]))

        conditional = ops.Slice(out, zero, batch, axis)
        unconditional = channels(ops.Slice(out, ops.Neg(batch), end, axis), 0, cfg_channels)
        steered = channels(conditional, 0, cfg_channels)
        eps = ops.Add(unconditional, ops.Mul(cfg_scale, ops.Sub(steered, unconditional)))
        if cfg_channels < config.in_channels:
            eps = ops.Concat(eps, channels(conditional, cfg_channels, config.in_channels), axis=1)
        c_x, c_eps, c_noise, slope, offset = ops.split(coefficients, 0, 5)
        log_std = offset
        if config.learn_sigma:
            v = channels(conditional, config.in_channels, 2 * config.in_channels)
            log_std = ops.Add(ops.Mul(slope, v), offset)
        drift = ops.Add(ops.Mul(c_x, x), ops.Mul(c_eps, eps))
        return (ops.Add(drift, ops.Mul(ops.Mul(c_noise, ops.Exp(log_std)), noise)),)

    return function("sampler_step", ["x", "noise", "coefficients", "cfg_scale", "out"], body)


class FunctionLibrary:
    """The functions of one model, made when first asked for and shared by all graphs."""

    def __init__(self, config: ModelConfig, cfg_channels: int, precision: Precision = Precision.FP32):
        self.config, self.cfg_channels, self.precision = config, cfg_channels, precision
        self.attention = cache(lambda gated: attention_function(config, gated, precision))
        self.attention_none = cache(lambda: attention_none_function(precision))
        self.mlp = cache(lambda routing, gated: mlp_function(config, routing, gated, precision))
        self.mlp_none = cache(lambda routed: mlp_none_function(routed, precision))
        self.embed = cache(lambda: embed_function(config))
        self.final = cache(lambda: final_function(config))
        self.sampler = cache(lambda: sampler_function(config, cfg_channels))


def call(ops: Ops, target: ir.Function, inputs: Sequence[ir.Value], outputs: Sequence[str]) -> Sequence[ir.Value]:
    """Call a local function from the main graph, naming its outputs."""
    return ops.call(target.domain, target.name, inputs, outputs)
