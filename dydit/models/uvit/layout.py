"""The layout of stored weights: how a U-ViT's state dict becomes the tensors of a bundle's `weights.bin`.

All tensors are f32. D hidden channels, L blocks, patches of p*p, E extra tokens (class, time), K rows of classes:

    embed.weight [C*p*p, D] (in, out; inputs ordered channel, y, x), embed.bias [D], pos_embed [patches, D]
    blocks.{l}.*: the tensors of every block, see `dydit.models.transformer.layout`; qkv.bias is zeros
    blocks.{l}.norm1.weight, .bias, norm2.weight, .bias [D]
    blocks.{l}.skip.weight [D, 2D] (out, in; stream, then skip), .bias [D] (second half)
    norm.weight, .bias [D], final.weight [p*p*C, D] (out, in), final.bias, conv.weight [C, C, 3, 3], .bias (optional)
    time.0.weight, .bias, time.2.weight, .bias (out, in; optional), time.frequencies [D/2]
    extra_positions [E, D], label.table [K, D] (unless unconditional)
    width.weight [U, D] (out, in), width.bias [U]: a row for each unit of the model, by slot (dynamic models)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from dydit.models.architecture import Slots, stored_name
from dydit.models.transformer.layout import block_tensors, packed, width_tensors
from dydit.models.transformer.modules import sine_frequencies
from dydit.models.uvit.config import UViTConfig

_PARTS = ("weight", "bias")


def stored_tensors(
    state: Mapping[str, Tensor], config: UViTConfig, order: Slots | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) in storage order, one contiguous f32 tensor at a time, so that a writer can stream them.

    `state`: tensors by published name. `order`: by default that of the checkpoint.
    """
    order, extra = order or config.units.every_unit, config.extra_tokens
    yield "embed.weight", packed(state["patch_embed.proj.weight"].flatten(1).T)
    yield "embed.bias", packed(state["patch_embed.proj.bias"])
    yield "pos_embed", packed(state["pos_embed"][0, extra:])
    for block, (heads, groups) in enumerate(order):
        for name, tensor in block_tensors(state, config, block, heads, groups):
            yield stored_name(block, name), packed(tensor)
        layers = {"norm1": "norm1", "norm2": "norm2"} | ({"skip": "skip_linear"} if config.has_skip(block) else {})
        for stored, published in layers.items():
            for part in _PARTS:
                tensor = state[f"{config.block_name(block)}.{published}.{part}"]
                yield stored_name(block, f"{stored}.{part}"), packed(tensor)
    ends = {"norm": "norm", "final": "decoder_pred"} | ({"conv": "final_layer"} if config.conv else {})
    ends |= {f"time.{layer}": f"time_embed.{layer}" for layer in (0, 2) if config.mlp_time_embed}
    for stored, published in ends.items():
        for part in _PARTS:
            yield f"{stored}.{part}", packed(state[f"{published}.{part}"])
    yield "time.frequencies", sine_frequencies(config.hidden_size)
    yield "extra_positions", packed(state["pos_embed"][0, :extra])
    if config.num_classes:
        yield "label.table", packed(state["label_emb.weight"])
    yield from width_tensors(state, config, order)
