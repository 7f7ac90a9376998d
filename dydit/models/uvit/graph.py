"""A U-ViT as ONNX: the blocks of a step's graph with their long skips, and the conditioning graph."""

from __future__ import annotations

import onnx_ir as ir

from dydit.bundle.io_spec import CONDITION, conditioning_inputs, conditioning_outputs
from dydit.bundle.stored_weights import Precision
from dydit.graph.ops import Ops, function, silu
from dydit.graph.sources import Windows, graph_value
from dydit.graph.writer import GraphWriter, conditioning_model, typed
from dydit.models.architecture import stored_name
from dydit.models.transformer.blocks import Values, flat, unflat
from dydit.models.transformer.graph import for_rows, images, patch_tokens, write_attention, write_mlp
from dydit.models.transformer.norms import Affine
from dydit.models.uvit.config import UViTConfig
from dydit.models.uvit.units import SKIP


def write_step(writer: GraphWriter) -> tuple[ir.Value, list[ir.Value]]:
    """Write a U-ViT into a graph. Returns its output, and each block's token overflow."""
    config, weights, library = writer.config, writer.weights, writer.library

    def whole(*names: str) -> list[ir.Value]:
        return [weights.whole(name) for name in names]

    embed = [writer.inputs["x"], writer.inputs[CONDITION], *whole("embed.weight", "embed.bias", "pos_embed")]
    (x,) = writer.call(library.get(embed_function), embed, ["tokens"])
    norm, overflow = Affine(), []
    skips: list[ir.Value] = []
    for block in range(config.depth):
        if config.has_skip(block):
            skip = [x, skips.pop(), *whole(*(stored_name(block, name) for name in SKIP))]
            (x,) = writer.call(library.get(skip_function), skip, [stored_name(block, "joined")])
        before = whole(*(stored_name(block, f"norm1.{part}") for part in ("weight", "bias")))
        x = write_attention(writer, block, x, norm, dict(zip(norm.inputs, before, strict=True)))
        before = whole(*(stored_name(block, f"norm2.{part}") for part in ("weight", "bias")))
        x, *counted = write_mlp(writer, block, x, norm, dict(zip(norm.inputs, before, strict=True)))
        overflow += counted
        if block < config.half:
            skips.append(x)
    ends = ["norm", "final", *(["conv"] if config.conv else [])]
    final = whole(*(f"{layer}.{part}" for layer in ends for part in ("weight", "bias")))
    (out,) = writer.call(library.get(final_function), [x, *final], ["model_output"])
    return out, overflow


def embed_function(config: UViTConfig, precision: Precision) -> ir.Function:
    """Latents [B, C, S, S] and the tokens of class and time [rows, E, D] to all tokens [rows, N, D]."""

    def body(ops: Ops, x: ir.Value, condition: ir.Value, *weights: ir.Value) -> Values:
        patches = for_rows(ops, patch_tokens(ops, config, x, *weights), condition)
        return (ops.Concat(condition, patches, axis=1),)

    return function("embed", ["x", "condition", "weight", "bias", "position"], body)


def skip_function(config: UViTConfig, precision: Precision) -> ir.Function:
    """A long skip: the stream and what the counterpart of a block gave, [rows, N, D] each, joined by a linear layer."""

    def body(ops: Ops, x: ir.Value, skip: ir.Value, weight: ir.Value, bias: ir.Value) -> Values:
        both = ops.to_precision(flat(ops, ops.Concat(x, skip, axis=2), 2 * config.hidden_size), precision)
        joined = ops.to_fp32(ops.Gemm(both, weight, bias, transB=1), precision)
        return (unflat(ops, config, joined, config.hidden_size),)

    return function("skip", ["x", "skip", "weight", "bias"], body)


def final_function(config: UViTConfig, precision: Precision) -> ir.Function:
    """Tokens [rows, N, D] to the model's output [rows, C, S, S]: LayerNorm, a linear layer and a convolution."""
    inputs = ["x", "norm_weight", "norm_bias", "weight", "bias", *(["conv_weight", "conv_bias"] if config.conv else [])]

    def body(ops: Ops, *arguments: ir.Value) -> Values:
        of = dict(zip(inputs, arguments, strict=True))
        first, end, axis = (ops.constant([number]) for number in (config.extra_tokens, config.tokens, 1))
        patches = Affine().read(ops, of, ops.Slice(of["x"], first, end, axis))
        image = images(
            ops, config, ops.Gemm(flat(ops, patches, config.hidden_size), of["weight"], of["bias"], transB=1)
        )
        return (ops.Conv(image, of["conv_weight"], of["conv_bias"], pads=[1, 1, 1, 1]) if config.conv else image,)

    return function("final", inputs, body)


def conditioning_graph(config: UViTConfig, weights: Windows) -> ir.Model:
    """(timesteps [T], labels [R]) -> the tokens of class and time [T, R, E, D] of all pairs, with their positions."""
    ops, d = Ops(), config.hidden_size
    timesteps, labels = (graph_value(spec) for spec in conditioning_inputs())
    times = ops.Add(timesteps, ops.constant(config.first_time, "float32")) if config.first_time else timesteps
    angles = ops.Mul(ops.Unsqueeze(times, ops.constant([1])), weights.whole("time.frequencies"))
    time = ops.Concat(ops.Cos(angles), ops.Sin(angles), axis=1)
    if config.mlp_time_embed:
        hidden = silu(ops, ops.Gemm(time, weights.whole("time.0.weight"), weights.whole("time.0.bias"), transB=1))
        time = ops.Gemm(hidden, weights.whole("time.2.weight"), weights.whole("time.2.bias"), transB=1)
    shape = ops.Concat(ops.Shape(timesteps), ops.Shape(labels), ops.constant([1, d]), axis=0)
    tokens = [ops.Expand(ops.Unsqueeze(time, ops.constant([1, 2])), shape)]
    if config.num_classes:
        classes = ops.Gather(weights.whole("label.table"), labels, axis=0)
        tokens.insert(0, ops.Expand(ops.Unsqueeze(classes, ops.constant([1])), shape))
    joined = ops.Concat(*tokens, axis=2)
    (condition,) = ops.call("", "Add", (joined, weights.whole("extra_positions")), [CONDITION])
    typed(condition, graph_value(conditioning_outputs(config)[0]))
    return conditioning_model([timesteps, labels], [condition], ops, weights)
