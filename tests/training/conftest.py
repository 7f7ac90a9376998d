"""Models small enough to train in seconds, with weights at which some gates are open and others closed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dydit.models.config import ModelConfig, Routers
from dydit.models.dit.config import DiTConfig
from dydit.models.dit.model import DiT
from dydit.training.recipe import Recipe

STATIC = DiTConfig(
    hidden_size=32,
    depth=2,
    num_heads=4,
    patch_size=4,
    input_size=16,
    in_channels=1,
    num_classes=10,
    routers=Routers.NONE,
)
DYNAMIC = STATIC.model_copy(update={"routers": Routers.FIRST_ON})


def make_random(config: ModelConfig, seed: int = 0, scale: float = 0.1) -> DiT:
    """A model whose every parameter is random, output layers and routers included."""
    model = DiT(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "pos_embed":
                # Router biases stay small against the weights, so that gates differ over timesteps and tokens.
                routed = any(part in name for part in ("_rate.", "token_selection."))
                spread = (0.0 if name.endswith("bias") else 1.0) if routed else scale
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    return model


def make_recipe(**changes: object) -> Recipe:
    """A static run of a few iterations."""
    values: dict[str, object] = {
        "name": "small",
        "stage": "static",
        "model": STATIC,
        "data": "digits",
        "iterations": 12,
        "batch_size": 8,
        "learning_rate": 1e-3,
        "ema_decay": 0.9,
        "log_every": 3,
        "save_every": 4,
        "ramp_iterations": 6,
        "ramp_hold": 2,
    }
    return Recipe.model_validate({**values, **changes})


@pytest.fixture
def static_config() -> ModelConfig:
    return STATIC


@pytest.fixture
def dynamic_config() -> ModelConfig:
    return DYNAMIC


@pytest.fixture
def randomised() -> Callable[..., DiT]:
    return make_random


@pytest.fixture
def small_recipe() -> Callable[..., Recipe]:
    return make_recipe
