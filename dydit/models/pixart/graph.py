"""A PixArt as ONNX: the blocks of a step's graph with cross-attention, the conditioning graph and the text graph."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dydit.bundle.io_spec import (
    CONDITION,
    TEXT_BIAS,
    TEXT_ROWS,
    TEXT_VALUES,
    conditioning_inputs,
    conditioning_outputs,
    text_inputs,
    text_outputs,
)
from dydit.bundle.stored_weights import Precision
from dydit.graph.ops import Ops, function, silu
from dydit.graph.sources import Windows, graph_value
from dydit.graph.writer import GraphWriter, conditioning_model, typed
from dydit.models.architecture import stored_name
from dydit.models.pixart.config import PADDING_BIAS, PixArtConfig
from dydit.models.transformer import ends
from dydit.models.transformer.blocks import Values, flat, unflat
from dydit.models.transformer.graph import write_attention, write_mlp
from dydit.models.transformer.modulation import modulation_factors, scale_ones
from dydit.models.transformer.norms import Modulated
from dydit.quantization.smoothing import Smoothing


def write_step(writer: GraphWriter) -> tuple[ir.Value, list[ir.Value]]:
    """Write a PixArt into a graph. Returns its output, and each block's token overflow."""
    inputs, weights, library, config = writer.inputs, writer.weights, writer.library, writer.config
    ones = weights.local("ones", np.ones(config.hidden_size, np.float32))
    vectors = writer.ops.split(inputs[CONDITION], 1, config.vectors)  # [rows, 1, D] each
    embed = [weights.whole(name) for name in ("embed.weight", "embed.bias", "pos_embed")]
    (x,) = writer.call(library.get(ends.embed_function), [inputs["x"], inputs[CONDITION], *embed], ["tokens"])
    overflow, norm = [], Modulated()
    texts = [inputs[name] for name in (TEXT_VALUES, TEXT_BIAS, TEXT_ROWS)]
    for block in range(config.depth):
        first = 6 * block
        of = dict(zip(norm.inputs, [ones, *vectors[first : first + 3]], strict=True))
        x = write_attention(writer, block, x, norm, of)
        names = [f"{layer}.{part}" for layer in ("cross_q", "cross_proj") for part in ("weight", "bias")]
        cross = [weights.whole(stored_name(block, name)) for name in names]
        arguments = [x, *texts, writer.ops.constant(block), *cross]
        (x,) = writer.call(library.get(cross_function), arguments, [stored_name(block, "crossed")])
        of = dict(zip(norm.inputs, [ones, *vectors[first + 3 : first + 6]], strict=True))
        x, *counted = write_mlp(writer, block, x, norm, of)
        overflow += counted
    final = [weights.whole(name) for name in ("final.weight", "final.bias")]
    (out,) = writer.call(library.get(ends.final_function), [x, ones, *vectors[-2:], *final], ["model_output"])
    return out, overflow


def cross_function(config: PixArtConfig, precision: Precision) -> ir.Function:
    """x + proj(attention of q(x) to the keys and values of each row's text), without normalization or gate.

    x [rows, N, D]; values [L, texts, 2, tokens, D]; bias [texts, tokens]; rows int64 [rows]; block []. In fp32, and in
    int8, which runs only on ONNX Runtime, attention consists of three operators, with scores in fp32. In other
    precisions it is the operator Attention, as in `dydit.models.transformer.blocks`.
    """
    heads, hd, kind = config.num_heads, config.head_dim, precision.attention
    d = config.hidden_size
    inputs = ["x", "values", "bias", "rows", "block", "q_weight", "q_bias", "proj_weight", "proj_bias"]

    def body(ops: Ops, *arguments: ir.Value) -> Values:
        of = dict(zip(inputs, arguments, strict=True))
        x, rows = of["x"], of["rows"]

        def by_head(tokens: ir.Value) -> ir.Value:  # [rows, n, D] -> [rows, H, n, hd]
            return ops.Transpose(ops.Reshape(tokens, ops.constant([0, 0, heads, hd])), perm=[0, 2, 1, 3])

        texts = ops.Gather(ops.Gather(of["values"], of["block"], axis=0), rows, axis=0)  # [rows, 2, tokens, D]
        k, v = (by_head(ops.Squeeze(part, ops.constant([1]))) for part in ops.split(texts, 1, 2))
        q = ops.Gemm(ops.to_precision(flat(ops, x, d), precision), of["q_weight"], of["q_bias"], transB=1)
        q = by_head(unflat(ops, config, q, d))
        bias = ops.Unsqueeze(ops.Gather(of["bias"], rows, axis=0), ops.constant([1, 2]))  # [rows, 1, 1, tokens]
        if kind.dtype == "float32":
            q = ops.Mul(q, ops.constant(hd**-0.5, np.float32))
            scores = ops.MatMul(q, ops.Transpose(k, perm=[0, 1, 3, 2]))  # [rows, H, N, tokens]
            mixed = ops.MatMul(ops.Softmax(ops.Add(scores, bias), axis=-1), v)
        else:
            q = ops.between(q, precision, kind)
            bias = ops.Expand(bias, ops.constant([1, 1, config.tokens, 1]))  # ONNX Runtime takes no other mask
            k, v, bias = (ops.to_precision(each, kind) for each in (k, v, bias))
            mixed = ops.Attention(q, k, v, bias, scale=hd**-0.5)
        mixed = ops.between(flat(ops, ops.Transpose(mixed, perm=[0, 2, 1, 3]), d), kind, precision)
        out = ops.to_fp32(ops.Gemm(mixed, of["proj_weight"], of["proj_bias"], transB=1), precision)
        return (ops.Add(x, unflat(ops, config, out, d)),)

    return function("cross_attention", inputs, body)


def conditioning_graph(
    config: PixArtConfig, weights: Windows, precision: Precision, smoothing: Smoothing | None = None
) -> ir.Model:
    """(timesteps [T], labels [R]) -> modulation [T, R, 6L+2, D]: of a timestep, the same for every label."""
    ops, d, vectors = Ops(), config.hidden_size, config.vectors
    timesteps, labels = (graph_value(spec) for spec in conditioning_inputs())
    e = _embedded(ops, weights, "time", ops.Unsqueeze(timesteps, ops.constant([1])))  # [T, D]
    if config.micro_conditions:
        size = _embedded(ops, weights, "size", ops.constant([[config.pixels]], np.float32))
        ratio = _embedded(ops, weights, "ratio", ops.constant([[1]], np.float32))
        e = ops.Add(e, ops.Concat(size, size, ratio, axis=1))
    six = ops.Gemm(
        ops.to_precision(silu(ops, e), precision), weights.whole("adaln.weight"), weights.whole("adaln.bias"), transB=1
    )
    six = ops.Reshape(ops.to_fp32(six, precision), ops.constant([-1, 1, 6, d]))
    of_blocks = ops.Reshape(weights.rows("adaln.tables", 0, vectors - 2), ops.constant([config.depth, 6, d]))
    blocks = ops.Reshape(ops.Add(six, of_blocks), ops.constant([-1, vectors - 2, d]))
    final = ops.Add(ops.Unsqueeze(e, ops.constant([1])), weights.rows("adaln.tables", vectors - 2, vectors))
    out = ops.Add(ops.Concat(blocks, final, axis=1), weights.local("scale_ones", scale_ones(config)))
    factors = modulation_factors(config, smoothing)
    if factors is not None:
        out = ops.Mul(out, weights.local("modulation_factors", factors))
    shape = ops.Concat(ops.Shape(timesteps), ops.Shape(labels), ops.constant([vectors, d]), axis=0)
    (modulation,) = ops.call("", "Expand", (ops.Unsqueeze(out, ops.constant([1])), shape), [CONDITION])
    typed(modulation, graph_value(conditioning_outputs(config)[0]))
    return conditioning_model([timesteps, labels], [modulation], ops, weights)


def _embedded(ops: Ops, weights: Windows, layer: str, values: ir.Value) -> ir.Value:
    """Values [n, 1] -> their sinusoid (cosines first), Linear, SiLU, Linear."""
    angles = ops.Mul(values, weights.whole("time.frequencies"))
    x = ops.Concat(ops.Cos(angles), ops.Sin(angles), axis=1)
    first, second = ([weights.whole(f"{layer}.{at}.{part}") for part in ("weight", "bias")] for at in (0, 2))
    return ops.Gemm(silu(ops, ops.Gemm(x, *first, transB=1)), *second, transB=1)


def text_graph(config: PixArtConfig, weights: Windows, precision: Precision) -> ir.Model:
    """Texts -> keys and values of every block, and the bias of their scores (`io_spec.text_outputs`).

    The bias is that of `dydit.models.pixart.model.text_bias`.
    """
    ops, d = Ops(), config.hidden_size
    embeddings, mask = (graph_value(spec) for spec in text_inputs(config))

    def linear(x: ir.Value, name: str) -> ir.Value:
        return ops.Gemm(x, weights.whole(f"{name}.weight"), weights.whole(f"{name}.bias"), transB=1)

    hidden = ops.to_precision(ops.Reshape(embeddings, ops.constant([-1, config.caption_channels])), precision)
    hidden = linear(ops.Gelu(linear(hidden, "text.0"), approximate="tanh"), "text.2")  # [texts*tokens, D]
    shape = ops.Concat(ops.Shape(mask), ops.constant([2, d]), axis=0)
    blocks = []
    for block in range(config.depth):
        both = ops.Reshape(ops.to_fp32(linear(hidden, stored_name(block, "cross_kv")), precision), shape)
        blocks.append(ops.Unsqueeze(ops.Transpose(both, perm=[0, 2, 1, 3]), ops.constant([0])))
    (values,) = ops.call("", "Concat", blocks, [TEXT_VALUES], {"axis": 0})
    on = ops.Cast(mask, to=ir.DataType.FLOAT)
    any_on = ops.ReduceMax(on, ops.constant([1]), keepdims=1)
    off = ops.Mul(ops.Sub(any_on, on), ops.constant(PADDING_BIAS, np.float32))
    (bias,) = ops.call("", "Identity", (off,), [TEXT_BIAS])
    outputs = [
        typed(value, graph_value(spec)) for value, spec in zip((values, bias), text_outputs(config), strict=True)
    ]
    return conditioning_model([embeddings, mask], outputs, ops, weights)
