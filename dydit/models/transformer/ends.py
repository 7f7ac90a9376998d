"""The first and last part of a subnetwork with adaLN: latents to tokens, and tokens to the output, as ONNX functions.

Both are fp32 in every precision. Shapes as in `dydit.models.transformer.blocks`.
"""

from __future__ import annotations

import onnx_ir as ir

from dydit.bundle.stored_weights import Precision
from dydit.graph.ops import Ops, function
from dydit.models.transformer.blocks import Values, flat
from dydit.models.transformer.config import TransformerConfig
from dydit.models.transformer.graph import for_rows, images, patch_tokens
from dydit.models.transformer.norms import Modulated, modulate


def embed_function(config: TransformerConfig, precision: Precision) -> ir.Function:
    """Latents [B, C, S, S] to tokens [rows, N, D]: patches, projection, position. Repeated if rows = 2B."""

    def body(ops: Ops, x: ir.Value, modulation: ir.Value, *weights: ir.Value) -> Values:
        return (for_rows(ops, patch_tokens(ops, config, x, *weights), modulation),)

    return function("embed", ["x", "condition", "weight", "bias", "position"], body)


def final_function(config: TransformerConfig, precision: Precision) -> ir.Function:
    """Tokens [rows, N, D] to the model's output [rows, C or 2C, S, S]."""

    def body(
        ops: Ops, x: ir.Value, ones: ir.Value, shift: ir.Value, scale: ir.Value, weight: ir.Value, bias: ir.Value
    ) -> Values:
        tokens = flat(ops, modulate(ops, x, ones, shift, scale, Modulated.EPSILON), config.hidden_size)
        return (images(ops, config, ops.Gemm(tokens, weight, bias, transB=1)),)

    return function("final", ["x", "ones", "shift", "scale", "weight", "bias"], body)
