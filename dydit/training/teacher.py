"""A second model, whose predictions a run learns to reproduce: knowledge distillation (Hinton et al. 2015).

Not in the paper, which fine-tunes on the data alone. The data say which image a noisy one was made from; a teacher says
what a trained model makes of it, which varies far less between draws of the noise.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dydit.checkpoints.checkpoint import load_checkpoint
from dydit.errors import ConfigError
from dydit.files import user_path
from dydit.models.config import ModelConfig
from dydit.models.dynamic import DynamicModel
from dydit.models.text import TextRows
from dydit.training.recipe import Recipe
from dydit.training.start import start_config

SHARED = ("input_size", "in_channels", "num_classes", "null_class", "text")
"""Fields that are equal in models that take the same inputs."""
STATED = ("class_names", "space")
"""Fields that are equal in such models where both state them."""


class Teacher:
    """A model that is not trained. It is no module, so that neither states nor the optimizer hold its weights."""

    def __init__(self, model: DynamicModel, weight: float):
        self.model, self.weight = model.eval().requires_grad_(False), weight

    @classmethod
    def of(cls, recipe: Recipe, device: torch.device) -> Teacher | None:
        """The teacher of a recipe on a device; None if it has none. Every process has all of its weights.

        Raises `CheckpointError` if it is unusable, and `ConfigError` if it does not take the inputs of the model.
        """
        if recipe.teacher is None:
            return None
        teacher_config(recipe)
        return cls(load_checkpoint(user_path(Path(recipe.teacher))).model().to(device), recipe.teacher_weight)

    @torch.no_grad()
    def loss(self, output: Tensor, x_t: Tensor, t: Tensor, y: Tensor | TextRows) -> Tensor:
        """`weight * mean (prediction - prediction of the teacher)^2`, a scalar with a gradient.

        output [b, C or 2C, S, S] of the model for x_t [b, C, S, S], t [b] and y. A learned variance has no part in it.
        """
        channels = x_t.shape[1]
        taught = self.model(x_t, t, y)[:, :channels].float()
        with torch.enable_grad():
            return self.weight * (output[:, :channels].float() - taught).square().mean()


def teacher_config(recipe: Recipe) -> ModelConfig | None:
    """The configuration of the teacher of a recipe; None if it has none.

    Raises `CheckpointError` if it is unusable, and `ConfigError` if it takes other inputs than the model, or predicts
    something else.
    """
    if recipe.teacher is None:
        return None
    teacher, model = start_config(recipe.teacher, None), recipe.model
    for name in (*SHARED, *STATED):
        theirs, ours = getattr(teacher, name, None), getattr(model, name, None)
        if theirs != ours and not (name in STATED and None in (theirs, ours)):
            raise ConfigError(f"teacher {recipe.teacher} does not fit the model: {name} {theirs}, not {ours}")
    if teacher.diffusion != model.diffusion:
        raise ConfigError(
            f"teacher {recipe.teacher} was trained in another way than recipe {recipe.name} trains: "
            f"{teacher.diffusion.words}, not {model.diffusion.words}"
        )
    return teacher
