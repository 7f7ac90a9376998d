"""Attention and MLP of the sliced form (`dydit.models.sliced`). A block has h active heads and g active groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dydit.models.pointwise import PLAIN
from dydit.models.sliced import SlicedBlock, SlicedModel
from dydit.models.transformer.modules import NORM_EPS, unpatchify


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
        """The output of the attention branch for normalized tokens [R, N, D], in the type of its product.

        `gates`: of every head, or None.
        """
        slots = block.slots[0]
        if not len(slots):
            return block.bias("proj")
        qkv = self.linear(block, "qkv", x).view(*x.shape[:2], len(slots), 3, -1)
        q, k, v = qkv.permute(3, 0, 2, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)  # [R, h, N, hd]
        if gates is not None:
            out = out * gates[slots][:, None, None].to(out.dtype)
        return self.linear(block, "proj", out.transpose(1, 2).flatten(2))

    def mlp(
        self,
        block: SlicedBlock,
        x: Tensor,
        gates: Tensor | None,
        normed: Callable[[Tensor, Tensor | None], Tensor],
        scaled: Callable[[Tensor, Tensor | None], Tensor] | None = None,
    ) -> Tensor:
        """The stream [R, N, D] after the MLP of a block.

        `normed`, `scaled`: what is done before and after the MLP, with the stream (rows None), or with single tokens
        [n, D] and the rows that they are from. Without `scaled`, what the MLP gives is added as it is.
        """

        def branch_of(tokens: Tensor, rows: Tensor | None) -> Tensor:
            out = self._feed_forward(block, normed(tokens, rows), gates)
            return out.to(x.dtype) if scaled is None else scaled(out, rows)

        if block.router is None:
            self.keep_every_token(x)
            return x + branch_of(x, None)
        return self.route(block, x, branch_of, has_units=len(block.slots[1]) > 0)

    def _feed_forward(self, block: SlicedBlock, x: Tensor, gates: Tensor | None) -> Tensor:
        slots = block.slots[1]
        if not len(slots):
            return block.bias("fc2").expand_as(x)
        of_groups = None if gates is None else gates[slots]
        hidden = self.linear(block, "fc1", x)
        hidden = self.pointwise.activated(hidden, of_groups, self.config.group_dim, self.config.GELU)
        return self.linear(block, "fc2", hidden)


class ModulatedSliced(SlicedTransformer):
    """One subnetwork of a model whose condition is the modulation [R, 6L+2, D]."""

    def _output(self, x: Tensor, condition: Tensor, gates: Sequence[Tensor] | None) -> Tensor:
        stream = self.patch_tokens(x) + self._position
        stream = stream.repeat(len(condition) // len(x), 1, 1)
        for block in self.blocks:
            first = 6 * block.index
            shift1, scale1, gate1, *vectors = condition[:, first : first + 6, None].unbind(1)  # six of [R, 1, D]
            head_gates, group_gates = (None, None) if gates is None else gates[2 * block.index : 2 * block.index + 2]
            entering = self._modulated(stream, shift1, scale1, None, self.entering_type(block, "qkv"))
            stream = self.pointwise.gated(stream, gate1, self.attention(block, entering, head_gates))
            stream = self._modulated_mlp(block, self._between(block, stream), vectors, group_gates)
            self.finish_block(stream)
        shift, scale = condition[:, -2, None], condition[:, -1, None]
        last = PLAIN.modulated(stream, shift, scale, None, NORM_EPS, None)
        return unpatchify(F.linear(last, *self._final), self.config)

    def _between(self, block: SlicedBlock, x: Tensor) -> Tensor:
        """The stream [R, N, D] after what is between attention and MLP: nothing in a DiT."""
        return x

    def _modulated_mlp(self, block: SlicedBlock, x: Tensor, vectors: Sequence[Tensor], gates: Tensor | None) -> Tensor:
        shift, scale, gate = vectors  # [R, 1, D]
        dtype = self.entering_type(block, "fc1")
        return self.mlp(
            block,
            x,
            gates,
            lambda tokens, rows: self._modulated(tokens, shift, scale, rows, dtype),
            lambda branch, rows: self.pointwise.scaled(branch, gate, rows, x.dtype),
        )

    def _modulated(
        self, x: Tensor, shift: Tensor, scale: Tensor, rows: Tensor | None, dtype: torch.dtype | None
    ) -> Tensor:
        return self.pointwise.modulated(x, shift, scale, rows, NORM_EPS, dtype)
