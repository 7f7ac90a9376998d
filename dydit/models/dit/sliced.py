"""The sliced form: one subnetwork with really narrow matrices and tokens routed by gather, computing a sampler step.

It is the PyTorch twin of a subnetwork's graph: the same inputs (`dydit.bundle.io_spec`) and outputs, on the stored
layout (`dydit.models.dit.layout`). It saves on the clock what `DiT` with masks only saves on paper, and equals it.

Shapes: B images; rows R = B, or 2B with classifier-free guidance (conditional rows, then those of the null class);
N tokens of hidden size D; L blocks; h and g the slots that a block holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dydit.diffusion.sampler_step import sampler_step
from dydit.models.architecture import Slots, stored_name
from dydit.models.config import ModelConfig
from dydit.models.dit.layout import stored_tensors
from dydit.models.dit.model import DiT, layer_norm, unpatchify


@dataclass(frozen=True)
class SlicedOutput:
    """`x_prev` [B, C, S, S]; `overflow` int64 [L]; with debug `tokens` bool [L, R, N] and `residuals` [L, R, N, D]."""

    x_prev: Tensor
    overflow: Tensor
    tokens: Tensor | None = None
    residuals: Tensor | None = None


@dataclass(frozen=True)
class SlicedBlock:
    """A block's weights, cut to its slots. Row-contiguous slots are views of the stored tensors."""

    index: int
    qkv: Tensor  # [h*3*hd, D]
    qkv_bias: Tensor
    proj: Tensor  # [h*hd, D]
    proj_bias: Tensor
    fc1: Tensor  # [g*gs, D]
    fc1_bias: Tensor
    fc2: Tensor  # [g*gs, D]
    fc2_bias: Tensor
    router: tuple[Tensor, Tensor, Tensor, Tensor] | None
    heads: Tensor  # int64 [h]: slots
    groups: Tensor  # int64 [g]

    @property
    def slots(self) -> tuple[Tensor, Tensor]:
        """Slots of each unit group, in the order of the architecture's description."""
        return self.heads, self.groups


class SlicedDiT:
    """One subnetwork over stored weights (names and layout: `dydit.models.dit.layout`).

    `slots`: the slots of each unit group that each block holds, ascending; `capacities`: routed tokens per row that
    each block has room for (all, where not given); `cfg_channels`: how many channels guidance acts on. Works on the
    weights' device and in their dtype; where only the matrices of attention and MLP are of a lower precision, these
    products alone are (DESIGN, decision 9).
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        slots: Slots,
        cfg_channels: int,
        capacities: Sequence[int] | None = None,
    ):
        self.config, self.cfg_channels, self.capacities = config, cfg_channels, capacities
        self._embed = weights["embed.weight"].T.contiguous(), weights["embed.bias"]
        self._position = weights["pos_embed"]
        self._final = weights["final.weight"], weights["final.bias"]
        self._layers = {layer.name: layer for layer in config.units.blocks[0].layers}
        self._blocks = [_cut(config, weights, block, *each) for block, each in enumerate(slots)]

    @classmethod
    def from_model(cls, model: DiT, slots: Slots, cfg_channels: int) -> SlicedDiT:
        """The subnetwork of a model in memory; slots are the checkpoint's own units."""
        weights = dict(stored_tensors(model.state_dict(), model.config))
        return cls(model.config, weights, slots, cfg_channels)

    @torch.inference_mode()
    def step(
        self,
        x: Tensor,
        noise: Tensor,
        coefficients: Tensor,
        cfg_scale: Tensor,
        modulation: Tensor,
        gates: Tensor | None = None,
        debug: bool = False,
    ) -> SlicedOutput:
        """One sampler step on the inputs of a subnetwork's graph.

        x, noise [B, C, S, S]; coefficients [5]; cfg_scale []; modulation [R, 6L+2, D]; gates [U] of 0/1 by slot.
        With capacities, a block's routed tokens beyond `capacity * R` keep their residual and count in `overflow`.
        """
        batch, rows = x.shape[0], modulation.shape[0]
        patches = F.unfold(x, self.config.patch_size, stride=self.config.patch_size).transpose(1, 2)
        stream = F.linear(patches, *self._embed) + self._position
        stream = stream.repeat(rows // batch, 1, 1)
        overflow = torch.zeros(self.config.depth, dtype=torch.int64)
        tokens, residuals = [], []
        parts = None if gates is None else gates.split([part.group.count for part in self.config.units.parts])
        for index, block in enumerate(self._blocks):
            vectors = modulation[:, 6 * index : 6 * index + 6, None].unbind(1)  # six of [R, 1, D]
            head_gates, group_gates = (None, None) if parts is None else parts[2 * index : 2 * index + 2]
            stream = stream + vectors[2] * self._attention(block, _modulate(stream, *vectors[:2]), head_gates)
            routed = self._route(block, stream)
            stream, overflow[index] = self._mlp(index, stream, routed, vectors[3:], group_gates)
            if debug:
                tokens.append(torch.ones_like(stream[..., 0], dtype=torch.bool) if routed is None else routed)
                residuals.append(stream)
        shift, scale = modulation[:, -2, None], modulation[:, -1, None]
        output = unpatchify(F.linear(_modulate(stream, shift, scale), *self._final), self.config)
        x_prev = sampler_step(x, output, noise, coefficients, cfg_scale, self.cfg_channels)
        if not debug:
            return SlicedOutput(x_prev, overflow)
        return SlicedOutput(x_prev, overflow, torch.stack(tokens), torch.stack(residuals))

    def _attention(self, block: SlicedBlock, x: Tensor, gates: Tensor | None) -> Tensor:
        heads = len(block.heads)
        if not heads:
            return block.proj_bias.to(x.dtype)
        qkv = self.linear(block, "qkv", x).view(*x.shape[:2], heads, 3, -1)
        q, k, v = qkv.permute(3, 0, 2, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)  # [R, h, N, hd]
        if gates is not None:
            out = out * gates[block.heads][:, None, None].to(out.dtype)
        return self.linear(block, "proj", out.transpose(1, 2).flatten(2)).to(x.dtype)

    def linear(self, block: SlicedBlock, layer: str, x: Tensor) -> Tensor:
        """One of a block's layers qkv, proj, fc1, fc2 on x [..., in], in the weight's dtype."""
        weight, bias = getattr(block, layer), getattr(block, f"{layer}_bias")
        x = x.to(weight.dtype)
        return F.linear(x, weight, bias) if self._layers[layer].out_major else x @ weight + bias

    def _route(self, block: SlicedBlock, x: Tensor) -> Tensor | None:
        """Token decisions, bool [R, N], from the residual stream; None where every token enters the MLP."""
        if block.router is None:
            return None
        first, first_bias, last, last_bias = block.router
        return F.linear(F.relu(F.linear(x, first, first_bias)), last, last_bias)[..., 0] > 0

    def _mlp(
        self, index: int, x: Tensor, routed: Tensor | None, vectors: Sequence[Tensor], gates: Tensor | None
    ) -> tuple[Tensor, int]:
        """The residual stream after the MLP, and how many routed tokens found no room."""
        block, (shift, scale, gate) = self._blocks[index], vectors
        if routed is None:
            return x + gate * self._feed_forward(block, _modulate(x, shift, scale), gates), 0
        chosen = routed.flatten().nonzero()[:, 0]
        room = len(chosen)
        if self.capacities is not None and len(block.groups):  # a lone bias needs no slots
            room = self.capacities[index] * x.shape[0]
        overflow = max(0, len(chosen) - room)
        chosen = chosen[:room]
        row = chosen // x.shape[1]
        flat = x.flatten(0, 1)
        entering = flat[chosen]
        hidden = _modulate(entering, shift[row, 0], scale[row, 0])
        left = entering + gate[row, 0] * self._feed_forward(block, hidden, gates)
        return flat.index_copy(0, chosen, left).view_as(x), overflow

    def _feed_forward(self, block: SlicedBlock, x: Tensor, gates: Tensor | None) -> Tensor:
        if not len(block.groups):
            return block.fc2_bias.to(x.dtype).expand_as(x)
        hidden = F.gelu(self.linear(block, "fc1", x), approximate="tanh")
        if gates is not None:
            hidden = hidden * gates[block.groups].repeat_interleave(self.config.group_dim).to(hidden.dtype)
        return self.linear(block, "fc2", hidden).to(x.dtype)


@torch.inference_mode()
def conditioning(config: ModelConfig, weights: Mapping[str, Tensor], timesteps: Tensor, labels: Tensor) -> Tensor:
    """Modulation of every (timestep, label) pair: int64 [T], int64 [R] -> [T, R, 6L+2, D].

    Vectors stand as `graph_io.modulation_vectors` says; the 1 of each `1+scale` is added here.
    """
    angles = timesteps[:, None].float() * weights["time.frequencies"]
    sinusoid = torch.cat([angles.cos(), angles.sin()], -1).to(weights["time.0.weight"].dtype)
    hidden = F.silu(F.linear(sinusoid, weights["time.0.weight"], weights["time.0.bias"]))
    t_emb = F.linear(hidden, weights["time.2.weight"], weights["time.2.bias"])
    c = t_emb[:, None] + weights["label.table"][labels]
    out = F.linear(F.silu(c).to(weights["adaln.weight"].dtype), weights["adaln.weight"], weights["adaln.bias"])
    out = out.to(c.dtype).view(len(timesteps), len(labels), -1, config.hidden_size)
    scales = [vector for block in range(config.depth) for vector in (6 * block + 1, 6 * block + 4)]
    out[..., [*scales, 6 * config.depth + 1], :] += 1
    return out


def _modulate(x: Tensor, shift: Tensor, scale_plus_one: Tensor) -> Tensor:
    return layer_norm(x) * scale_plus_one + shift


def _rows(stored: Tensor, slots: Sequence[int]) -> Tensor:
    """The rows of some slots, merged: [H, a, ...] -> [len(slots)*a, ...]; a view where the slots are consecutive."""
    first, count = (slots[0], len(slots)) if slots else (0, 0)
    consecutive = list(slots) == list(range(first, first + count))
    chosen = stored[first : first + count] if consecutive else stored[list(slots)]
    return chosen.flatten(0, 1)


def _cut(
    config: ModelConfig, weights: Mapping[str, Tensor], index: int, heads: Sequence[int], groups: Sequence[int]
) -> SlicedBlock:
    def of(name: str) -> Tensor:
        return weights[stored_name(index, name)]

    router = (
        (of("router.0.weight"), of("router.0.bias"), of("router.2.weight"), of("router.2.bias"))
        if config.dynamic
        else None
    )
    device = weights["embed.bias"].device
    return SlicedBlock(
        index=index,
        qkv=_rows(of("qkv.weight"), heads),
        qkv_bias=_rows(of("qkv.bias"), heads),
        proj=_rows(of("proj.weight"), heads),
        proj_bias=of("proj.bias"),
        fc1=_rows(of("fc1.weight"), groups),
        fc1_bias=_rows(of("fc1.bias"), groups),
        fc2=_rows(of("fc2.weight"), groups),
        fc2_bias=of("fc2.bias"),
        router=router,
        heads=torch.tensor(list(heads), dtype=torch.int64, device=device),
        groups=torch.tensor(list(groups), dtype=torch.int64, device=device),
    )
