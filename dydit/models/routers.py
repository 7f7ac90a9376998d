"""The routers of DyDiT (section 3), and the named ways of turning their logits into gates.

TDW (timestep-based dynamic width) decides heads and channel groups from the timestep embedding; SDT (spatial-wise
dynamic token) decides, from the residual stream, which tokens enter the MLP. A `Gating` turns logits into gates; the
model calls it and knows nothing of how.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dydit.models.config import ModelConfig, Routers

TOKEN_ROUTER = ("router.0.weight", "router.0.bias", "router.2.weight", "router.2.bias")
"""The stored tensors of a token router, within its block."""


class WidthRouter(nn.Module):
    """TDW: one logit per unit of a group from what `DynamicModel.embed_timestep` gives: [B, D] -> [B, units].

    `Linear(D, units)`; with `Routers.FIRST_ON` `Linear(D, units - 1)`, and +inf for unit 0.
    """

    def __init__(self, config: ModelConfig, units: int):
        super().__init__()
        self.first_on = config.routers is Routers.FIRST_ON
        self.router = nn.Linear(config.hidden_size, units - self.first_on)

    def forward(self, t_emb: Tensor) -> Tensor:
        logits = self.router(t_emb)
        return F.pad(logits, (1, 0), value=torch.inf) if self.first_on else logits


class TokenRouter(nn.Module):
    """SDT: `Linear(D, D/16), ReLU, Linear(D/16, 1)` on tokens [B, N, D]; gives logits [B, N]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        hidden = config.token_router_hidden
        self.mlp_head = nn.Sequential(nn.Linear(config.hidden_size, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp_head(x).squeeze(-1)


class Gating:
    """How gates are made. Each method returns a float gate, or None for "everything on, multiply nothing"."""

    def units(self, block: int, group: int, router: WidthRouter | None, t_emb: Tensor) -> Tensor | None:
        """Gates of a block's unit group (`dydit.models.architecture`), by its index: [B, units]."""
        return None if router is None else self.gate(router(t_emb))

    def tokens(self, block: int, router: TokenRouter | None, x: Tensor) -> Tensor | None:
        """Gates of tokens, [B, N], from the residual stream x [B, N, D] after attention."""
        return None if router is None else self.gate(router(x))

    def gate(self, logits: Tensor) -> Tensor:
        """Logits to gates of the same shape."""
        raise NotImplementedError


class Static(Gating):
    """The complete model: routers are ignored."""

    def units(self, block: int, group: int, router: WidthRouter | None, t_emb: Tensor) -> None:
        return None

    def tokens(self, block: int, router: TokenRouter | None, x: Tensor) -> None:
        return None


class Masked(Gating):
    """Inference: exactly 1 where the logit is above 0, else exactly 0. Decided in fp32 on the logit."""

    def gate(self, logits: Tensor) -> Tensor:
        return (logits.float() > 0).to(logits.dtype)


class GumbelSigmoid(Gating):
    """Training: 1 where sigmoid((logit + G1 - G2)/tau) > 0.5, G Gumbel(0, 1); the gradient is the sigmoid's.

    `generator` makes the noise, so that a run can be repeated bit for bit.
    """

    def __init__(self, generator: torch.Generator, temperature: float = 5.0):
        self.generator, self.temperature = generator, temperature

    def gate(self, logits: Tensor) -> Tensor:
        # G1 - G2 of two Gumbels is Logistic(0, 1): log u - log(1-u). An always-on unit has logit +inf and stays on.
        uniform = torch.rand(logits.shape, generator=self.generator, device=logits.device)
        soft = torch.sigmoid((logits.float() + torch.logit(uniform, eps=1e-7)) / self.temperature)
        hard = (soft > 0.5).to(soft.dtype)
        return (hard - soft.detach() + soft).to(logits.dtype)


@dataclass
class Decisions:
    """The gates that one forward pass used: of units [B, U], of tokens by block [L, B, N]."""

    units: Tensor
    tokens: Tensor


@dataclass
class Recording(Gating):
    """Wraps a gating and keeps what it decided, for `decisions()` after the pass; what was not gated counts as 1."""

    inner: Gating
    config: ModelConfig
    _units: dict[tuple[int, int], Tensor | None] = field(default_factory=dict)
    _tokens: dict[int, Tensor | None] = field(default_factory=dict)
    _batch: int = 0

    def units(self, block: int, group: int, router: WidthRouter | None, t_emb: Tensor) -> Tensor | None:
        self._batch = t_emb.shape[0]
        self._units[block, group] = gates = self.inner.units(block, group, router, t_emb)
        return gates

    def tokens(self, block: int, router: TokenRouter | None, x: Tensor) -> Tensor | None:
        self._tokens[block] = gates = self.inner.tokens(block, router, x)
        return gates

    def decisions(self) -> Decisions:
        """The recorded gates; gradients flow through them."""
        parts = self.config.units.parts
        units = [self._or_ones(self._units.get((part.block, part.index)), part.group.count) for part in parts]
        tokens = [self._or_ones(self._tokens.get(block), self.config.tokens) for block in range(self.config.depth)]
        return Decisions(torch.cat(units, dim=1), torch.stack(tokens))

    def _or_ones(self, gates: Tensor | None, width: int) -> Tensor:
        return torch.ones(self._batch, width) if gates is None else gates
