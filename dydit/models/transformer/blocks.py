"""Attention and MLP of a block as ONNX local functions, one for each kind of block, which the main graph calls.

Shapes: x [rows, N, D]; T = rows*N tokens, flattened over the batch before routing. The weights of a function are
inputs, so it does not depend on whether they are constants or graph inputs. The operations and their order are those of
the masked form, so that rounding agrees. Below fp32, only matrix products and attention use the lower type, with casts
before and after. The residual stream, normalization, routers and the sampler's step stay in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from dydit.bundle.manifest import Routing
from dydit.bundle.stored_weights import Precision
from dydit.graph import products
from dydit.graph.ops import CONTRIB, Ops, function
from dydit.graph.products import layer_precision, linear, weight_names
from dydit.models.config import TokenScope
from dydit.models.transformer.config import TransformerConfig
from dydit.models.transformer.norms import BranchNorm, Named

Values = Sequence[ir.Value]
_ROUTER = ("router0_w", "router0_b", "router2_w", "router2_b")


def flat(ops: Ops, x: ir.Value, width: int) -> ir.Value:
    """Reshape [rows, N, a, b, ...] with a*b*... = `width` to [T, width].

    Not Flatten, because ONNX Runtime had no CUDA kernel for Flatten of opset 23 for a long time.
    """
    return ops.Reshape(x, ops.constant([-1, width]))


def unflat(ops: Ops, config: TransformerConfig, x: ir.Value, width: int) -> ir.Value:
    """Reshape [T, width] to [rows, N, width].

    The shape is a constant. Computed shapes stay on the host, so they cost a GPU provider time in every step.
    """
    return ops.Reshape(x, ops.constant([-1, config.tokens, width]))


def attention_function(
    config: TransformerConfig,
    precision: Precision,
    norm: BranchNorm,
    heads: int | None,
    gated: bool,
    fp16_layers: Sequence[str] = (),
) -> ir.Function:
    """x and the attention branch, proj(gates * attention(normalized x)), for a number of heads, or for any (None).

    Weights: qkv [h*3*hd, D] head-major, proj [h*hd + `attention_padding`, D]; `gates` [h].
    `fp16_layers`: layers that stay in fp16, while the others have 8 bits.
    """
    qkv, proj = (layer_precision(precision, layer, fp16_layers) for layer in ("qkv", "proj"))
    qkv_names, proj_names = weight_names("qkv", qkv), weight_names("proj", proj)
    inputs = ["x", *norm.inputs, *qkv_names, *proj_names, *(["gates"] if gated else [])]

    def body(ops: Ops, *arguments: ir.Value) -> Values:
        of = dict(zip(inputs, arguments, strict=True))
        x = of["x"]
        hidden = ops.to_precision(flat(ops, norm.read(ops, of, x), config.hidden_size), qkv)
        joint = linear(ops, hidden, [of[name] for name in qkv_names], True, qkv)  # [T, h*3*hd]
        mixed = _attend(ops, config, joint, x, heads, qkv, proj)  # [T, h*hd]
        if gated:
            gates = ops.to_precision(of["gates"], proj)
            mixed = ops.Mul(mixed, _per_channel(ops, gates, config.head_dim))
        if zeros := attention_padding(config, precision, heads, fp16_layers):
            mixed = ops.Pad(mixed, ops.constant([0, 0, 0, zeros]))
        out = linear(ops, mixed, [of[name] for name in proj_names], False, proj)
        out = ops.to_fp32(out, proj)
        return (ops.Add(x, norm.scaled(ops, of, unflat(ops, config, out, config.hidden_size))),)

    count = "" if heads is None else f"_{heads}"
    return function(f"attention{count}{'_gated' if gated else ''}{_fp16_suffix(fp16_layers)}", inputs, body)


def attention_padding(
    config: TransformerConfig, precision: Precision, heads: int | None, fp16_layers: Sequence[str]
) -> int:
    """The number of zeros behind the inputs of proj: 8 for an odd number of heads of 72 channels, in calibrated 8 bits.

    No other product of the published models has a number of input channels that is not a multiple of 16.
    """
    proj = layer_precision(precision, "proj", fp16_layers)
    return 0 if heads is None else products.padding(proj, heads * config.head_dim)


def _fp16_suffix(fp16_layers: Sequence[str]) -> str:
    """The part of a function's name that lists its layers in fp16."""
    return "".join(f"_{layer}16" for layer in fp16_layers)


def _attend(
    ops: Ops,
    config: TransformerConfig,
    joint: ir.Value,
    x: ir.Value,
    heads: int | None,
    precision: Precision,
    target: Precision,
) -> ir.Value:
    """Attention: queries, keys and values [T, h*3*hd] of the tokens of x -> mixed values [T, h*hd].

    `precision`: of the product that computed the input. `target`: of the product that takes the result. Below fp32,
    the operator Attention is used, which compilers fuse. In fp32 there are three operators, because TensorRT for RTX
    does not fuse Attention with a symbolic batch. int8 runs only on ONNX Runtime, so it uses its fused operator.
    """
    hd, scale = config.head_dim, config.head_dim**-0.5
    if precision is Precision.INT8:
        assert heads is not None, "the operator has the number of heads as an attribute"
        joint = ops.Reshape(joint, ops.constant([-1, config.tokens, heads, 3 * hd]))
        wide = ops.constant([-1, config.tokens, heads * hd])
        parts = [ops.Reshape(part, wide) for part in ops.split(joint, 3, 3)]
        (mixed,) = ops.call(CONTRIB, "MultiHeadAttention", parts, 1, {"num_heads": heads, "scale": scale})
        return flat(ops, mixed, heads * hd)
    if heads is None:
        shape = ops.Concat(ops.Shape(x, start=0, end=2), ops.constant([-1, 3 * hd]), axis=0)
    else:
        shape = ops.constant([-1, config.tokens, heads, 3 * hd])
    q, k, v = ops.split(ops.Transpose(ops.Reshape(joint, shape), perm=[0, 2, 1, 3]), 3, 3)  # [rows, h, N, hd]
    if precision is Precision.FP32:
        scaled = ops.Mul(q, ops.constant(scale, np.float32))
        scores = ops.MatMul(scaled, ops.Transpose(k, perm=[0, 1, 3, 2]))
        mixed = ops.MatMul(ops.Softmax(scores, axis=-1), v)
    else:
        kind = precision.attention
        q, k, v = (ops.between(part, precision, kind) for part in (q, k, v))
        mixed = ops.between(ops.Attention(q, k, v, scale=scale), kind, target)
    mixed = ops.Transpose(mixed, perm=[0, 2, 1, 3])
    if heads is None:
        return ops.Reshape(mixed, ops.Concat(ops.Shape(joint, start=0, end=1), ops.constant([-1]), axis=0))
    return flat(ops, mixed, heads * hd)


def attention_none_function(config: TransformerConfig, precision: Precision, norm: BranchNorm) -> ir.Function:
    """Attention without active heads: only the bias of the projection is added."""
    inputs = ["x", *norm.joining, "proj_bias"]

    def body(ops: Ops, *arguments: ir.Value) -> Values:
        of = dict(zip(inputs, arguments, strict=True))
        return (ops.Add(of["x"], norm.scaled(ops, of, ops.to_fp32(of["proj_bias"], precision))),)

    return function("attention_none", inputs, body)


def _per_channel(ops: Ops, gates: ir.Value, channels: int) -> ir.Value:
    """Gates of units [u] -> gates of their channels [u*channels]."""
    wide = ops.Expand(ops.Unsqueeze(gates, ops.constant([1])), ops.constant([1, channels]))
    return ops.Reshape(wide, ops.constant([-1]))


@dataclass(frozen=True)
class _Mlp:
    """Writes the parts of an MLP function. `of`: the function's inputs, by name.

    `fc1`, `fc2`: the precisions of these layers. The output of the MLP has the precision of fc2.
    """

    ops: Ops
    config: TransformerConfig
    norm: BranchNorm
    fc1: Precision
    fc2: Precision
    of: Named

    def forward(self, hidden: ir.Value) -> ir.Value:
        """Normalized tokens [n, D], fp32 -> the output of fc2 [n, D], in its precision."""
        ops, of = self.ops, self.of
        gates = None
        if "gates" in of:
            gates = _per_channel(ops, ops.to_precision(of["gates"], self.fc1), self.config.group_dim)
        if "factor" in of:
            factor = ops.to_precision(of["factor"], self.fc1)
            gates = factor if gates is None else ops.Mul(gates, factor)
        fc1 = [of[name] for name in weight_names("fc1", self.fc1)]
        fc2 = [of[name] for name in weight_names("fc2", self.fc2)]
        entering = ops.to_precision(hidden, self.fc1)
        return products.mlp(ops, entering, fc1, fc2, gates, self.config.GELU, self.fc1, self.fc2)

    def hidden(self) -> ir.Value:
        """All tokens, normalized, [T, D]."""
        return flat(self.ops, self.norm.read(self.ops, self.of, self.of["x"]), self.config.hidden_size)

    def joined(self, branch: ir.Value) -> ir.Value:
        """The stream with the output [T, D] of the MLP."""
        ops, x = self.ops, self.of["x"]
        branch = ops.to_fp32(unflat(ops, self.config, branch, self.config.hidden_size), self.fc2)
        return ops.Add(x, self.norm.scaled(ops, self.of, branch))

    def where(self, mask: ir.Value, rows: ir.Value) -> ir.Value:
        """Rows [T, D] where the mask [T] is on, else 0. Where, not Mul, because 0 * inf is NaN."""
        zero = self.ops.to_precision(self.ops.constant(0, np.float32), self.fc2)
        return self.ops.Where(self.ops.Unsqueeze(mask, self.ops.constant([1])), rows, zero)


Routed = tuple[ir.Value, list[ir.Value]]  # x after the block, and with capacity the overflow


def mlp_function(
    config: TransformerConfig,
    precision: Precision,
    norm: BranchNorm,
    routing: Routing | None,
    gated: bool,
    factored: bool = False,
    fp16_layers: Sequence[str] = (),
) -> ir.Function:
    """x and, for routed tokens, the branch fc2(gates * GELU(fc1(normalized x))). `routing`: None for all tokens.

    Weights: fc1 [g*gs, D], fc2 [g*gs, D] group-major; `gates` [g]; `factor` [g*gs], factors of fc2's smoothed inputs;
    `capacity`: token slots per row of a batch, which its rows share. Outputs: x, then with routing the token mask bool
    [T], then with capacity the overflow int64 [1].
    `fp16_layers`: layers that stay in fp16, while the others have 8 bits.
    """
    fc1, fc2 = (layer_precision(precision, layer, fp16_layers) for layer in ("fc1", "fc2"))
    inputs = ["x", *norm.inputs, *weight_names("fc1", fc1), *weight_names("fc2", fc2)]
    inputs += _ROUTER if routing else ()
    inputs += ["capacity"] if routing is Routing.CAPACITY else []
    inputs += ["gates"] if gated else []
    inputs += ["factor"] if factored else []

    def body(ops: Ops, *arguments: ir.Value) -> Values:
        of = dict(zip(inputs, arguments, strict=True))
        mlp = _Mlp(ops, config, norm, fc1, fc2, of)
        if routing is None:
            return (mlp.joined(mlp.forward(mlp.hidden())),)
        mask = _token_mask(ops, config, flat(ops, of["x"], config.hidden_size), *(of[name] for name in _ROUTER))
        x, extra = _ROUTED[routing](mlp, mask)
        return (x, mask, *extra)

    kind = [*([routing.value] if routing else []), *(["gated"] if gated else []), *(["factored"] if factored else [])]
    return function(f"{'_'.join(['mlp', *kind])}{_fp16_suffix(fp16_layers)}", inputs, body)


def mlp_none_function(config: TransformerConfig, precision: Precision, norm: BranchNorm, routed: bool) -> ir.Function:
    """The MLP without active groups: the bias of fc2 is added to the routed tokens."""
    inputs = ["x", *norm.joining, "fc2_bias", *(_ROUTER if routed else ())]

    def body(ops: Ops, *arguments: ir.Value) -> Values:
        of = dict(zip(inputs, arguments, strict=True))
        x, branch = of["x"], norm.scaled(ops, of, ops.to_fp32(of["fc2_bias"], precision))
        if not routed:
            return (ops.Add(x, branch),)
        mask = _token_mask(ops, config, flat(ops, x, config.hidden_size), *(of[name] for name in _ROUTER))
        on = unflat(ops, config, ops.Cast(mask, to=ir.DataType.FLOAT), 1)
        return (ops.Add(x, ops.Mul(branch, on)), mask)

    return function("mlp_none_routed" if routed else "mlp_none", inputs, body)


def _token_mask(
    ops: Ops, config: TransformerConfig, tokens: ir.Value, w0: ir.Value, b0: ir.Value, w2: ir.Value, b2: ir.Value
) -> ir.Value:
    """Whether each of the T tokens enters the MLP, bool [T]: whether its router logit, in fp32, is above 0.

    The tokens in front of the patches always do. With `TokenScope.LAYER`, the mean logit of the others decides.
    """
    logits = ops.Gemm(ops.Relu(ops.Gemm(tokens, w0, b0, transB=1)), w2, b2, transB=1)
    if config.token_scope is TokenScope.LAYER:
        of_images = ops.Reshape(logits, ops.constant([-1, config.tokens]))
        ends = (ops.constant([each]) for each in (config.extra_tokens, config.tokens, 1))
        mean = ops.ReduceMean(ops.Slice(of_images, *ends), ops.constant([1]), keepdims=1)
        logits = ops.Expand(mean, ops.constant([1, config.tokens]))
    on = ops.Reshape(ops.Greater(logits, ops.constant(0, np.float32)), ops.constant([-1]))
    if not config.extra_tokens:
        return on
    always = ops.constant(np.arange(config.tokens) < config.extra_tokens, np.bool_)
    return ops.Reshape(ops.Or(ops.Reshape(on, ops.constant([-1, config.tokens])), always), ops.constant([-1]))


def _dense(mlp: _Mlp, mask: ir.Value) -> Routed:
    """Compute all tokens; those that are not routed get 0."""
    return mlp.joined(mlp.where(mask, mlp.forward(mlp.hidden()))), []


def _dynamic(mlp: _Mlp, mask: ir.Value) -> Routed:
    """NonZero returns the ids of routed tokens. They are gathered, computed, and scattered back into the stream."""
    ops, of = mlp.ops, mlp.of
    ids = ops.Reshape(ops.NonZero(mask), ops.constant([-1]))
    rows = ops.Div(ids, ops.constant([mlp.config.tokens]))
    stream = flat(ops, of["x"], mlp.config.hidden_size)
    entering = ops.Gather(stream, ids, axis=0)  # [n, D]
    chosen = mlp.norm.at_rows(ops, of, rows)
    branch = mlp.forward(mlp.norm.read(ops, chosen, entering))
    leaving = ops.Add(entering, mlp.norm.scaled(ops, chosen, ops.to_fp32(branch, mlp.fc2)))
    stream = ops.ScatterND(stream, ops.Unsqueeze(ids, ops.constant([1])), leaving)
    return unflat(ops, mlp.config, stream, mlp.config.hidden_size), []


def _capacity(mlp: _Mlp, mask: ir.Value) -> Routed:
    """Prefix-sum compaction into `rows * capacity` slots, for the rows of a batch. All shapes are static.

    slot = (routed tokens of the rows before) + (of the same row, up to this one) - 1 numbers the routed tokens. The
    sums run over rows, because a GPU provider may sum a whole batch in one thread. Token ids are scattered into their
    slots, and those of tokens that are not routed into one spare place behind the slots. Results are gathered: y[slot]
    for tokens that have a slot.

    The number of slots is needed twice: on the host, for shapes, and on the device, to compare with. It is computed in
    both places, because a value that a device copies from the host keeps ONNX Runtime from capturing CUDA graphs.
    """
    ops, tokens, capacity = mlp.ops, mlp.config.tokens, mlp.of["capacity"]
    total = ops.Shape(mask)  # [1], T
    rows = ops.Div(total, ops.constant([tokens]))
    slots_of_shapes = ops.Mul(rows, capacity)
    slots = ops.Mul(
        ops.ReduceSum(ops.ConstantOfShape(rows, value=ir.tensor(np.ones(1, np.int64))), keepdims=1), capacity
    )
    count = ops.Cast(ops.Reshape(mask, ops.constant([-1, tokens])), to=ir.DataType.INT64)  # [rows, N]
    of_row = ops.ReduceSum(count, ops.constant([1]), keepdims=1)  # [rows, 1]
    before = ops.CumSum(of_row, ops.constant(0), exclusive=1)
    place = ops.Add(ops.CumSum(count, ops.constant(1)), before)
    slot = ops.Sub(ops.Reshape(place, ops.constant([-1])), ops.constant([1]))
    fits = ops.And(mask, ops.Less(slot, slots))
    empty = ops.ConstantOfShape(ops.Add(total, ops.constant([1])), value=ir.tensor(np.zeros(1, np.int64)))
    target = ops.Where(fits, slot, slots)
    ids = ops.Range(ops.constant(0), ops.Squeeze(total), ops.constant(1))
    scattered = ops.ScatterElements(empty, target, ids, axis=0)
    table = ops.Slice(scattered, ops.constant([0]), slots_of_shapes, ops.constant([0]))
    out = mlp.forward(ops.Gather(mlp.hidden(), table, axis=0))
    source = ops.Where(fits, slot, ops.constant([0]))
    routed = ops.Reshape(ops.ReduceSum(of_row, keepdims=1), ops.constant([1]))
    overflow = ops.Max(ops.Sub(routed, slots), ops.constant([0]))
    return mlp.joined(mlp.where(fits, ops.Gather(out, source, axis=0))), [overflow]


_ROUTED: dict[Routing, Callable[[_Mlp, ir.Value], Routed]] = {
    Routing.DENSE: _dense,
    Routing.DYNAMIC: _dynamic,
    Routing.CAPACITY: _capacity,
}
