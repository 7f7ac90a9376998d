"""The local functions of one model, made when first asked for and shared by all of its graphs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import onnx_ir as ir

from dydit.bundle.stored import Precision
from dydit.export import blocks, ends
from dydit.export.ops import Ops
from dydit.models.config import ModelConfig


class FunctionLibrary:
    """Each method gives the function of one kind of block or end; arguments as those of the writers' functions."""

    def __init__(self, config: ModelConfig, cfg_channels: int, precision: Precision = Precision.FP32):
        self.config, self.cfg_channels, self.precision = config, cfg_channels, precision
        self.attention = cache(
            lambda heads, gated, kept=(): blocks.attention_function(config, heads, gated, precision, kept)
        )
        self.attention_none = cache(lambda: blocks.attention_none_function(precision))
        self.mlp = cache(
            lambda routing, gated, factored, kept=(): blocks.mlp_function(
                config, routing, gated, precision, factored, kept
            )
        )
        self.mlp_none = cache(lambda routed: blocks.mlp_none_function(routed, precision))
        self.embed = cache(lambda: ends.embed_function(config))
        self.final = cache(lambda: ends.final_function(config))
        self.sampler = cache(lambda: ends.sampler_function(config, cfg_channels))


def call(ops: Ops, target: ir.Function, inputs: Sequence[ir.Value], outputs: Sequence[str]) -> Sequence[ir.Value]:
    """Call a local function from the main graph, naming its outputs."""
    return ops.call(target.domain, target.name, inputs, outputs)
