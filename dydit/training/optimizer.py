"""The optimizer of a run, and its learning rate."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from dydit.models.dynamic import DynamicModel
from dydit.models.registry import architecture_of
from dydit.training.recipe import LearningRateSchedule, Recipe

FUSED = ("cpu", "cuda")
"""Devices for which AdamW has one kernel for all parameters in every supported version of PyTorch."""


def make_optimizer(model: DynamicModel, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW with two parameter groups. `multiple` in a group scales its learning rate; the routers have their own."""
    routers: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    is_router = architecture_of(recipe.model).is_router
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (routers if is_router(name) else rest).append(parameter)
    groups: list[dict[str, Any]] = [{"params": rest, "multiple": 1.0}]
    if routers:
        groups.append({"params": routers, "multiple": recipe.router_learning_rate})
    return torch.optim.AdamW(
        groups,
        lr=recipe.learning_rate,
        betas=recipe.betas,
        eps=recipe.adam_eps,
        weight_decay=recipe.weight_decay,
        fused=rest[0].device.type in FUSED,
    )


def learning_rate(recipe: Recipe, iteration: int) -> float:
    """The learning rate at an iteration: linear warm-up, then constant or half a cosine down to 1/20 of the peak."""
    peak = recipe.learning_rate * min(1.0, (iteration + 1) / max(1, recipe.learning_rate_warmup))
    if recipe.learning_rate_schedule is LearningRateSchedule.CONSTANT:
        return peak
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * iteration / recipe.iterations)))
