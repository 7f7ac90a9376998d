"""What training minimizes, and the probe that monitors it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dydit.models.dynamic import DynamicModel
from dydit.models.routers import Gating, Masked, Recording, Static
from dydit.models.text import TextRows
from dydit.training.draws import Batch
from dydit.training.gates import GateNoise, GumbelSigmoid, achieved_ratio
from dydit.training.losses import (
    ProcessTensors,
    add_noise,
    detail_loss,
    diffusion_loss,
    flops_loss,
    regression_target,
    relative_detail,
    token_loss,
)
from dydit.training.recipe import Precision, Recipe, Stage
from dydit.training.teacher import Teacher


@dataclass(frozen=True)
class Inputs:
    """A `Batch` on a device. `y`: labels int64 [b], or the texts of a model that they condition."""

    x0: Tensor
    t: Tensor
    y: Tensor | TextRows
    noise: Tensor
    gate_seed: int
    first: int

    @classmethod
    def of(cls, batch: Batch, device: torch.device, texts: bool = False) -> Inputs:
        """A batch on a device. `texts`: whether the model takes captions in place of labels."""

        def put(array: np.ndarray) -> Tensor:
            value = torch.from_numpy(np.ascontiguousarray(array))
            # From pinned memory, copies do not wait for the device.
            return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)

        if texts:
            assert batch.captions is not None, "data without captions"
            y: Tensor | TextRows = TextRows(put(batch.captions.embeddings), put(batch.captions.mask))
        else:
            y = put(batch.labels)
        return cls(put(batch.x0), put(batch.times), y, put(batch.noise), batch.gate_seed, batch.first)


class Objective(nn.Module):
    """The model together with its losses, as one module: one forward is one synchronized step in all processes."""

    def __init__(self, model: DynamicModel, recipe: Recipe, process: ProcessTensors, teacher: Teacher | None = None):
        super().__init__()
        self.model, self.recipe, self.process, self.teacher = model, recipe, process, teacher

    def forward(self, batch: Inputs, iteration: int) -> dict[str, Tensor]:
        """Scalars: `loss`, to be minimised, and its parts."""
        x0, t, noise = batch.x0, batch.t, batch.noise
        x_t = add_noise(self.process, x0, t, noise)

        def diffusion(gating: Gating, teacher: Teacher | None = None) -> dict[str, Tensor]:
            bf16 = self.recipe.precision is Precision.BF16
            with torch.autocast(x_t.device.type, torch.bfloat16, enabled=bf16):
                output = self.model(x_t, t, batch.y, gating)
                taught = {} if teacher is None else {"teacher": teacher.loss(output, x_t, t, batch.y)}
            mse, vb = diffusion_loss(self.process, output, x0, x_t, t, noise)
            return {"mse": mse.mean(), "vb": vb.mean(), **taught}

        if self.recipe.stage is Stage.STATIC:
            parts = diffusion(Static(), self.teacher)
            return {"loss": total(parts), **parts}
        gating = Recording(self._gates(batch, iteration), self.model.config)
        parts = diffusion(gating, self.teacher)
        decisions = gating.decisions()
        ratio = achieved_ratio(self.model.config, decisions)
        parts["flops"] = flops_loss(ratio, self.recipe.target(iteration), self.recipe.flops_weight)
        parts = {"loss": total(parts), **parts, "ratio": ratio.mean()}
        if self.recipe.token_weight:
            parts["token"] = self._token_loss(decisions.tokens, batch)
            parts["loss"] = parts["loss"] + parts["token"]
        if iteration < self.recipe.warmup_iterations:
            parts["complete"] = total(diffusion(Static()))
            parts["loss"] = parts["loss"] + parts["complete"]
        return parts

    def _gates(self, batch: Inputs, iteration: int) -> Gating:
        recipe, config = self.recipe, self.model.config
        rows, factor = slice(batch.first, batch.first + len(batch.x0)), recipe.gate_noise(iteration)
        noise = GateNoise.draw(config, batch.gate_seed, recipe.batch_size, rows, batch.x0.device, factor)
        return GumbelSigmoid(config, noise, recipe.temperature)

    def _token_loss(self, tokens: Tensor, batch: Inputs) -> Tensor:
        target, weight, spread = self.recipe.token_target, self.recipe.token_weight, self.recipe.token_spread
        loss = token_loss(tokens, target, weight, batch.first)
        return loss + detail_loss(tokens, relative_detail(batch.x0), target, spread, weight) if spread else loss


def total(losses: Mapping[str, Tensor]) -> Tensor:
    """The sum of losses, in their order: a scalar."""
    return reduce(torch.add, losses.values())


def compile_model(model: DynamicModel, **options: Any) -> None:
    """Let `torch.compile` compile what the model computes, at its first call; names of weights stay the same.

    It is one graph for each way of running it (dynamic, complete), because gates depend on tensors alone.
    """
    import torch._dynamo.config as dynamo

    # With checkpointing, gates are recorded when a block runs first. Without the setting, each gate splits the graph.
    if hasattr(dynamo, "skip_fwd_side_effects_in_bwd_under_checkpoint"):  # PyTorch 2.9
        dynamo.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    model.compile(**options)


@torch.no_grad()
def probe(model: DynamicModel, batch: Inputs, process: ProcessTensors) -> dict[str, float]:
    """Evaluate the model without gate noise on a fixed batch: mean squared error, FLOPs ratio, token ratio."""
    x0, t, noise = batch.x0, batch.t, batch.noise
    gating = Recording(Masked() if model.config.dynamic else Static(), model.config)
    output = model(add_noise(process, x0, t, noise), t, batch.y, gating)
    target = regression_target(process, x0, t, noise)
    out = {"probe_mse": float((output[:, : x0.shape[1]] - target).square().mean())}
    if model.config.dynamic:
        decisions = gating.decisions()
        per_image = decisions.tokens.mean((0, 2))
        units = decisions.units.cpu().numpy()
        out |= {
            "probe_ratio": float(achieved_ratio(model.config, decisions).mean()),
            **{f"probe_{name}": share for name, share in model.config.units.shares(units).items()},
            "probe_tokens": float(per_image.mean()),
            "probe_tokens_std": float(per_image.std()),
        }
    return out
