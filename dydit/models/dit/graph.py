"""A DiT as ONNX: the blocks of a step's graph, and the conditioning graph."""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir

from dydit.bundle.io_spec import CONDITION, conditioning_inputs, conditioning_outputs
from dydit.bundle.stored_weights import Precision
from dydit.graph.ops import Ops, silu
from dydit.graph.sources import Windows, graph_value
from dydit.graph.writer import GraphWriter, conditioning_model, typed
from dydit.models.dit.config import DiTConfig
from dydit.models.transformer import ends
from dydit.models.transformer.graph import write_attention, write_mlp
from dydit.models.transformer.modulation import modulation_factors, scale_ones
from dydit.models.transformer.norms import Modulated
from dydit.quantization.smoothing import Smoothing


def write_step(writer: GraphWriter) -> tuple[ir.Value, list[ir.Value]]:
    """Write a DiT into a graph. Returns its output, and each block's token overflow."""
    inputs, weights, library = writer.inputs, writer.weights, writer.library
    ones = weights.local("ones", np.ones(writer.config.hidden_size, np.float32))
    vectors = writer.ops.split(inputs[CONDITION], 1, writer.config.vectors)  # [rows, 1, D] each
    embed = [weights.whole(name) for name in ("embed.weight", "embed.bias", "pos_embed")]
    (x,) = writer.call(library.get(ends.embed_function), [inputs["x"], inputs[CONDITION], *embed], ["tokens"])
    overflow = []
    norm = Modulated()
    for block in range(writer.config.depth):
        first = 6 * block
        of = dict(zip(norm.inputs, [ones, *vectors[first : first + 3]], strict=True))
        x = write_attention(writer, block, x, norm, of)
        of = dict(zip(norm.inputs, [ones, *vectors[first + 3 : first + 6]], strict=True))
        x, *counted = write_mlp(writer, block, x, norm, of)
        overflow += counted
    final = [weights.whole(name) for name in ("final.weight", "final.bias")]
    (out,) = writer.call(library.get(ends.final_function), [x, ones, *vectors[-2:], *final], ["model_output"])
    return out, overflow


def conditioning_graph(
    config: DiTConfig, weights: Windows, precision: Precision, smoothing: Smoothing | None = None
) -> ir.Model:
    """(timesteps [T], labels [R]) -> modulation [T, R, 6L+2, D] of all pairs, with the factors of smoothing."""
    ops, d, vectors = Ops(), config.hidden_size, config.vectors
    timesteps, labels = (graph_value(spec) for spec in conditioning_inputs())
    angles = ops.Mul(ops.Unsqueeze(timesteps, ops.constant([1])), weights.whole("time.frequencies"))
    sinusoid = ops.Concat(ops.Cos(angles), ops.Sin(angles), axis=1)
    hidden = silu(ops, ops.Gemm(sinusoid, weights.whole("time.0.weight"), weights.whole("time.0.bias"), transB=1))
    t_emb = ops.Gemm(hidden, weights.whole("time.2.weight"), weights.whole("time.2.bias"), transB=1)
    y_emb = ops.Gather(weights.whole("label.table"), labels, axis=0)
    c = ops.Add(ops.Unsqueeze(t_emb, ops.constant([1])), y_emb)  # [T, R, D]
    flat = silu(ops, ops.Reshape(c, ops.constant([-1, d])))
    flat = ops.to_precision(flat, precision)
    # A product for each layer, so that a runtime that casts weights to fp32 holds only one layer's at a time.
    bounds = [*range(0, vectors * d, 6 * d), vectors * d]
    layers = []
    for first, end in itertools.pairwise(bounds):
        weight, bias = (weights.rows(f"adaln.{piece}", first, end) for piece in ("weight", "bias"))
        layers.append(ops.Gemm(flat, weight, bias, transB=1))
    out = ops.to_fp32(ops.Concat(*layers, axis=1), precision)
    ones = weights.local("scale_ones", scale_ones(config))
    out = ops.Add(ops.Reshape(out, ops.constant([-1, vectors, d])), ones)
    factors = modulation_factors(config, smoothing)
    if factors is not None:
        out = ops.Mul(out, weights.local("modulation_factors", factors))
    shape = ops.Concat(ops.Shape(timesteps), ops.Shape(labels), ops.constant([vectors, d]), axis=0)
    (modulation,) = ops.call("", "Reshape", (out, shape), [CONDITION])
    typed(modulation, graph_value(conditioning_outputs(config)[0]))
    return conditioning_model([timesteps, labels], [modulation], ops, weights)
