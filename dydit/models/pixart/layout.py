"""The layout of stored weights: how a PixArt-alpha's state dict becomes the tensors of a bundle's `weights.bin`.

All tensors are f32. D hidden channels, L blocks, patches of p*p, N tokens, texts with T channels:

    embed.weight [C*p*p, D] (in, out; inputs ordered channel, y, x), embed.bias [D], pos_embed [N, D] (computed)
    blocks.{l}.*: the tensors of every block, see `dydit.models.transformer.layout`
    blocks.{l}.cross_kv.weight [2D, D], cross_q.weight [D, D], cross_proj.weight [D, D] (out, in), each with .bias
    final.weight [p*p*Cout, D] (out, in), final.bias
    time.0.weight, .bias, time.2.weight, .bias (out, in), time.frequencies [128]
    size.0, size.2, ratio.0, ratio.2, each with .weight and .bias, [D/3, 256] and [D/3, D/3] (micro-conditions)
    adaln.weight [6D, D] (out, in), adaln.bias: the vectors that all blocks share
    adaln.tables [6L+2, D]: what is added to them in each block, then to the embedding in the final layer
    text.0.weight [D, T], text.2.weight [D, D] (out, in), each with .bias
    width.weight [U, D] (out, in), width.bias [U]: a row for each unit of the model, by slot (dynamic models)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from dydit.models.architecture import Slots, stored_name
from dydit.models.pixart.config import PixArtConfig
from dydit.models.transformer.layout import block_tensors, packed, width_tensors
from dydit.models.transformer.modules import FREQUENCIES, sine_frequencies, sine_positions

_CROSS = {"cross_kv": "kv_linear", "cross_q": "q_linear", "cross_proj": "proj"}
_TIME = {"time.0": "t_embedder.mlp.0", "time.2": "t_embedder.mlp.2"}
_MICRO = {
    "size.0": "csize_embedder.mlp.0",
    "size.2": "csize_embedder.mlp.2",
    "ratio.0": "ar_embedder.mlp.0",
    "ratio.2": "ar_embedder.mlp.2",
}
_TEXT = {"text.0": "y_embedder.y_proj.fc1", "text.2": "y_embedder.y_proj.fc2"}


def stored_tensors(
    state: Mapping[str, Tensor], config: PixArtConfig, order: Slots | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) in storage order, one contiguous f32 tensor at a time, so that a writer can stream them.

    `state`: tensors by published name. `order`: by default that of the checkpoint.
    """
    order = order or config.units.every_unit

    def layers(names: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
        for stored, published in names.items():
            for part in ("weight", "bias"):
                yield f"{stored}.{part}", packed(state[f"{published}.{part}"])

    yield "embed.weight", packed(state["x_embedder.proj.weight"].flatten(1).T)
    yield "embed.bias", packed(state["x_embedder.proj.bias"])
    yield "pos_embed", sine_positions(config, config.interpolation_scale)[0]
    for block, (heads, groups) in enumerate(order):
        for name, tensor in block_tensors(state, config, block, heads, groups):
            yield stored_name(block, name), packed(tensor)
        prefix = f"{config.block_name(block)}.cross_attn"
        yield from layers({stored_name(block, stored): f"{prefix}.{name}" for stored, name in _CROSS.items()})
    yield from layers({"final": "final_layer.linear", **_TIME})
    yield "time.frequencies", sine_frequencies(FREQUENCIES)
    yield from layers((_MICRO if config.micro_conditions else {}) | {"adaln": "t_block.1"})
    tables = [f"{config.block_name(block)}.scale_shift_table" for block in range(config.depth)]
    yield "adaln.tables", torch.cat([packed(state[name]) for name in (*tables, "final_layer.scale_shift_table")])
    yield from layers(_TEXT)
    yield from width_tensors(state, config, order)
