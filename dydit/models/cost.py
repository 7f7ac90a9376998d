"""Multiply-adds of a DiT. One place, used by the training loss, the planner and the reports. No PyTorch here.

A block and image of N tokens costs `4*N*D^2 + 2*N^2*D` in attention and `8*N*D^2` in the MLP (PAPER, "Costs in the
loss"). Both scale linearly with the active heads or channel groups; the MLP also with the share of routed tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dydit.models.config import ModelConfig


def attention_macs(config: ModelConfig) -> int:
    """Multiply-adds of one block's attention for one image, all heads on."""
    n, d = config.tokens, config.hidden_size
    return 4 * n * d * d + 2 * n * n * d


def mlp_macs(config: ModelConfig) -> int:
    """Multiply-adds of one block's MLP for one image, all groups and tokens on."""
    return 8 * config.tokens * config.hidden_size**2


def flops_ratio(config: ModelConfig, heads: Any, groups: Any, tokens: Any) -> Any:
    """F_dyn / F_static of the blocks, the paper's FLOPs ratio of a step.

    `heads`, `groups`: active units per block, [..., L]; `tokens`: share of tokens routed per block, [..., L], in 0..1.
    Works on NumPy arrays and on torch tensors (differentiably); returns [...].
    """
    attention, mlp, units = attention_macs(config), mlp_macs(config), config.num_heads
    dynamic = (heads * (attention / units) + groups * tokens * (mlp / units)).sum(-1)
    return dynamic / (config.depth * (attention + mlp))


def unit_costs(config: ModelConfig, token_ratio: np.ndarray | None = None) -> np.ndarray:
    """Multiply-adds that one active unit adds to a step, [L, 2, H] float64: axis 1 is (heads, groups).

    `token_ratio`: share of tokens that enter each block's MLP, [L]; all of them where it is not given.
    """
    costs = np.empty((config.depth, 2, config.num_heads))
    ratio = np.ones(config.depth) if token_ratio is None else np.asarray(token_ratio, np.float64)
    costs[:, 0] = attention_macs(config) / config.num_heads
    costs[:, 1] = (mlp_macs(config) / config.num_heads * ratio)[:, None]
    return costs


def model_macs(config: ModelConfig) -> int:
    """Multiply-adds of one static forward pass for one image, as the paper counts them.

    Blocks, adaLN projections, embedders, final layer, and 4 per LayerNorm element: 6.07 G for S/2, 23.02 G for B/2 and
    118.69 G for XL/2 at 256 px.
    """
    n, d, depth = config.tokens, config.hidden_size, config.depth
    patch = config.patch_size**2
    blocks = depth * (attention_macs(config) + mlp_macs(config) + 6 * d * d)
    embed = n * patch * config.in_channels * d + 256 * d + d * d
    final = n * d * patch * config.out_channels + 2 * d * d
    norms = 4 * n * d * (2 * depth + 1)
    return blocks + embed + final + norms
