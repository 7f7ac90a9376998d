"""The first and last part of a subnetwork as ONNX local functions: latents to tokens, and tokens to the output.

Both are fp32 in every precision. Shapes as in `dydit.models.dit.blocks`.
"""

from __future__ import annotations

import onnx_ir as ir

from dydit.bundle.stored_weights import Precision
from dydit.graph.ops import Ops, function
from dydit.models.dit.blocks import Values, flat, modulate
from dydit.models.dit.config import DiTConfig


def embed_function(config: DiTConfig, precision: Precision) -> ir.Function:
    """Latents [B, C, S, S] to tokens [rows, N, D]: patches, projection, position. Repeated if rows = 2B."""
    side, p, c = config.input_size // config.patch_size, config.patch_size, config.in_channels

    def body(
        ops: Ops, x: ir.Value, modulation: ir.Value, weight: ir.Value, bias: ir.Value, position: ir.Value
    ) -> Values:
        patches = ops.Reshape(x, ops.constant([-1, c, side, p, side, p]))
        patches = ops.Transpose(patches, perm=[0, 2, 4, 1, 3, 5])  # [B, side, side, C, p, p]
        tokens = ops.Gemm(ops.Reshape(patches, ops.constant([-1, c * p * p])), weight, bias)
        tokens = ops.Add(ops.Reshape(tokens, ops.constant([-1, config.tokens, config.hidden_size])), position)
        # Two copies, cut to the number of rows. With Tile by a computed count, TensorRT loses the bound on the size.
        rows = ops.Shape(modulation, start=0, end=1)
        return (ops.Slice(ops.Concat(tokens, tokens, axis=0), ops.constant([0]), rows, ops.constant([0])),)

    return function("embed", ["x", "condition", "weight", "bias", "position"], body)


def final_function(config: DiTConfig, precision: Precision) -> ir.Function:
    """Tokens [rows, N, D] to the model's output [rows, C or 2C, S, S]."""
    side, p, c = config.input_size // config.patch_size, config.patch_size, config.out_channels

    def body(
        ops: Ops, x: ir.Value, ones: ir.Value, shift: ir.Value, scale: ir.Value, weight: ir.Value, bias: ir.Value
    ) -> Values:
        out = ops.Gemm(flat(ops, modulate(ops, x, ones, shift, scale)), weight, bias, transB=1)
        patches = ops.Reshape(out, ops.constant([-1, side, side, p, p, c]))
        image = ops.Transpose(patches, perm=[0, 5, 1, 3, 2, 4])
        return (ops.Reshape(image, ops.constant([-1, c, config.input_size, config.input_size])),)

    return function("final", ["x", "ones", "shift", "scale", "weight", "bias"], body)
