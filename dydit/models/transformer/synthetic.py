"""Routers of random models (`dydit.models.synthetic`): they pass a share of units and tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dydit.diffusion.process import TRAIN_STEPS
from dydit.models.config import Routers
from dydit.models.dynamic import DynamicModel
from dydit.models.routers import Masked, TokenRouter
from dydit.models.transformer.config import TransformerConfig
from dydit.models.transformer.units import attention_macs, mlp_macs

PROBE_STEPS, PROBES = 50, 4
_FAR, _LIMIT = 8.0, 4.0  # channel 0 of routed (+) and other tokens (-), and the threshold of the router


@torch.no_grad()
def set_routers(model: DynamicModel, flops_ratio: float, generator: torch.Generator, y: Any = None) -> None:
    """Let a share p of units and of tokens pass, with `p*(attn + p*mlp) = flops_ratio*(attn + mlp)`.

    `y`: the conditions of `PROBES` images; by default class labels.
    """
    density = _density(model.config, flops_ratio)
    _set_width_routers(model, density, generator)
    y = torch.arange(PROBES) % model.config.classes.count if y is None else y
    _set_token_routers(model, density, generator, y)


def _density(config: TransformerConfig, ratio: float) -> float:
    """p of `p*attn + p*p*mlp = ratio*(attn + mlp)`."""
    a, m = attention_macs(config), mlp_macs(config)
    return float((-a + (a * a + 4 * m * ratio * (a + m)) ** 0.5) / (2 * m))


def _set_width_routers(model: DynamicModel, density: float, generator: torch.Generator) -> None:
    """Standardize each unit's logit over timesteps, then shift all so that a share `density` of them is above 0."""
    config = model.config
    t_emb = model.embed_timestep(_times(config, torch.linspace(0, 1, PROBE_STEPS)))
    always = 1 if config.routers is Routers.FIRST_ON else 0
    routed = config.num_heads - always
    if not routed:
        return
    share = min(max((density * config.num_heads - always) / routed, 0.0), 1.0)
    for block in model.ordered_blocks():
        for router in (block.attn_rate.router, block.mlp_rate.router):
            logits = router(t_emb) - router.bias
            spread = logits.std(0) + 1e-6
            router.weight.div_(spread[:, None])
            logits = logits / spread
            # Each unit gets its own offset, so that some are nearly always on and others rarely. The offsets are in
            # random order, because in a trained model the most active units do not come first.
            own = torch.linspace(1.5, -1.5, routed)[torch.randperm(routed, generator=generator)]
            centred = logits - logits.mean(0) + own
            router.bias.copy_(own - logits.mean(0) - _quantile(centred, 1 - share))


def _set_token_routers(model: DynamicModel, density: float, generator: torch.Generator, y: Any) -> None:
    """Block by block, in the order of execution: set the bias so that a share `density` of probe tokens passes."""
    config = model.config
    x = torch.randn(PROBES, config.in_channels, config.input_size, config.input_size, generator=generator)
    times = _times(config, torch.tensor([50.0, 350.0, 650.0, 950.0]) / (TRAIN_STEPS - 1))
    model(x, times, y, _Calibrating(density))


def _times(config: TransformerConfig, shares: Tensor) -> Tensor:
    """The model's own times at `shares` of its range, 0 to 1."""
    process = config.diffusion
    times = shares * (1 if process.flow else TRAIN_STEPS - 1)
    return times.round() if process.discrete else times


class _Calibrating(Masked):
    """Sets the bias of each token router from the logits of the probe, then gates with it."""

    def __init__(self, density: float):
        self.density = density

    def tokens(self, block: int, router: TokenRouter | None, x: Tensor) -> Tensor | None:
        assert router is not None
        logits = router(x)
        router.mlp_head[2].bias -= _quantile(logits[logits.isfinite()], 1 - self.density)
        return super().tokens(block, router, x)


def _quantile(values: Tensor, share: float) -> Tensor:
    ordered = values.flatten().sort().values
    last = len(ordered) - 1
    position = min(int(share * len(ordered)), last)
    if position == 0:
        return ordered[0] - 1
    return (ordered[position - 1] + ordered[position]) / 2


def route_by_channel(state: dict[str, Tensor], config: TransformerConfig, share: float) -> None:
    """Let token routers read only channel 0 of the residual stream, which no block writes to.

    It is far above the threshold for the first tokens, and far below it for the others. The caller keeps other layers
    from writing to the channel.
    """
    routed = round(share * config.tokens)
    state["pos_embed"][0, :routed, 0], state["pos_embed"][0, routed:, 0] = _FAR, -_FAR
    for block in range(config.depth):
        name = config.block_name(block)
        blank(state, f"{name}.attn.proj")
        blank(state, f"{name}.mlp.fc2")
        for layer in (0, 2):
            state[f"{name}.token_selection.mlp_head.{layer}.weight"].zero_()[0, 0] = 1
            state[f"{name}.token_selection.mlp_head.{layer}.bias"].zero_()
        state[f"{name}.token_selection.mlp_head.2.bias"].fill_(-_LIMIT)


def blank(state: dict[str, Tensor], layer: str, channel: int = 0) -> None:
    """Keep a layer from writing to a channel."""
    state[f"{layer}.weight"][channel] = 0
    state[f"{layer}.bias"][channel] = 0
