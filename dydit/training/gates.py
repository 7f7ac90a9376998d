"""The gates of a dynamic run: noise on the routers' logits, drawn before the model runs.

The noise is a function of a seed and of an image's position in the batch of all processes. So any number of processes,
micro-batches and recomputed blocks has the same gates.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from dydit.models.config import ModelConfig
from dydit.models.routers import Decisions, Gating, Masked, TokenRouter, WidthRouter

_AT_INFERENCE = Masked()


@dataclass(frozen=True)
class GateNoise:
    """Noise of the gates of b images, fp32: `units` [b, U], along the axis of units, and `tokens` [L, b, N].

    Each number is the difference of two Gumbel variables, which is Logistic(0, 1): log u - log(1 - u), times a factor.
    """

    units: Tensor
    tokens: Tensor

    @classmethod
    def draw(
        cls, config: ModelConfig, seed: int, batch: int, rows: slice, device: torch.device, factor: float = 1.0
    ) -> GateNoise:
        """The noise of images `rows` of a batch. It is drawn for the whole batch, on the device."""
        generator = torch.Generator(device).manual_seed(seed)
        sizes = (batch, config.units.size), (batch, config.depth, config.tokens)
        drawn = [torch.rand(size, generator=generator, device=device)[rows] for size in sizes]
        units, tokens = (factor * torch.logit(each, eps=1e-7) for each in drawn)
        return cls(units, tokens.transpose(0, 1))


class GumbelSigmoid(Gating):
    """Training: 1 if sigmoid((logit + noise)/tau) > 0.5, otherwise 0, with the gradient of the sigmoid.

    The difference of two Gumbel variables is the noise of the paper; noise of 0 gives the gates of inference.

    Noise flips gates whose logits are near 0, so a model that meets its target while noisy may miss it without.
    Annealing the noise at the end of training closes that gap. Gradients stay those of the sigmoid. Routers that are
    not trained decide as at inference.
    """

    def __init__(self, config: ModelConfig, noise: GateNoise, temperature: float):
        self.noise, self.temperature = noise, temperature
        self.slices = {(part.block, part.index): part.units for part in config.units.parts}

    def units(self, block: int, group: int, router: WidthRouter | None, t_emb: Tensor) -> Tensor | None:
        if router is None or router.fixed:
            return _AT_INFERENCE.units(block, group, router, t_emb)
        return noisy_gates(router(t_emb), self.noise.units[:, self.slices[block, group]], self.temperature)

    def tokens(self, block: int, router: TokenRouter | None, x: Tensor) -> Tensor | None:
        if router is None or router.fixed:
            return _AT_INFERENCE.tokens(block, router, x)
        noise = self.noise.tokens[block]
        # A router that decides once for an image has one logit, and takes the noise of the first token.
        return router.gated(x, lambda logits: noisy_gates(logits, noise[:, : logits.shape[1]], self.temperature))


def noisy_gates(logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """Gates of the shape of the logits: 1 where logit + noise > 0, else 0, with the gradient of the sigmoid."""
    # A unit that is always on has the logit +inf.
    noisy = logits.float() + noise
    soft = torch.sigmoid(noisy / temperature)
    hard = (noisy > 0).to(soft.dtype)
    return (hard - soft.detach() + soft).to(logits.dtype)


@lru_cache(maxsize=4)
def _costs(config: ModelConfig, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Each part's share of the static model's multiply-adds, by whether tokens are routed, f32 [P] each; its block."""
    whole = float(config.units.per_unit().sum())
    parts = config.units.parts
    shares = [[part.group.macs / whole * (part.group.routed is routed) for part in parts] for routed in (False, True)]
    complete, routed = (torch.tensor(share, dtype=torch.float32, device=device) for share in shares)
    return complete, routed, torch.tensor([part.block for part in parts], device=device)


def achieved_ratio(config: ModelConfig, decisions: Decisions) -> Tensor:
    """The FLOPs ratio of each image (`dydit.models.macs.flops_ratio`), [B]; differentiable."""
    complete, routed, blocks = _costs(config, decisions.units.device)
    sizes = [part.group.count for part in config.units.parts]
    counts = torch.stack([gates.sum(-1) for gates in decisions.units.split(sizes, dim=-1)], dim=-1)
    tokens = decisions.tokens.mean(-1).T.index_select(1, blocks)
    return (counts * (complete + tokens * routed)).sum(-1)
