"""Random PixArts that behave like trained ones (`dydit.models.synthetic`), and routers that pass a share of tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dydit.models.pixart.config import PixArtConfig
from dydit.models.pixart.model import Block, FinalLayer, PixArt
from dydit.models.text import TextRows
from dydit.models.transformer.modules import sine_positions
from dydit.models.transformer.synthetic import PROBES, blank, set_routers


@torch.no_grad()
def synthetic_model(config: PixArtConfig, seed: int, flops_ratio: float) -> PixArt:
    """A synthetic model. A share p of units and of tokens is on, with `p*(attn + p*mlp) = flops_ratio*(attn + mlp)`."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    model = PixArt(config).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            fan_in = module.weight.shape[1:].numel()
            module.weight.normal_(std=fan_in**-0.5, generator=generator)
            module.bias.normal_(std=0.05, generator=generator)
        elif isinstance(module, Block | FinalLayer):
            module.scale_shift_table.normal_(std=0.3, generator=generator)
    model.t_block[1].weight.mul_(0.3)
    for block in model.blocks:
        block.cross_attn.proj.weight.mul_(0.5)
    model.final_layer.linear.weight.mul_(0.5)
    if config.dynamic:
        set_routers(model, flops_ratio, generator, random_texts(config, generator))
    return model


def random_texts(config: PixArtConfig, generator: torch.Generator) -> TextRows:
    """Random texts of different lengths."""
    embeddings = torch.randn(PROBES, config.text_tokens, config.caption_channels, generator=generator)
    lengths = torch.linspace(1, config.text_tokens, PROBES).round()
    return TextRows(embeddings, torch.arange(config.text_tokens) < lengths[:, None])


@torch.no_grad()
def route_share(state: dict[str, Tensor], config: PixArtConfig, share: float) -> None:
    """Let token routers select the first tokens, by their position in the residual stream.

    The position embedding is computed, so routers read its slowest sines, of column and row, from two channels that no
    layer writes to. Rows weigh so much more than columns that the sum orders the tokens.
    """
    quarter = config.hidden_size // 4
    channels = [quarter - 1, 3 * quarter - 1]
    direction = torch.tensor([1.0, 2.0 * config.side])
    order = (sine_positions(config, config.interpolation_scale)[0, :, channels] @ direction).double()
    ranked, routed = order.sort().values, round(share * config.tokens)
    spread = float(ranked[-1] - ranked[0]) or 1.0
    ends = ranked[0] - spread, ranked[-1] + spread
    bounds = torch.stack([ends[0], *ranked, ends[1]])
    limit = float(bounds[routed : routed + 2].mean())
    for channel in channels:
        blank(state, "x_embedder.proj", channel)
    for block in range(config.depth):
        name = config.block_name(block)
        for layer in ("attn.proj", "cross_attn.proj", "mlp.fc2"):
            for channel in channels:
                blank(state, f"{name}.{layer}", channel)
        router = f"{name}.token_selection.mlp_head"
        for tensor in ("0.weight", "0.bias", "2.weight", "2.bias"):
            state[f"{router}.{tensor}"].zero_()
        # relu(limit - order) is above 0 for the tokens before the limit, and 0 for the others.
        state[f"{router}.0.weight"][0, channels] = -direction / spread
        state[f"{router}.0.bias"][0] = limit / spread
        state[f"{router}.2.weight"][0, 0] = 1
