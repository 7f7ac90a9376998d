"""A DiT as ONNX: the blocks of a step's graph, and the conditioning graph."""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir

from dydit.bundle.io_spec import CONDITION, conditioning_inputs, conditioning_outputs, residual_name, token_mask_name
from dydit.bundle.manifest import Routing
from dydit.bundle.stored_weights import Precision
from dydit.graph.ops import Ops
from dydit.graph.sources import Windows, graph_value
from dydit.graph.writer import GraphWriter, conditioning_model, typed
from dydit.models.architecture import stored_name
from dydit.models.dit import blocks, ends
from dydit.models.dit.config import DiTConfig
from dydit.models.dit.smoothed import modulation_factors
from dydit.quantization.smoothing import Smoothing


def write_step(writer: GraphWriter) -> tuple[ir.Value, list[ir.Value]]:
    """Write a DiT into a graph. Returns its output, and each block's token overflow."""
    inputs, weights, library = writer.inputs, writer.weights, writer.library
    ones = weights.local("ones", np.ones(writer.config.hidden_size, np.float32))
    vectors = writer.ops.split(inputs[CONDITION], 1, writer.config.vectors)  # [rows, 1, D] each
    embed = [weights.whole(name) for name in ("embed.weight", "embed.bias", "pos_embed")]
    (x,) = writer.call(library.get(ends.embed_function), [inputs["x"], inputs[CONDITION], *embed], ["tokens"])
    overflow = []
    for block in range(writer.config.depth):
        shift1, scale1, gate1, shift2, scale2, gate2 = vectors[6 * block : 6 * block + 6]
        x = _attention(writer, block, x, ones, [shift1, scale1, gate1])
        x, *counted = _mlp(writer, block, x, ones, [shift2, scale2, gate2])
        overflow += counted
    final = [weights.whole(name) for name in ("final.weight", "final.bias")]
    (out,) = writer.call(library.get(ends.final_function), [x, ones, *vectors[-2:], *final], ["model_output"])
    return out, overflow


def _attention(writer: GraphWriter, block: int, x: ir.Value, ones: ir.Value, vectors: list[ir.Value]) -> ir.Value:
    part, slots = writer.part(block, 0)
    names = [stored_name(block, "attended")]
    if not slots:
        bias = writer.weights.whole(part.stored("proj.bias"))
        return writer.call(writer.library.get(blocks.attention_none_function), [x, vectors[2], bias], names)[0]
    gates = writer.gates(part, slots)
    function = writer.library.get(blocks.attention_function, writer.count(slots), bool(gates), writer.fp16_layers(part))
    return writer.call(function, [x, ones, *vectors, *writer.layers(part, slots), *gates], names)[0]


def _mlp(writer: GraphWriter, block: int, x: ir.Value, ones: ir.Value, vectors: list[ir.Value]) -> list[ir.Value]:
    """Returns x and, with capacity routing, the overflow."""
    part, slots = writer.part(block, 1)
    routing = writer.spec.routing
    capacity = routing is Routing.CAPACITY
    router = []
    if routing:
        pieces = ("router.0.weight", "router.0.bias", "router.2.weight", "router.2.bias")
        router = [writer.weights.whole(part.stored(piece)) for piece in pieces]
    names = [residual_name(block), *([token_mask_name(block)] if routing else [])]
    if not slots:
        bias = writer.weights.whole(part.stored("fc2.bias"))
        function = writer.library.get(blocks.mlp_none_function, bool(routing))
        x, *_ = writer.call(function, [x, vectors[2], bias, *router], names)
        return [x, *([writer.ops.constant([0])] if capacity else [])]
    gates, layers = writer.gates(part, slots), writer.layers(part, slots)
    arguments = [x, ones, *vectors, *layers, *router]
    if capacity:
        assert writer.spec.capacities is not None
        arguments.append(writer.ops.constant([writer.spec.capacities[block]]))
        names.append(stored_name(block, "overflow"))
    factors = writer.factors(part, slots)
    function = writer.library.get(blocks.mlp_function, routing, bool(gates), bool(factors), writer.fp16_layers(part))
    x, *extra = writer.call(function, [*arguments, *gates, *factors], names)
    return [x, *(extra[1:] if capacity else [])]


def conditioning_graph(
    config: DiTConfig, weights: Windows, precision: Precision, smoothing: Smoothing | None = None
) -> ir.Model:
    """(timesteps [T], labels [R]) -> modulation [T, R, 6L+2, D] of all pairs, with the factors of smoothing."""
    ops, d, vectors = Ops(), config.hidden_size, config.vectors
    timesteps, labels = (graph_value(spec) for spec in conditioning_inputs())
    angles = ops.Mul(ops.Unsqueeze(timesteps, ops.constant([1])), weights.whole("time.frequencies"))
    sinusoid = ops.Concat(ops.Cos(angles), ops.Sin(angles), axis=1)
    hidden = _silu(ops, ops.Gemm(sinusoid, weights.whole("time.0.weight"), weights.whole("time.0.bias"), transB=1))
    t_emb = ops.Gemm(hidden, weights.whole("time.2.weight"), weights.whole("time.2.bias"), transB=1)
    y_emb = ops.Gather(weights.whole("label.table"), labels, axis=0)
    c = ops.Add(ops.Unsqueeze(t_emb, ops.constant([1])), y_emb)  # [T, R, D]
    flat = _silu(ops, ops.Reshape(c, ops.constant([-1, d])))
    flat = ops.to_precision(flat, precision)
    # A product for each layer, so that a runtime that casts weights to fp32 holds only one layer's at a time.
    bounds = [*range(0, vectors * d, 6 * d), vectors * d]
    layers = []
    for first, end in itertools.pairwise(bounds):
        weight, bias = (weights.rows(f"adaln.{piece}", first, end) for piece in ("weight", "bias"))
        layers.append(ops.Gemm(flat, weight, bias, transB=1))
    out = ops.to_fp32(ops.Concat(*layers, axis=1), precision)
    ones = np.zeros((vectors, d), np.float32)
    ones[[*(6 * b + k for b in range(config.depth) for k in (1, 4)), vectors - 1]] = 1
    out = ops.Add(ops.Reshape(out, ops.constant([-1, vectors, d])), weights.local("scale_ones", ones[:, :1]))
    factors = modulation_factors(config, smoothing)
    if factors is not None:
        out = ops.Mul(out, weights.local("modulation_factors", factors))
    shape = ops.Concat(ops.Shape(timesteps), ops.Shape(labels), ops.constant([vectors, d]), axis=0)
    (modulation,) = ops.call("", "Reshape", (out, shape), [CONDITION])
    typed(modulation, graph_value(conditioning_outputs(config)[0]))
    return conditioning_model([timesteps, labels], [modulation], ops, weights)


def _silu(ops: Ops, x: ir.Value) -> ir.Value:
    return ops.Mul(x, ops.Sigmoid(x))
