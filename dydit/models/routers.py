"""The routers of DyDiT (section 3 of the paper), and classes that turn their logits into gates.

TDW (timestep-wise dynamic width) decides heads and channel groups from the timestep embedding. SDT (spatial-wise
dynamic token) decides, from the residual stream, which tokens enter the MLP. A `Gating` turns logits into gates, so the
model does not depend on how that is done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dydit.models.architecture import Slots
from dydit.models.config import ModelConfig, Routers, TokenScope

OPEN = 100.0
"""The logits of routers that are fixed open: far above what the noise of training gates subtracts."""
TOKEN_ROUTER = ("router.0.weight", "router.0.bias", "router.2.weight", "router.2.bias")
"""The stored tensors of a token router, within its block. Every block of a dynamic model has them."""


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Turns mixed precision off where it would round decisions: routers and what they read are fp32 in training."""
    # Tensors without memory ("meta") have no autocast.
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


class WidthRouter(nn.Module):
    """TDW: one logit per unit of a group, from the output of `DynamicModel.embed_timestep`: [B, D] -> [B, units].

    `Linear(D, units)`. With `Routers.FIRST_ON`, `Linear(D, units - 1)`, and the logit of unit 0 is +inf.
    """

    def __init__(self, config: ModelConfig, units: int):
        super().__init__()
        self.first_on = config.routers is Routers.FIRST_ON
        self.router = nn.Linear(config.hidden_size, units - self.first_on)

    @torch.no_grad()
    def open(self) -> None:
        """Turn every unit on at all timesteps."""
        self.router.weight.zero_()
        self.router.bias.fill_(OPEN)

    @property
    def fixed(self) -> bool:
        """Whether the router is excluded from training."""
        return not self.router.weight.requires_grad

    def forward(self, t_emb: Tensor) -> Tensor:
        with without_autocast(t_emb):
            logits = self.router(t_emb)
        return F.pad(logits, (1, 0), value=torch.inf) if self.first_on else logits


def width_router_rows(
    config: ModelConfig, routers: Sequence[tuple[Tensor, Tensor]], order: Slots
) -> tuple[Tensor, Tensor]:
    """All width routers as one layer, stored as `WIDTH_ROUTER`: f32 [U, D] and [U], with a row for each unit, by slot.

    `routers`: weight and bias of the router of each part (`UnitAxis.parts`). Unit 0 of `Routers.FIRST_ON`, which has no
    row, gets one of zeros and the bias 1, so that its logit is above 0 at any time.
    """
    first_on = config.routers is Routers.FIRST_ON
    weights, biases = [], []
    for (weight, bias), (_, units) in zip(routers, config.units.zip(order), strict=True):
        weight, bias = weight.detach().float(), bias.detach().float()
        if first_on:
            weight, bias = F.pad(weight, (0, 0, 1, 0)), F.pad(bias, (1, 0), value=1.0)
        weights.append(weight[list(units)])
        biases.append(bias[list(units)])
    return torch.cat(weights), torch.cat(biases)


class TokenRouter(nn.Module):
    """SDT: `Linear(D, D/16), ReLU, Linear(D/16, 1)` on tokens: [B, N, D] -> logits [B, N].

    The logits of `ModelConfig.extra_tokens` are +inf. With `TokenScope.LAYER`, all others are their mean.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        hidden, self.always = config.token_router_hidden, config.extra_tokens
        self.together = config.token_scope is TokenScope.LAYER
        self.mlp_head = nn.Sequential(nn.Linear(config.hidden_size, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    @torch.no_grad()
    def open(self) -> None:
        """Let every token pass."""
        for parameter in self.parameters():
            parameter.zero_()
        self.mlp_head[2].bias.fill_(OPEN)

    @property
    def fixed(self) -> bool:
        """Whether the router is excluded from training."""
        return not self.mlp_head[2].weight.requires_grad

    def forward(self, x: Tensor) -> Tensor:
        return self._of_all(self._logits(x), x, torch.inf)

    def gated(self, x: Tensor, gate: Callable[[Tensor], Tensor]) -> Tensor:
        """The gates [B, N] of tokens. `gate` turns logits into gates, once for an image with `TokenScope.LAYER`."""
        return self._of_all(gate(self._logits(x)), x, 1.0) if self.together else gate(self(x))

    def _logits(self, x: Tensor) -> Tensor:
        """One logit for each token that is not always routed, or for an image."""
        with without_autocast(x):
            logits = self.mlp_head(x[:, self.always :]).squeeze(-1)
        return logits.mean(1, keepdim=True) if self.together else logits

    def _of_all(self, values: Tensor, x: Tensor, always: float) -> Tensor:
        """A value for every token [B, N], which is `always` for those that are always routed."""
        values = values.expand(-1, x.shape[1] - self.always)
        return F.pad(values, (self.always, 0), value=always) if self.always else values


class Gating:
    """Turns logits into gates. Each method returns float gates, or None: everything is on, nothing is multiplied."""

    def units(self, block: int, group: int, router: WidthRouter | None, t_emb: Tensor) -> Tensor | None:
        """Gates of a block's unit group (`dydit.models.architecture`), by index of the group: [B, units]."""
        return None if router is None else self.gate(router(t_emb))

    def tokens(self, block: int, router: TokenRouter | None, x: Tensor) -> Tensor | None:
        """Gates of tokens, [B, N], from the residual stream x [B, N, D] after attention."""
        return None if router is None else router.gated(x, self.gate)

    def gate(self, logits: Tensor) -> Tensor:
        """Logits to gates of the same shape."""
        raise NotImplementedError


class Static(Gating):
    """The complete model. Routers are ignored."""

    def units(self, block: int, group: int, router: WidthRouter | None, t_emb: Tensor) -> None:
        return None

    def tokens(self, block: int, router: TokenRouter | None, x: Tensor) -> None:
        return None


class Masked(Gating):
    """Inference: exactly 1 if the logit, in fp32, is above 0, otherwise exactly 0."""

    def gate(self, logits: Tensor) -> Tensor:
        return (logits.float() > 0).to(logits.dtype)


@dataclass
class Decisions:
    """The gates of one forward pass: of units [B, U], and of tokens [L, B, N]."""

    units: Tensor
    tokens: Tensor


class Recording(Gating):
    """Wraps a gating and records its gates, for `decisions()` after the pass. Without a gate, 1 is recorded.

    It is no dataclass, because FSDP copies a dataclass that holds tensors, so that records would be lost.
    """

    def __init__(self, inner: Gating, config: ModelConfig):
        self.inner, self.config = inner, config
        self._units: dict[tuple[int, int], Tensor | None] = {}
        self._tokens: dict[int, Tensor | None] = {}
        self._ones: Tensor | None = None

    def units(self, block: int, group: int, router: WidthRouter | None, t_emb: Tensor) -> Tensor | None:
        self._ones = t_emb.new_ones(t_emb.shape[0], 1)
        self._units[block, group] = gates = self.inner.units(block, group, router, t_emb)
        return gates

    def tokens(self, block: int, router: TokenRouter | None, x: Tensor) -> Tensor | None:
        self._tokens[block] = gates = self.inner.tokens(block, router, x)
        return gates

    def decisions(self) -> Decisions:
        """The recorded gates. Gradients flow through them."""
        parts = self.config.units.parts
        units = [self._or_ones(self._units.get((part.block, part.index)), part.group.count) for part in parts]
        tokens = [self._or_ones(self._tokens.get(block), self.config.tokens) for block in range(self.config.depth)]
        return Decisions(torch.cat(units, dim=1), torch.stack(tokens))

    def _or_ones(self, gates: Tensor | None, width: int) -> Tensor:
        if gates is not None:
            return gates
        assert self._ones is not None, "no pass was recorded"
        return self._ones.expand(-1, width)
