"""The DiT of Peebles & Xie (2023) with DyDiT's routers (Zhao et al. 2025), under the published state-dict names.

Shapes: x [B, C, S, S] latents, t [B] timesteps in 0..999, y [B] labels (num_classes is the null class, if there is
one); N tokens of hidden size D, H heads. The output is epsilon, [B, C, S, S], or epsilon and the variance,
[B, 2C, S, S], if sigma is learned.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dydit.models.dit.config import DiTConfig
from dydit.models.dynamic import DynamicModel
from dydit.models.routers import Gating, WidthRouter
from dydit.models.transformer.modules import (
    FREQUENCIES,
    PatchEmbed,
    RoutedBlock,
    SinusoidEmbedder,
    initialize_routers,
    layer_norm,
    modulate,
    sine_frequencies,
    sine_positions,
    unpatchify,
)

LABEL_STD = 0.02
"""The standard deviation of new rows of the class table."""


class LabelEmbedder(nn.Module):
    """Labels [B] to y_emb [B, D]."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.embedding_table = nn.Embedding(config.classes.rows, config.hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class Block(RoutedBlock):
    """adaLN-Zero block with its three routers (absent in a static DiT)."""

    def __init__(self, config: DiTConfig, index: int):
        super().__init__(config, index)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.hidden_size, 6 * config.hidden_size))
        self.add_routers(config)

    def forward(self, x: Tensor, c: Tensor, t_emb: Tensor, gating: Gating) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        heads = gating.units(self.index, 0, self.attn_rate, t_emb)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(layer_norm(x), shift1, scale1), heads)
        groups = gating.units(self.index, 1, self.mlp_rate, t_emb)
        tokens = gating.tokens(self.index, self.token_selection, x)
        branch = gate2.unsqueeze(1) * self.mlp(modulate(layer_norm(x), shift2, scale2), groups)
        return x + (branch if tokens is None else branch * tokens.unsqueeze(-1))


class FinalLayer(nn.Module):
    """adaLN and a linear map from each token to its patch of output channels."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        d = config.hidden_size
        self.linear = nn.Linear(d, config.patch_size**2 * config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(d, 2 * d))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(modulate(layer_norm(x), shift, scale))


class DiT(DynamicModel):
    """A (Dynamic) Diffusion Transformer. `forward` takes a gating, by default that of inference."""

    def __init__(self, config: DiTConfig):
        super().__init__(config)
        self.x_embedder = PatchEmbed(config)
        self.t_embedder = SinusoidEmbedder(config.hidden_size)
        self.y_embedder = LabelEmbedder(config)
        self.pos_embed = nn.Parameter(sine_positions(config), requires_grad=False)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.depth))
        self.final_layer = FinalLayer(config)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, gating: Gating | None = None) -> Tensor:
        gating = gating or self.inference_gating()
        t_emb = self.t_embedder(t)
        c = t_emb + self.y_embedder(y)
        x = self.x_embedder(x) + self.pos_embed
        for block in self.blocks:
            x = self.run_block(block, x, c, t_emb, gating)
        return unpatchify(self.final_layer(x, c), self.config)

    def embed_timestep(self, t: Tensor) -> Tensor:
        embedded: Tensor = self.t_embedder(t)
        return embedded

    def width_routers(self) -> list[WidthRouter]:
        return [router for block in self.blocks for router in (block.attn_rate, block.mlp_rate)]

    def set_derived(self) -> None:
        self.t_embedder.frequencies = sine_frequencies(FREQUENCIES)


def initialize(model: DiT, generator: torch.Generator, token_bias: float = 35.0, width_bias: float = 15.0) -> None:
    """Initialize as in DiT, with zero adaLN and output layers, and with routers that start with everything on."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1), generator=generator)
            nn.init.zeros_(module.bias)
    nn.init.normal_(model.y_embedder.embedding_table.weight, std=LABEL_STD, generator=generator)
    for layer in (model.t_embedder.mlp[0], model.t_embedder.mlp[2]):
        nn.init.normal_(layer.weight, std=0.02, generator=generator)
    last = [block.adaLN_modulation[1] for block in model.blocks]
    for layer in (*last, model.final_layer.adaLN_modulation[1], model.final_layer.linear):
        nn.init.zeros_(layer.weight)
    if model.config.dynamic:
        initialize_routers(model.blocks, generator, token_bias, width_bias)
