"""The sliced form of a DiT (`dydit.models.sliced`), on the stored layout of `dydit.models.dit.layout`.

h and g are the numbers of active heads and channel groups of a block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dydit.models.dit.config import DiTConfig
from dydit.models.dit.model import layer_norm, unpatchify
from dydit.models.sliced import SlicedBlock, SlicedModel


class SlicedDiT(SlicedModel):
    """One subnetwork of a DiT. Its condition is the modulation [R, 6L+2, D]."""

    def _take(self, weights: Mapping[str, Tensor]) -> None:
        self._embed = weights["embed.weight"].T.contiguous(), weights["embed.bias"]
        self._position = weights["pos_embed"]
        self._final = weights["final.weight"], weights["final.bias"]

    def _output(self, x: Tensor, condition: Tensor, gates: Sequence[Tensor] | None) -> Tensor:
        patches = F.unfold(x, self.config.patch_size, stride=self.config.patch_size).transpose(1, 2)
        stream = F.linear(patches, *self._embed) + self._position
        stream = stream.repeat(len(condition) // len(x), 1, 1)
        for block in self.blocks:
            first = 6 * block.index
            shift1, scale1, gate1, *vectors = condition[:, first : first + 6, None].unbind(1)  # six of [R, 1, D]
            head_gates, group_gates = (None, None) if gates is None else gates[2 * block.index : 2 * block.index + 2]
            stream = stream + gate1 * self._attention(block, _modulate(stream, shift1, scale1), head_gates)
            stream = self._mlp(block, stream, vectors, group_gates)
            self.finish_block(stream)
        shift, scale = condition[:, -2, None], condition[:, -1, None]
        return unpatchify(F.linear(_modulate(stream, shift, scale), *self._final), self.config)

    def _attention(self, block: SlicedBlock, x: Tensor, gates: Tensor | None) -> Tensor:
        slots = block.slots[0]
        if not len(slots):
            return block.bias("proj").to(x.dtype)
        qkv = self.linear(block, "qkv", x).view(*x.shape[:2], len(slots), 3, -1)
        q, k, v = qkv.permute(3, 0, 2, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)  # [R, h, N, hd]
        if gates is not None:
            out = out * gates[slots][:, None, None].to(out.dtype)
        return self.linear(block, "proj", out.transpose(1, 2).flatten(2)).to(x.dtype)

    def _mlp(self, block: SlicedBlock, x: Tensor, vectors: Sequence[Tensor], gates: Tensor | None) -> Tensor:
        shift, scale, gate = vectors  # [R, 1, D]
        if block.router is None:
            self.keep_every_token(x)
            return x + gate * self._feed_forward(block, _modulate(x, shift, scale), gates)

        def branch(tokens: Tensor, rows: Tensor) -> Tensor:
            hidden = _modulate(tokens, shift[rows, 0], scale[rows, 0])
            return gate[rows, 0] * self._feed_forward(block, hidden, gates)

        return self.route(block, x, branch, has_units=len(block.slots[1]) > 0)

    def _feed_forward(self, block: SlicedBlock, x: Tensor, gates: Tensor | None) -> Tensor:
        slots = block.slots[1]
        if not len(slots):
            return block.bias("fc2").to(x.dtype).expand_as(x)
        hidden = F.gelu(self.linear(block, "fc1", x), approximate="tanh")
        if gates is not None:
            hidden = hidden * gates[slots].repeat_interleave(self.config.group_dim).to(hidden.dtype)
        return self.linear(block, "fc2", hidden).to(x.dtype)


@torch.inference_mode()
def conditioning(config: DiTConfig, weights: Mapping[str, Tensor], timesteps: Tensor, labels: Tensor) -> Tensor:
    """Modulation of every (timestep, label) pair: int64 [T], int64 [R] -> [T, R, 6L+2, D].

    `DiTConfig.vectors` describes the order of vectors. The 1 of each `1+scale` is added here.
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
