"""Multiply-adds of a model, for the training loss, the planner and the reports. No PyTorch here.

The architecture says how many multiply-adds a unit has (`UnitGroup.macs`). They count in each step in which the unit is
on. If its group is routed, they are multiplied by the share of tokens that the block's router selects.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dydit.models.config import ModelConfig


def flops_ratio(config: ModelConfig, counts: Any, tokens: Any) -> Any:
    """F_dyn / F_static of the blocks, the paper's FLOPs ratio of a step (section 3.3).

    `counts`: active units of each part, [..., P]; `tokens`: share of tokens routed per block, [..., L], in 0..1.
    Works on NumPy arrays and on torch tensors (differentiably); returns [...].
    """
    parts = config.units.parts
    costs = np.array([part.group.macs for part in parts], np.float64)
    routed = np.array([part.group.routed for part in parts])
    blocks = [part.block for part in parts]
    whole, shared = costs * ~routed, costs * routed
    if hasattr(counts, "new_tensor"):
        whole, shared = (tokens.new_tensor(each) for each in (whole, shared))
    dynamic = (counts * whole + counts * tokens[..., blocks] * shared).sum(-1)
    return dynamic / float(config.units.per_unit().sum())


def unit_costs(config: ModelConfig, token_ratio: np.ndarray | None = None) -> np.ndarray:
    """Multiply-adds that one active unit adds to a step, [U] float64.

    `token_ratio`: share of tokens that enter each block's MLP, [L]; by default 1.
    """
    axis = config.units
    if token_ratio is None:
        return axis.per_unit()
    share = np.array([token_ratio[part.block] if part.group.routed else 1.0 for part in axis.parts])
    return axis.per_unit() * axis.spread(share)


def static_macs(config: ModelConfig) -> float:
    """Multiply-adds of all blocks for one image with every unit and token on."""
    return float(config.units.per_unit().sum())
