"""Attention and MLP of the sliced form (`dydit.models.sliced`). A block has h active heads and g active groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch.nn.functional as F
from torch import Tensor

from dydit.models.sliced import SlicedBlock, SlicedModel


class SlicedTransformer(SlicedModel):
    """One subnetwork on stored weights, with the operations that blocks consist of."""

    def _take(self, weights: Mapping[str, Tensor]) -> None:
        self._embed = weights["embed.weight"].T.contiguous(), weights["embed.bias"]
        self._position = weights["pos_embed"]
        self._final = weights["final.weight"], weights["final.bias"]

    def patch_tokens(self, x: Tensor) -> Tensor:
        """Latents [B, C, S, S] -> tokens of patches [B, N, D], without position."""
        patches = F.unfold(x, self.config.patch_size, stride=self.config.patch_size).transpose(1, 2)
        return F.linear(patches, *self._embed)

    def attention(self, block: SlicedBlock, x: Tensor, gates: Tensor | None) -> Tensor:
        """The output of the attention branch for normalized tokens [R, N, D]. `gates`: of every head, or None."""
        slots = block.slots[0]
        if not len(slots):
            return block.bias("proj").to(x.dtype)
        qkv = self.linear(block, "qkv", x).view(*x.shape[:2], len(slots), 3, -1)
        q, k, v = qkv.permute(3, 0, 2, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)  # [R, h, N, hd]
        if gates is not None:
            out = out * gates[slots][:, None, None].to(out.dtype)
        return self.linear(block, "proj", out.transpose(1, 2).flatten(2)).to(x.dtype)

    def mlp(
        self,
        block: SlicedBlock,
        x: Tensor,
        gates: Tensor | None,
        normed: Callable[[Tensor, Tensor | None], Tensor],
        scaled: Callable[[Tensor, Tensor | None], Tensor] = lambda branch, rows: branch,
    ) -> Tensor:
        """The stream [R, N, D] after the MLP of a block.

        `normed`, `scaled`: what is done before and after the MLP, with the stream (rows None), or with single tokens
        [n, D] and the rows that they are from.
        """
        if block.router is None:
            self.keep_every_token(x)
            return x + scaled(self._feed_forward(block, normed(x, None), gates), None)

        def branch(tokens: Tensor, rows: Tensor) -> Tensor:
            return scaled(self._feed_forward(block, normed(tokens, rows), gates), rows)

        return self.route(block, x, branch, has_units=len(block.slots[1]) > 0)

    def _feed_forward(self, block: SlicedBlock, x: Tensor, gates: Tensor | None) -> Tensor:
        slots = block.slots[1]
        if not len(slots):
            return block.bias("fc2").to(x.dtype).expand_as(x)
        hidden = F.gelu(self.linear(block, "fc1", x), approximate=self.config.GELU)
        if gates is not None:
            hidden = hidden * gates[slots].repeat_interleave(self.config.group_dim).to(hidden.dtype)
        return self.linear(block, "fc2", hidden).to(x.dtype)
