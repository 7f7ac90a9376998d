"""The parts of the masked form that the transformers share, under their published names.

Shapes: B images, N tokens of hidden size D, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dydit.models.routers import TokenRouter, WidthRouter, without_autocast
from dydit.models.transformer.config import TransformerConfig

FREQUENCIES = 256
"""The size of the sinusoid that `SinusoidEmbedder` embeds."""
NORM_EPS = 1e-6
"""Of the LayerNorm before adaLN."""


def _counted(count: int, dtype: torch.dtype) -> Tensor:
    """0, 1, ... on the CPU, also for a model without memory: there PyTorch would import its compiler, for a second."""
    return torch.arange(count, dtype=dtype, device="cpu")


def sine_frequencies(size: int) -> Tensor:
    """The size/2 angular frequencies of a sinusoidal timestep embedding, `exp(-ln(10000) 2i/size)`, float32."""
    half = size // 2
    return torch.exp(-math.log(10000) * _counted(half, torch.float32) / half)


def sinusoid(t: Tensor, frequencies: Tensor) -> Tensor:
    """Timesteps [B] -> [B, size] float32, the cosines first."""
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


def sine_positions(config: TransformerConfig, scale: int = 1) -> Tensor:
    """The frozen 2-D sine-cosine position embedding, [1, patches, D] float32: the first half of the channels from the
    column, the second from the row. `scale`: what columns and rows are divided by.
    """
    side, quarter = config.side, config.hidden_size // 4
    omega = 1 / 10000 ** (_counted(quarter, torch.float64) / quarter)
    places = _counted(side, torch.float32) / scale  # rounded to fp32, as in the original code
    angles = places.double()[:, None] * omega
    axis = torch.cat([angles.sin(), angles.cos()], 1)
    column = axis[None, :, :].expand(side, side, -1)
    row = axis[:, None, :].expand(side, side, -1)
    return torch.cat([column, row], -1).reshape(1, config.patches, config.hidden_size).float()


def layer_norm(x: Tensor) -> Tensor:
    """LayerNorm without affine parameters, over the last axis."""
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: x [B, N, D] scaled and shifted per image, shift and scale [B, D]."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class SinusoidEmbedder(nn.Module):
    """Numbers [B], such as timesteps, to embeddings [B, size]: an MLP of their sinusoid, which is computed in fp32."""

    def __init__(self, size: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, size), nn.SiLU(), nn.Linear(size, size))
        self.register_buffer("frequencies", sine_frequencies(FREQUENCIES), persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        with without_autocast(t):
            return self.mlp(sinusoid(t, self.frequencies).to(self.mlp[0].weight.dtype))


class PatchEmbed(nn.Module):
    """Latents [B, C, S, S] to tokens [B, N, D]."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.proj = nn.Conv2d(config.in_channels, config.hidden_size, config.patch_size, stride=config.patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention; rows of `qkv` are (3, H, head_dim)."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.QKV_BIAS)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, head_gates: Tensor | None) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)  # [B, H, N, head_dim]
        if head_gates is not None:
            out = out * head_gates[:, :, None, None].to(out.dtype)
        return self.proj(out.transpose(1, 2).reshape(b, n, d))


class Mlp(nn.Module):
    """fc2(GELU(fc1(x))); the 4D hidden channels are H contiguous groups."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.groups, self.gelu = config.num_heads, config.GELU
        self.fc1 = nn.Linear(config.hidden_size, config.mlp_hidden)
        self.fc2 = nn.Linear(config.mlp_hidden, config.hidden_size)

    def forward(self, x: Tensor, group_gates: Tensor | None) -> Tensor:
        hidden = self.fc1(x)
        if group_gates is not None:
            grouped = hidden.unflatten(-1, (self.groups, -1)) * group_gates[:, None, :, None].to(hidden.dtype)
            hidden = grouped.flatten(-2)
        return self.fc2(F.gelu(hidden, approximate=self.gelu))


class RoutedBlock(nn.Module):
    """Attention, MLP and, after `add_routers`, the three routers, which a static model does not have."""

    attn_rate: WidthRouter | None
    mlp_rate: WidthRouter | None
    token_selection: TokenRouter | None

    def __init__(self, config: TransformerConfig, index: int):
        super().__init__()
        self.index = index
        self.attn = Attention(config)
        self.mlp = Mlp(config)

    def add_routers(self, config: TransformerConfig) -> None:
        """Add the routers, after the other modules: random weights are drawn in the order of modules."""
        self.attn_rate = WidthRouter(config, config.num_heads) if config.dynamic else None
        self.mlp_rate = WidthRouter(config, config.num_heads) if config.dynamic else None
        self.token_selection = TokenRouter(config) if config.dynamic else None


def unpatchify(x: Tensor, config: TransformerConfig) -> Tensor:
    """Tokens of patches [B, N, p*p*C] to images [B, C, S, S]."""
    side, p, c = config.side, config.patch_size, config.out_channels
    x = x.view(x.shape[0], side, side, p, p, c)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], c, config.input_size, config.input_size)


def initialize_routers(
    blocks: Iterable[Any], generator: torch.Generator, token_bias: float = 35.0, width_bias: float = 15.0
) -> None:
    """Xavier router weights, and biases that open every gate (15 for heads and groups, 35 for tokens)."""
    for block in blocks:
        linears = (block.attn_rate.router, block.mlp_rate.router, *block.token_selection.mlp_head[::2])
        for linear, bias in zip(linears, (width_bias, width_bias, 0.0, token_bias), strict=True):
            nn.init.xavier_uniform_(linear.weight, generator=generator)
            nn.init.constant_(linear.bias, bias)
