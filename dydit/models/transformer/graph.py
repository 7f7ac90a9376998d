"""Calls of a block's functions (`dydit.models.transformer.blocks`) with a subnetwork's weights, and patches."""

from __future__ import annotations

import onnx_ir as ir

from dydit.bundle.io_spec import residual_name, token_mask_name
from dydit.bundle.manifest import Routing
from dydit.graph.ops import Ops
from dydit.graph.writer import GraphWriter
from dydit.models.architecture import stored_name
from dydit.models.routers import TOKEN_ROUTER
from dydit.models.transformer import blocks
from dydit.models.transformer.config import TransformerConfig
from dydit.models.transformer.norms import BranchNorm, Named


def write_attention(writer: GraphWriter, block: int, x: ir.Value, norm: BranchNorm, of: Named) -> ir.Value:
    """x after the attention of a block. `of`: what `norm` reads, by name."""
    part, slots = writer.part(block, 0)
    names = [stored_name(block, "attended")]
    if not slots:
        bias, joining = writer.weights.whole(part.stored("proj.bias")), [of[name] for name in norm.joining]
        return writer.call(writer.library.get(blocks.attention_none_function, norm), [x, *joining, bias], names)[0]
    heads, fp16_layers = writer.count(slots), writer.fp16_layers(part)
    zeros = blocks.attention_padding(writer.config, writer.library.precision, heads, fp16_layers)
    gates, layers = writer.gates(part, slots), writer.layers(part, slots, zeros)
    function = writer.library.get(blocks.attention_function, norm, heads, bool(gates), fp16_layers)
    return writer.call(function, [x, *(of[name] for name in norm.inputs), *layers, *gates], names)[0]


def write_mlp(writer: GraphWriter, block: int, x: ir.Value, norm: BranchNorm, of: Named) -> list[ir.Value]:
    """x after the MLP of a block and, with capacity routing, the overflow. `of`: what `norm` reads, by name."""
    part, slots = writer.part(block, 1)
    routing = writer.spec.routing
    capacity = routing is Routing.CAPACITY
    router = [writer.weights.whole(part.stored(piece)) for piece in TOKEN_ROUTER] if routing else []
    names = [residual_name(block), *([token_mask_name(block)] if routing else [])]
    if not slots:
        bias, joining = writer.weights.whole(part.stored("fc2.bias")), [of[name] for name in norm.joining]
        function = writer.library.get(blocks.mlp_none_function, norm, bool(routing))
        x, *_ = writer.call(function, [x, *joining, bias, *router], names)
        return [x, *([writer.ops.constant([0])] if capacity else [])]
    gates, layers = writer.gates(part, slots), writer.layers(part, slots)
    arguments = [x, *(of[name] for name in norm.inputs), *layers, *router]
    if capacity:
        assert writer.spec.capacities is not None
        arguments.append(writer.ops.constant([writer.spec.capacities[block]]))
        names.append(stored_name(block, "overflow"))
    factors = writer.factors(part, slots)
    function = writer.library.get(
        blocks.mlp_function, norm, routing, bool(gates), bool(factors), writer.fp16_layers(part)
    )
    x, *extra = writer.call(function, [*arguments, *gates, *factors], names)
    return [x, *(extra[1:] if capacity else [])]


def patch_tokens(
    ops: Ops, config: TransformerConfig, x: ir.Value, weight: ir.Value, bias: ir.Value, position: ir.Value
) -> ir.Value:
    """Latents [B, C, S, S] to tokens [B, patches, D]: patches, projection, position."""
    side, p, c = config.side, config.patch_size, config.in_channels
    patches = ops.Reshape(x, ops.constant([-1, c, side, p, side, p]))
    patches = ops.Transpose(patches, perm=[0, 2, 4, 1, 3, 5])  # [B, side, side, C, p, p]
    tokens = ops.Gemm(ops.Reshape(patches, ops.constant([-1, c * p * p])), weight, bias)
    return ops.Add(ops.Reshape(tokens, ops.constant([-1, config.patches, config.hidden_size])), position)


def for_rows(ops: Ops, tokens: ir.Value, condition: ir.Value) -> ir.Value:
    """Tokens [B, ...] for the rows of a condition: two copies, if rows = 2B.

    Two copies are cut to the number of rows. With Tile by a computed count, TensorRT loses the bound on the size.
    """
    rows = ops.Shape(condition, start=0, end=1)
    return ops.Slice(ops.Concat(tokens, tokens, axis=0), ops.constant([0]), rows, ops.constant([0]))


def images(ops: Ops, config: TransformerConfig, patches: ir.Value) -> ir.Value:
    """Output patches, [rows*patches, p*p*C], as images [rows, C, S, S]."""
    side, p, c = config.side, config.patch_size, config.out_channels
    split = ops.Reshape(patches, ops.constant([-1, side, side, p, p, c]))
    image = ops.Transpose(split, perm=[0, 5, 1, 3, 2, 4])
    return ops.Reshape(image, ops.constant([-1, c, config.input_size, config.input_size]))
