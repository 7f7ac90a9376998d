"""Attention and MLP of the sliced form (`dydit.models.sliced`). A block has h active heads and g active groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor

from dydit.models.sliced import SlicedBlock, SlicedModel
from dydit.models.transformer.modules import layer_norm, unpatchify


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


class ModulatedSliced(SlicedTransformer):
    """One subnetwork of a model whose condition is the modulation [R, 6L+2, D]."""

    def _output(self, x: Tensor, condition: Tensor, gates: Sequence[Tensor] | None) -> Tensor:
        stream = self.patch_tokens(x) + self._position
        stream = stream.repeat(len(condition) // len(x), 1, 1)
        for block in self.blocks:
            first = 6 * block.index
            shift1, scale1, gate1, *vectors = condition[:, first : first + 6, None].unbind(1)  # six of [R, 1, D]
            head_gates, group_gates = (None, None) if gates is None else gates[2 * block.index : 2 * block.index + 2]
            stream = stream + gate1 * self.attention(block, _modulate(stream, shift1, scale1), head_gates)
            stream = self._modulated_mlp(block, self._between(block, stream), vectors, group_gates)
            self.finish_block(stream)
        shift, scale = condition[:, -2, None], condition[:, -1, None]
        return unpatchify(F.linear(_modulate(stream, shift, scale), *self._final), self.config)

    def _between(self, block: SlicedBlock, x: Tensor) -> Tensor:
        """The stream [R, N, D] after what is between attention and MLP: nothing in a DiT."""
        return x

    def _modulated_mlp(self, block: SlicedBlock, x: Tensor, vectors: Sequence[Tensor], gates: Tensor | None) -> Tensor:
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


def _modulate(x: Tensor, shift: Tensor, scale_plus_one: Tensor) -> Tensor:
    return layer_norm(x) * scale_plus_one + shift
