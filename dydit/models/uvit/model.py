"""The U-ViT of Bao et al. (2023) with DyDiT's routers, under the published state-dict names.

Shapes: x [B, C, S, S] pixels or latents, t [B] the process' own times, y [B] labels (num_classes is the null class, if
there is one; an unconditional model does not read them). E extra tokens (class, time) come before the N - E patches,
all of hidden size D. The output is [B, C, S, S].
"""

from __future__ import annotations

import math
from itertools import chain

import torch
from torch import Tensor, nn

from dydit.models.dynamic import DynamicModel
from dydit.models.routers import Gating, WidthRouter, without_autocast
from dydit.models.transformer.modules import (
    PatchEmbed,
    RoutedBlock,
    initialize_routers,
    sine_frequencies,
    sinusoid,
    unpatchify,
)
from dydit.models.uvit.config import UViTConfig

NORM_EPS = 1e-5
LABEL_STD = 1.0
"""The standard deviation of new rows of the class table."""


class Block(RoutedBlock):
    """A block with its three routers (absent in a static model) and, in the second half, a long skip."""

    def __init__(self, config: UViTConfig, index: int):
        super().__init__(config, index)
        d = config.hidden_size
        self.norm1, self.norm2 = nn.LayerNorm(d, eps=NORM_EPS), nn.LayerNorm(d, eps=NORM_EPS)
        self.skip_linear = nn.Linear(2 * d, d) if config.has_skip(index) else None
        self.add_routers(config)

    def forward(self, x: Tensor, skip: Tensor | None, t_emb: Tensor, gating: Gating) -> Tensor:
        if self.skip_linear is not None:
            assert skip is not None
            x = self.skip_linear(torch.cat([x, skip], -1)).to(x.dtype)  # in mixed precision, the stream stays fp32
        x = x + self.attn(self.norm1(x), gating.units(self.index, 0, self.attn_rate, t_emb))
        groups = gating.units(self.index, 1, self.mlp_rate, t_emb)
        tokens = gating.tokens(self.index, self.token_selection, x)
        branch = self.mlp(self.norm2(x), groups)
        return x + (branch if tokens is None else branch * tokens.unsqueeze(-1))


class UViT(DynamicModel):
    """A (dynamic) U-ViT. `forward` takes a gating, by default that of inference."""

    def __init__(self, config: UViTConfig):
        super().__init__(config)
        d, p, c = config.hidden_size, config.patch_size, config.in_channels
        self.first_time = config.first_time
        self.patch_embed = PatchEmbed(config)
        mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.SiLU(), nn.Linear(4 * d, d))
        self.time_embed = mlp if config.mlp_time_embed else nn.Identity()
        if config.num_classes:
            self.label_emb = nn.Embedding(config.classes.rows, d)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.tokens, d))
        half = config.half
        self.in_blocks = nn.ModuleList(Block(config, index) for index in range(half))
        self.mid_block = Block(config, half)
        self.out_blocks = nn.ModuleList(Block(config, half + 1 + index) for index in range(half))
        self.norm = nn.LayerNorm(d, eps=NORM_EPS)
        self.decoder_pred = nn.Linear(d, p * p * c)
        self.final_layer = nn.Conv2d(c, c, 3, padding=1) if config.conv else nn.Identity()
        self.register_buffer("frequencies", sine_frequencies(d), persistent=False)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, gating: Gating | None = None) -> Tensor:
        gating = gating or self.inference_gating()
        t_emb = self.embed_timestep(t)
        extra = [t_emb[:, None]]
        if self.config.num_classes:
            extra.insert(0, self.label_emb(y)[:, None])
        x = torch.cat([*extra, self.patch_embed(x)], 1) + self.pos_embed
        skips: list[Tensor] = []
        for block in self.in_blocks:
            x = self.run_block(block, x, None, t_emb, gating)
            skips.append(x)
        x = self.run_block(self.mid_block, x, None, t_emb, gating)
        for block in self.out_blocks:
            x = self.run_block(block, x, skips.pop(), t_emb, gating)
        patches = self.decoder_pred(self.norm(x))[:, self.config.extra_tokens :]
        return self.final_layer(unpatchify(patches, self.config))

    def embed_timestep(self, t: Tensor) -> Tensor:
        waves = sinusoid(t + self.first_time, self.frequencies)
        with without_autocast(t):
            embedded: Tensor = self.time_embed(waves.to(self.pos_embed.dtype))
        return embedded

    def ordered_blocks(self) -> list[nn.Module]:
        return [*self.in_blocks, self.mid_block, *self.out_blocks]

    def width_routers(self) -> list[WidthRouter]:
        pairs = ((block.attn_rate, block.mlp_rate) for block in self.ordered_blocks())
        return list(chain.from_iterable(pairs))

    def set_derived(self) -> None:
        self.frequencies = sine_frequencies(self.config.hidden_size)


def initialize(model: UViT, generator: torch.Generator, token_bias: float = 35.0, width_bias: float = 15.0) -> None:
    """Initialize as in U-ViT, and with routers that start with everything on."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5), generator=generator)
            bound = module.weight.shape[1:].numel() ** -0.5
            nn.init.uniform_(module.bias, -bound, bound, generator=generator)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=LABEL_STD, generator=generator)
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()
    nn.init.trunc_normal_(model.pos_embed, std=0.02, generator=generator)
    if model.config.dynamic:
        initialize_routers(model.ordered_blocks(), generator, token_bias, width_bias)
