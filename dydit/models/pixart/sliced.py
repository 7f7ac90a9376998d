"""The sliced form of a PixArt (`dydit.models.sliced`), on the stored layout of `dydit.models.pixart.layout`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from dydit.models.architecture import stored_name
from dydit.models.pixart.config import PixArtConfig
from dydit.models.pixart.model import text_bias
from dydit.models.sliced import SlicedBlock
from dydit.models.transformer.modulation import add_ones
from dydit.models.transformer.modules import sinusoid
from dydit.models.transformer.sliced import ModulatedSliced

_Linear = tuple[Tensor, Tensor]


class SlicedPixArt(ModulatedSliced):
    """One subnetwork of a PixArt. Its condition is the modulation [R, 6L+2, D]; its texts are `StepTexts`."""

    def _take(self, weights: Mapping[str, Tensor]) -> None:
        super()._take(weights)
        blocks = range(self.config.depth)
        self._cross = [
            [_pair(weights, stored_name(block, f"cross_{name}")) for name in ("q", "proj")] for block in blocks
        ]

    def _between(self, block: SlicedBlock, x: Tensor) -> Tensor:
        """Cross-attention, which is added to the stream."""
        assert self._text is not None, "a step without its texts"
        keys, values, bias = self._text.of_block(block.index)
        (q_weight, q_bias), (proj_weight, proj_bias) = self._cross[block.index]
        q = F.linear(x.to(q_weight.dtype), q_weight, q_bias)
        q, k, v = (self._by_head(each.to(q.dtype)) for each in (q, keys, values))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[:, None, None].to(q.dtype))
        out = F.linear(mixed.transpose(1, 2).flatten(2), proj_weight, proj_bias)
        return x + out.to(x.dtype)

    def _by_head(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(2, (self.config.num_heads, -1)).transpose(1, 2)


def _pair(weights: Mapping[str, Tensor], layer: str) -> _Linear:
    return weights[f"{layer}.weight"], weights[f"{layer}.bias"]


@torch.inference_mode()
def conditioning(config: PixArtConfig, weights: Mapping[str, Tensor], timesteps: Tensor, labels: Tensor) -> Tensor:
    """Modulation of every (timestep, label) pair: [T], int64 [R] -> [T, R, 6L+2, D]; the same for every label."""

    def embedded(layer: str, values: Tensor) -> Tensor:
        first, second = (_pair(weights, f"{layer}.{at}") for at in (0, 2))
        return F.linear(
            F.silu(F.linear(sinusoid(values, weights["time.frequencies"]).to(first[0].dtype), *first)), *second
        )

    e = embedded("time", timesteps)
    if config.micro_conditions:
        size = embedded("size", torch.full((1,), config.pixels, device=e.device))
        e = e + torch.cat([size, size, embedded("ratio", torch.ones(1, device=e.device))], 1)
    weight, bias = _pair(weights, "adaln")
    six = F.linear(F.silu(e).to(weight.dtype), weight, bias).to(e.dtype).unflatten(1, (1, 6, -1))
    tables = weights["adaln.tables"]
    blocks = (six + tables[:-2].unflatten(0, (config.depth, 6))).flatten(1, 2)
    out = torch.cat([blocks, e[:, None] + tables[-2:]], 1)
    add_ones(out)
    return out[:, None].expand(-1, len(labels), -1, -1).contiguous()


@torch.inference_mode()
def text_values(
    config: PixArtConfig, weights: Mapping[str, Tensor], embeddings: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Keys and values of every block [L, T, 2, tokens, D], and the bias of scores [T, tokens], both fp32."""
    first, second = (_pair(weights, f"text.{at}") for at in (0, 2))
    hidden = F.linear(F.gelu(F.linear(embeddings.to(first[0].dtype), *first), approximate="tanh"), *second)
    blocks = [_pair(weights, stored_name(block, "cross_kv")) for block in range(config.depth)]
    both = [F.linear(hidden, *each).unflatten(2, (2, -1)).transpose(1, 2).float() for each in blocks]
    return torch.stack(both), text_bias(mask)
