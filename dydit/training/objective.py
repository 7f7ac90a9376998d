"""What training minimizes, and the probe that monitors it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from dydit.models.dynamic import DynamicModel
from dydit.models.routers import Gating, Masked, Recording, Static
from dydit.training.draws import Batch
from dydit.training.losses import (
    AnnealedGumbelSigmoid,
    ProcessTensors,
    achieved_ratio,
    add_noise,
    detail_loss,
    diffusion_loss,
    flops_loss,
    regression_target,
    relative_detail,
    token_loss,
)
from dydit.training.recipe import Recipe, Stage


class Objective(nn.Module):
    """The model together with its losses, as one module: one forward is one synchronized step in all processes."""

    def __init__(self, model: DynamicModel, recipe: Recipe, process: ProcessTensors):
        super().__init__()
        self.model, self.recipe, self.process = model, recipe, process

    def forward(
        self, x0: Tensor, t: Tensor, y: Tensor, noise: Tensor, gate_seed: int, iteration: int
    ) -> dict[str, Tensor]:
        """Scalars: `loss`, to be minimised, and its parts. x0, noise [b, C, S, S], t and y [b]."""
        x_t = add_noise(self.process, x0, t, noise)

        def diffusion(gating: Gating) -> tuple[Tensor, Tensor]:
            return diffusion_loss(self.process, self.model(x_t, t, y, gating), x0, x_t, t, noise)

        if self.recipe.stage is Stage.STATIC:
            mse, vb = (part.mean() for part in diffusion(Static()))
            return {"loss": mse + vb, "mse": mse, "vb": vb}
        generator = torch.Generator(x0.device).manual_seed(gate_seed)
        gumbel = AnnealedGumbelSigmoid(generator, self.recipe.temperature, self.recipe.gate_noise(iteration))
        gating = Recording(gumbel, self.model.config)
        mse, vb = (part.mean() for part in diffusion(gating))
        ratio = achieved_ratio(self.model.config, gating.decisions())
        flops = flops_loss(ratio, self.recipe.target(iteration), self.recipe.flops_weight)
        parts = {"loss": mse + vb + flops, "mse": mse, "vb": vb, "flops": flops, "ratio": ratio.mean()}
        if self.recipe.token_weight:
            parts["token"] = self._token_loss(gating.decisions().tokens, x0)
            parts["loss"] = parts["loss"] + parts["token"]
        if iteration < self.recipe.warmup_iterations:
            whole = diffusion(Static())
            parts["complete"] = (whole[0] + whole[1]).mean()
            parts["loss"] = parts["loss"] + parts["complete"]
        return parts

    def _token_loss(self, tokens: Tensor, x0: Tensor) -> Tensor:
        target, weight, spread = self.recipe.token_target, self.recipe.token_weight, self.recipe.token_spread
        loss = token_loss(tokens, target, weight)
        return loss + detail_loss(tokens, relative_detail(x0), target, spread, weight) if spread else loss


def tensors(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A batch on a device: x0, times, labels, noise."""
    arrays = (batch.x0, batch.times, batch.labels, batch.noise)
    x0, t, y, noise = (torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in arrays)
    return x0, t, y, noise


@torch.no_grad()
def probe(model: DynamicModel, batch: Batch, process: ProcessTensors) -> dict[str, float]:
    """Evaluate the model without gate noise on a fixed batch: mean squared error, FLOPs ratio, token ratio."""
    x0, t, y, noise = tensors(batch, next(model.parameters()).device)
    gating = Recording(Masked() if model.config.dynamic else Static(), model.config)
    output = model(add_noise(process, x0, t, noise), t, y, gating)
    target = regression_target(process, x0, t, noise)
    out = {"probe_mse": float((output[:, : x0.shape[1]] - target).square().mean())}
    if model.config.dynamic:
        decisions = gating.decisions()
        per_image = decisions.tokens.mean((0, 2))
        out |= {
            "probe_ratio": float(achieved_ratio(model.config, decisions).mean()),
            **{f"probe_{name}": share for name, share in model.config.units.shares(decisions.units.numpy()).items()},
            "probe_tokens": float(per_image.mean()),
            "probe_tokens_std": float(per_image.std()),
        }
    return out
