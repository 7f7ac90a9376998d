"""The PixArt-alpha of Chen et al. (2023) with DyDiT's routers, under the names of its original state dict.

Shapes: x [B, C, S, S] latents, t [B] timesteps in 0..999, y texts of L tokens for B rows; N tokens of hidden size D,
H heads. The output is epsilon, [B, C, S, S], or epsilon and the variance, [B, 2C, S, S], if sigma is learned.

All blocks share one modulation (adaLN-single, section 2.3), to which each adds a table. Cross-attention reads the
stream without normalization, and joins it without a gate. It has no routers: its heads are always on, and token routers
decide on the stream after it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dydit.models.dynamic import DynamicModel
from dydit.models.pixart.config import PADDING_BIAS, PixArtConfig
from dydit.models.routers import Gating, WidthRouter
from dydit.models.text import TextRows
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


def text_bias(mask: Tensor) -> Tensor:
    """What is added to the scores of texts' tokens, mask bool [T, L] -> f32 [T, L].

    A text of padding alone attends to all of it. diffusers adds -10000 to every one of its scores, which changes their
    rounding alone.
    """
    on = mask.float()
    return (on.amax(1, keepdim=True) - on) * PADDING_BIAS


class CrossAttention(nn.Module):
    """Multi-head attention from tokens [B, N, D] to a text [B, L, D]; rows of `kv_linear` are (2, H, head_dim)."""

    def __init__(self, config: PixArtConfig):
        super().__init__()
        d = config.hidden_size
        self.heads = config.num_heads
        self.q_linear = nn.Linear(d, d)
        self.kv_linear = nn.Linear(d, 2 * d)
        self.proj = nn.Linear(d, d)

    def forward(self, x: Tensor, text: Tensor, bias: Tensor) -> Tensor:
        """`bias` [B, L] is added to the scores of the text's tokens."""
        b, n, d = x.shape
        q = self.q_linear(x).view(b, n, self.heads, -1).transpose(1, 2)
        k, v = self.kv_linear(text).view(b, text.shape[1], 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[:, None, None])  # [B, H, N, head_dim]
        return self.proj(out.transpose(1, 2).reshape(b, n, d))


class CaptionProjection(nn.Module):
    """The language model's output [B, L, caption_channels] to the text [B, L, D] that blocks attend to."""

    def __init__(self, config: PixArtConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.caption_channels, config.hidden_size)
        self.fc2 = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(embeddings), approximate="tanh"))


class CaptionEmbedder(nn.Module):
    """Holds the projection under its published name."""

    def __init__(self, config: PixArtConfig):
        super().__init__()
        self.y_proj = CaptionProjection(config)

    def forward(self, y: TextRows) -> tuple[Tensor, Tensor]:
        """The text [B, L, D], and the bias of its tokens' scores [B, L]."""
        embeddings = y.embeddings.to(self.y_proj.fc1.weight.dtype)
        return self.y_proj(embeddings), text_bias(y.mask).to(embeddings.dtype)


class Block(RoutedBlock):
    """A block with cross-attention between attention and MLP, and its three routers (absent in a static model)."""

    def __init__(self, config: PixArtConfig, index: int):
        super().__init__(config, index)
        self.scale_shift_table = nn.Parameter(torch.zeros(6, config.hidden_size))
        self.cross_attn = CrossAttention(config)
        self.add_routers(config)

    def forward(
        self, x: Tensor, shared: Tensor, text: Tensor, text_bias: Tensor, t_emb: Tensor, gating: Gating
    ) -> Tensor:
        """`shared` [B, 6, D] is the modulation that all blocks share."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.scale_shift_table + shared).unbind(1)
        heads = gating.units(self.index, 0, self.attn_rate, t_emb)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(layer_norm(x), shift1, scale1), heads)
        x = x + self.cross_attn(x, text, text_bias)
        groups = gating.units(self.index, 1, self.mlp_rate, t_emb)
        tokens = gating.tokens(self.index, self.token_selection, x)
        branch = gate2.unsqueeze(1) * self.mlp(modulate(layer_norm(x), shift2, scale2), groups)
        return x + (branch if tokens is None else branch * tokens.unsqueeze(-1))


class FinalLayer(nn.Module):
    """Modulation by the timestep embedding itself, and a linear map from each token to its patch of output channels."""

    def __init__(self, config: PixArtConfig):
        super().__init__()
        self.linear = nn.Linear(config.hidden_size, config.patch_size**2 * config.out_channels)
        self.scale_shift_table = nn.Parameter(torch.zeros(2, config.hidden_size))

    def forward(self, x: Tensor, t_emb: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table + t_emb.unsqueeze(1)).unbind(1)
        return self.linear(modulate(layer_norm(x), shift, scale))


class PixArt(DynamicModel):
    """A (dynamic) PixArt-alpha. `forward` takes a gating, by default that of inference."""

    def __init__(self, config: PixArtConfig):
        super().__init__(config)
        d = config.hidden_size
        self.x_embedder = PatchEmbed(config)
        self.t_embedder = SinusoidEmbedder(d)
        if config.micro_conditions:
            self.csize_embedder, self.ar_embedder = SinusoidEmbedder(d // 3), SinusoidEmbedder(d // 3)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(d, 6 * d))
        self.y_embedder = CaptionEmbedder(config)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.depth))
        self.final_layer = FinalLayer(config)
        self.register_buffer("pos_embed", sine_positions(config, config.interpolation_scale), persistent=False)

    def forward(self, x: Tensor, t: Tensor, y: TextRows, gating: Gating | None = None) -> Tensor:
        gating = gating or self.inference_gating()
        t_emb = self.embed_timestep(t)
        shared = self.t_block(t_emb).unflatten(-1, (6, -1))
        text, text_bias = self.y_embedder(y)
        x = self.x_embedder(x).to(t_emb.dtype)  # in mixed precision, the stream is fp32
        x = x + self.pos_embed.to(x.dtype)
        for block in self.blocks:
            x = self.run_block(block, x, shared, text, text_bias, t_emb, gating)
        return unpatchify(self.final_layer(x, t_emb), self.config)

    def embed_timestep(self, t: Tensor) -> Tensor:
        embedded: Tensor = self.t_embedder(t)
        if not self.config.micro_conditions:
            return embedded
        # The micro-conditions of every image: height and width in pixels, and an aspect ratio of 1.
        size = self.csize_embedder(torch.full((1,), self.config.pixels, device=t.device))
        return embedded + torch.cat([size, size, self.ar_embedder(torch.ones(1, device=t.device))], -1)

    def width_routers(self) -> list[WidthRouter]:
        return [router for block in self.blocks for router in (block.attn_rate, block.mlp_rate)]

    def set_derived(self) -> None:
        self.pos_embed = sine_positions(self.config, self.config.interpolation_scale)
        for module in self.modules():
            if isinstance(module, SinusoidEmbedder):
                module.frequencies = sine_frequencies(FREQUENCIES)


@torch.no_grad()
def initialize(model: PixArt, generator: torch.Generator, token_bias: float = 35.0, width_bias: float = 15.0) -> None:
    """Initialize as in PixArt-alpha, with zero projections of cross-attention and a zero output layer.

    Routers start with everything on.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1), generator=generator)
            nn.init.zeros_(module.bias)
        elif isinstance(module, Block | FinalLayer):
            nn.init.normal_(module.scale_shift_table, std=model.config.hidden_size**-0.5, generator=generator)
    embedders = [module.mlp for module in model.modules() if isinstance(module, SinusoidEmbedder)]
    layers = [embedder[layer] for embedder in embedders for layer in (0, 2)]
    for layer in (*layers, model.t_block[1], model.y_embedder.y_proj.fc1, model.y_embedder.y_proj.fc2):
        nn.init.normal_(layer.weight, std=0.02, generator=generator)
    for layer in (*(block.cross_attn.proj for block in model.blocks), model.final_layer.linear):
        nn.init.zeros_(layer.weight)
    if model.config.dynamic:
        initialize_routers(model.blocks, generator, token_bias, width_bias)
