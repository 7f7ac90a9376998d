"""The layout of stored weights: how a DiT's state dict becomes the tensors of a bundle's `weights.bin`.

All tensors are f32. D hidden channels, L blocks, patches of p*p, N tokens:

    embed.weight [C*p*p, D] (in, out; inputs ordered channel, y, x), embed.bias [D], pos_embed [N, D]
    blocks.{l}.*: the tensors of every block, see `dydit.models.transformer.layout`
    final.weight [p*p*Cout, D] (out, in), final.bias
    time.0.weight, .bias, time.2.weight, .bias (out, in), time.frequencies [128], label.table [classes+1, D]
    adaln.weight [(6L+2)*D, D] (out, in), adaln.bias: each block's six vectors, then the final layer's shift and scale
    width.weight [U, D] (out, in), width.bias [U]: a row for each unit of the model, by slot (dynamic models)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from dydit.models.architecture import Slots, stored_name
from dydit.models.dit.config import DiTConfig
from dydit.models.transformer.layout import block_tensors, packed, width_tensors
from dydit.models.transformer.modules import FREQUENCIES, sine_frequencies


def stored_tensors(
    state: Mapping[str, Tensor], config: DiTConfig, order: Slots | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) in storage order, one contiguous f32 tensor at a time, so that a writer can stream them.

    `state`: tensors by published name. `order`: by default that of the checkpoint.
    """
    order = order or config.units.every_unit
    yield "embed.weight", packed(state["x_embedder.proj.weight"].flatten(1).T)
    yield "embed.bias", packed(state["x_embedder.proj.bias"])
    yield "pos_embed", packed(state["pos_embed"][0])
    for block, (heads, groups) in enumerate(order):
        for name, tensor in block_tensors(state, config, block, heads, groups):
            yield stored_name(block, name), packed(tensor)
    yield "final.weight", packed(state["final_layer.linear.weight"])
    yield "final.bias", packed(state["final_layer.linear.bias"])
    for layer in (0, 2):
        for part in ("weight", "bias"):
            yield f"time.{layer}.{part}", packed(state[f"t_embedder.mlp.{layer}.{part}"])
    yield "time.frequencies", sine_frequencies(FREQUENCIES)
    yield "label.table", packed(state["y_embedder.embedding_table.weight"])
    layers = [*(f"blocks.{block}" for block in range(config.depth)), "final_layer"]
    for part in ("weight", "bias"):
        yield f"adaln.{part}", torch.cat([packed(state[f"{layer}.adaLN_modulation.1.{part}"]) for layer in layers])
    yield from width_tensors(state, config, order)
