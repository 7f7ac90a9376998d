"""The ends of a subnetwork as ONNX local functions: latents to tokens, tokens to latents, and the step of the sampler.

All in fp32, in every precision. Shapes as in `dydit.export.blocks`.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dydit.export.blocks import Values, flat, modulate
from dydit.export.ops import Ops, function
from dydit.models.config import ModelConfig


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
        out = ops.Gemm(flat(ops, modulate(ops, x, ones, shift, scale)), weight, bias, transB=1)
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
