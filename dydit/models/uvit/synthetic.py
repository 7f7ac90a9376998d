"""Random U-ViTs that behave like trained ones (`dydit.models.synthetic`), and routers that select a share of tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dydit.models.transformer.synthetic import blank, route_by_channel, set_routers
from dydit.models.uvit.config import UViTConfig
from dydit.models.uvit.model import UViT


@torch.no_grad()
def synthetic_model(config: UViTConfig, seed: int, flops_ratio: float) -> UViT:
    """A synthetic U-ViT. A share p of units and of tokens is on, with `p*(attn + p*mlp) = flops_ratio*(attn + mlp)`."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    model = UViT(config).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            fan_in = module.weight.shape[1:].numel()
            module.weight.normal_(std=fan_in**-0.5, generator=generator)
            if module.bias is not None:
                module.bias.normal_(std=0.05, generator=generator)
        elif isinstance(module, nn.LayerNorm):
            module.weight.normal_(1.0, 0.1, generator=generator)
            module.bias.normal_(std=0.05, generator=generator)
        elif isinstance(module, nn.Embedding):
            module.weight.normal_(std=0.5, generator=generator)
    model.pos_embed.normal_(std=0.3, generator=generator)
    model.decoder_pred.weight.mul_(0.5)
    if config.dynamic:
        set_routers(model, flops_ratio, generator)
    return model


def route_share(state: dict[str, Tensor], config: UViTConfig, share: float) -> None:
    """See `dydit.models.transformer.synthetic.route_by_channel`. Long skips keep the channel of the stream."""
    route_by_channel(state, config, share)
    blank(state, "patch_embed.proj")
    for block in filter(config.has_skip, range(config.depth)):
        skip = f"{config.block_name(block)}.skip_linear"
        blank(state, skip)
        state[f"{skip}.weight"][0, 0] = 1
