"""The sliced form of a DiT (`dydit.models.sliced`), on the stored layout of `dydit.models.dit.layout`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dydit.models.dit.config import DiTConfig
from dydit.models.sliced import SlicedBlock
from dydit.models.transformer.modules import layer_norm, sinusoid, unpatchify
from dydit.models.transformer.sliced import SlicedTransformer


class SlicedDiT(SlicedTransformer):
    """One subnetwork of a DiT. Its condition is the modulation [R, 6L+2, D]."""

    def _output(self, x: Tensor, condition: Tensor, gates: Sequence[Tensor] | None) -> Tensor:
        stream = self.patch_tokens(x) + self._position
        stream = stream.repeat(len(condition) // len(x), 1, 1)
        for block in self.blocks:
            first = 6 * block.index
            shift1, scale1, gate1, *vectors = condition[:, first : first + 6, None].unbind(1)  # six of [R, 1, D]
            head_gates, group_gates = (None, None) if gates is None else gates[2 * block.index : 2 * block.index + 2]
            stream = stream + gate1 * self.attention(block, _modulate(stream, shift1, scale1), head_gates)
            stream = self._mlp(block, stream, vectors, group_gates)
            self.finish_block(stream)
        shift, scale = condition[:, -2, None], condition[:, -1, None]
        return unpatchify(F.linear(_modulate(stream, shift, scale), *self._final), self.config)

    def _mlp(self, block: SlicedBlock, x: Tensor, vectors: Sequence[Tensor], gates: Tensor | None) -> Tensor:
        def at(vector: Tensor, rows: Tensor | None) -> Tensor:
            return vector if rows is None else vector[rows, 0]

        shift, scale, gate = vectors  # [R, 1, D]
        return self.mlp(
            block,
            x,
            gates,
            lambda tokens, rows: _modulate(tokens, at(shift, rows), at(scale, rows)),
            lambda branch, rows: at(gate, rows) * branch,
        )


@torch.inference_mode()
def conditioning(config: DiTConfig, weights: Mapping[str, Tensor], timesteps: Tensor, labels: Tensor) -> Tensor:
    """Modulation of every (timestep, label) pair: int64 [T], int64 [R] -> [T, R, 6L+2, D].

    `DiTConfig.vectors` describes the order of vectors. The 1 of each `1+scale` is added here.
    """
    waves = sinusoid(timesteps, weights["time.frequencies"]).to(weights["time.0.weight"].dtype)
    hidden = F.silu(F.linear(waves, weights["time.0.weight"], weights["time.0.bias"]))
    t_emb = F.linear(hidden, weights["time.2.weight"], weights["time.2.bias"])
    c = t_emb[:, None] + weights["label.table"][labels]
    out = F.linear(F.silu(c).to(weights["adaln.weight"].dtype), weights["adaln.weight"], weights["adaln.bias"])
    out = out.to(c.dtype).view(len(timesteps), len(labels), -1, config.hidden_size)
    scales = [vector for block in range(config.depth) for vector in (6 * block + 1, 6 * block + 4)]
    out[..., [*scales, 6 * config.depth + 1], :] += 1
    return out


def _modulate(x: Tensor, shift: Tensor, scale_plus_one: Tensor) -> Tensor:
    return layer_norm(x) * scale_plus_one + shift
