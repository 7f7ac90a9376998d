"""Guidance and the sampler's step as an ONNX local function. It is fp32 in every precision."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from dydit.bundle.stored_weights import Precision
from dydit.diffusion.coefficients import COEFFICIENTS
from dydit.graph.ops import Ops, function
from dydit.models.config import ModelConfig


def sampler_function(config: ModelConfig, precision: Precision, cfg_channels: int) -> ir.Function:
    """Classifier-free guidance and the sampler's formula (`dydit.diffusion.coefficients`).

    The first B rows of the model's output are conditional and the last B unconditional. Without guidance these are the
    same rows, so the guided prediction is the conditional one at any scale.
    """

    def body(
        ops: Ops,
        x: ir.Value,
        history: ir.Value,
        noise: ir.Value,
        coefficients: ir.Value,
        cfg_scale: ir.Value,
        out: ir.Value,
    ) -> Sequence[ir.Value]:
        batch, zero, axis = ops.Shape(x, start=0, end=1), ops.constant([0]), ops.constant([0])
        end = ops.constant([np.iinfo(np.int64).max])

        def channels(value: ir.Value, first: int, last: int) -> ir.Value:
            return ops.Slice(value, ops.constant([first]), ops.constant([last]), ops.constant([1]))

        conditional = ops.Slice(out, zero, batch, axis)
        unconditional = channels(ops.Slice(out, ops.Neg(batch), end, axis), 0, cfg_channels)
        steered = channels(conditional, 0, cfg_channels)
        guided = ops.Add(unconditional, ops.Mul(cfg_scale, ops.Sub(steered, unconditional)))
        if cfg_channels < config.in_channels:
            guided = ops.Concat(guided, channels(conditional, cfg_channels, config.in_channels), axis=1)
        c_x, c_out, c_history, c_noise, slope, offset, d_x, d_out = ops.split(coefficients, 0, len(COEFFICIENTS))
        log_std = offset
        if config.learn_sigma:
            v = channels(conditional, config.in_channels, 2 * config.in_channels)
            log_std = ops.Add(ops.Mul(slope, v), offset)
        drift = ops.Add(ops.Add(ops.Mul(c_x, x), ops.Mul(c_out, guided)), ops.Mul(c_history, history))
        x_prev = ops.Add(drift, ops.Mul(ops.Mul(c_noise, ops.Exp(log_std)), noise))
        return x_prev, ops.Add(ops.Mul(d_x, x), ops.Mul(d_out, guided))

    return function("sampler_step", ["x", "history", "noise", "coefficients", "cfg_scale", "out"], body)
