"""Random DiTs that behave like trained ones (`dydit.models.synthetic`), and routers that select a share of tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dydit.models.dit.config import DiTConfig
from dydit.models.dit.model import DiT
from dydit.models.transformer.synthetic import blank, route_by_channel, set_routers


@torch.no_grad()
def synthetic_model(config: DiTConfig, seed: int, flops_ratio: float) -> DiT:
    """A synthetic DiT. A share p of units and of tokens is on, with `p*(attn + p*mlp) = flops_ratio*(attn + mlp)`."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    model = DiT(config).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            fan_in = module.weight.shape[1:].numel()
            module.weight.normal_(std=fan_in**-0.5, generator=generator)
            module.bias.normal_(std=0.05, generator=generator)
    model.y_embedder.embedding_table.weight.normal_(std=0.5, generator=generator)
    for block in model.blocks:
        block.adaLN_modulation[1].weight.mul_(0.3)
    model.final_layer.linear.weight.mul_(0.5)
    if config.dynamic:
        set_routers(model, flops_ratio, generator)
    return model


def route_share(state: dict[str, Tensor], config: DiTConfig, share: float) -> None:
    """See `dydit.models.transformer.synthetic.route_share`."""
    route_by_channel(state, config, share)
    blank(state, "x_embedder.proj")
