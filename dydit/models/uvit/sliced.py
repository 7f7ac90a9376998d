"""The sliced form of a U-ViT (`dydit.models.sliced`), on the stored layout of `dydit.models.uvit.layout`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dydit.models.architecture import stored_name
from dydit.models.pointwise import PLAIN
from dydit.models.sliced import SlicedBlock
from dydit.models.transformer.modules import sinusoid, unpatchify
from dydit.models.transformer.sliced import SlicedTransformer
from dydit.models.uvit.config import UViTConfig
from dydit.models.uvit.model import NORM_EPS


class SlicedUViT(SlicedTransformer):
    """One subnetwork of a U-ViT. Its condition is the tokens of class and time [R, E, D]."""

    def _take(self, weights: Mapping[str, Tensor]) -> None:
        super()._take(weights)

        def pair(name: str) -> tuple[Tensor, Tensor]:
            return weights[f"{name}.weight"], weights[f"{name}.bias"]

        blocks = range(self.config.depth)
        self._norms = [[pair(stored_name(block, f"norm{place}")) for place in (1, 2)] for block in blocks]
        self._skips = {block: pair(stored_name(block, "skip")) for block in filter(self.config.has_skip, blocks)}
        self._norm = pair("norm")
        self._conv = pair("conv") if self.config.conv else None

    def _output(self, x: Tensor, condition: Tensor, gates: Sequence[Tensor] | None) -> Tensor:
        patches = self.patch_tokens(x) + self._position
        stream = torch.cat([condition, patches.repeat(len(condition) // len(x), 1, 1)], 1)
        skips: list[Tensor] = []
        for block in self.blocks:
            index = block.index
            if index in self._skips:
                stream = self._joined(index, stream, skips.pop())
            heads, groups = (None, None) if gates is None else gates[2 * index : 2 * index + 2]
            entering = self._normed(stream, self._norms[index][0], self.entering_type(block, "qkv"))
            stream = stream + self.attention(block, entering, heads).to(stream.dtype)
            stream = self._mlp(block, stream, groups)
            self.finish_block(stream)
            if index < self.config.half:
                skips.append(stream)
        last = PLAIN.normed(stream[:, self.config.extra_tokens :], *self._norm, NORM_EPS, None)
        patches = F.linear(last, *self._final)
        image = unpatchify(patches, self.config)
        return image if self._conv is None else F.conv2d(image, *self._conv, padding=1)

    def _mlp(self, block: SlicedBlock, x: Tensor, gates: Tensor | None) -> Tensor:
        norm = self._norms[block.index][1]
        dtype = self.entering_type(block, "fc1")
        return self.mlp(block, x, gates, lambda tokens, rows: self._normed(tokens, norm, dtype))

    def _joined(self, block: int, stream: Tensor, skip: Tensor) -> Tensor:
        weight, bias = self._skips[block]
        return F.linear(torch.cat([stream, skip], -1).to(weight.dtype), weight, bias).to(stream.dtype)

    def _normed(self, x: Tensor, norm: tuple[Tensor, Tensor], dtype: torch.dtype | None) -> Tensor:
        return self.pointwise.normed(x, *norm, NORM_EPS, dtype)


@torch.inference_mode()
def conditioning(config: UViTConfig, weights: Mapping[str, Tensor], timesteps: Tensor, labels: Tensor) -> Tensor:
    """The tokens of class and time for every (timestep, label) pair, with position: [T], [R] -> [T, R, E, D]."""
    time = sinusoid(timesteps + config.first_time, weights["time.frequencies"]).to(weights["extra_positions"].dtype)
    if config.mlp_time_embed:
        hidden = F.silu(F.linear(time, weights["time.0.weight"], weights["time.0.bias"]))
        time = F.linear(hidden, weights["time.2.weight"], weights["time.2.bias"])
    shape = len(timesteps), len(labels), config.hidden_size
    tokens = [time[:, None].expand(shape)]
    if config.num_classes:
        tokens.insert(0, weights["label.table"][labels].expand(shape))
    return torch.stack(tokens, 2) + weights["extra_positions"]
