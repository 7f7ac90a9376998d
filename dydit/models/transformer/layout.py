"""How a block's tensors of a state dict become stored tensors (`dydit.models.transformer.units.block_shapes`).

Heads and groups are stored by slot: `order[l][g][slot]` is the checkpoint's unit in a slot of block l's heads (g = 0)
or groups (g = 1). The values of a unit are one contiguous row of a tensor's first axis, so a set of units is a set of
rows. H heads and groups, hd channels per head, gs per group, D hidden channels:

    qkv.weight [H, 3*hd, D] (out, in; per head its q rows, k rows, v rows), qkv.bias [H, 3*hd]
    proj.weight [H, hd, D] (in, out), proj.bias [D]
    fc1.weight [H, gs, D] (out, in), fc1.bias [H, gs]; fc2.weight [H, gs, D] (in, out), fc2.bias [D]
    router.0.weight [D/16, D], router.0.bias, router.2.weight [1, D/16], router.2.bias (dynamic models)

The width routers of all blocks are one layer, width.weight [U, D] and width.bias [U].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from dydit.models.architecture import WIDTH_ROUTER, Slots
from dydit.models.routers import width_router_rows
from dydit.models.transformer.config import TransformerConfig
from dydit.models.transformer.units import GROUPS, HEADS, TOKEN_ROUTER_LAYERS

_WIDTH = {HEADS: "attn_rate", GROUPS: "mlp_rate"}


def block_tensors(
    state: Mapping[str, Tensor], config: TransformerConfig, block: int, heads: Sequence[int], groups: Sequence[int]
) -> Iterator[tuple[str, Tensor]]:
    """(name within the block, tensor) of what every block has, in storage order. `heads`, `groups`: by slot."""
    prefix = config.block_name(block)

    def of(name: str) -> Tensor:
        return state[f"{prefix}.{name}"]

    d, hd, gs, h, g = config.hidden_size, config.head_dim, config.group_dim, list(heads), list(groups)
    bias = of("attn.qkv.bias") if config.QKV_BIAS else torch.zeros(3 * d)
    yield "qkv.weight", of("attn.qkv.weight").reshape(3, -1, hd, d).transpose(0, 1)[h].flatten(1, 2)
    yield "qkv.bias", bias.reshape(3, -1, hd).transpose(0, 1)[h].flatten(1, 2)
    yield "proj.weight", of("attn.proj.weight").T.reshape(-1, hd, d)[h]
    yield "proj.bias", of("attn.proj.bias")
    yield "fc1.weight", of("mlp.fc1.weight").reshape(-1, gs, d)[g]
    yield "fc1.bias", of("mlp.fc1.bias").reshape(-1, gs)[g]
    yield "fc2.weight", of("mlp.fc2.weight").T.reshape(-1, gs, d)[g]
    yield "fc2.bias", of("mlp.fc2.bias")
    if config.dynamic:
        for layer in TOKEN_ROUTER_LAYERS:
            published = layer.replace("router", "token_selection.mlp_head")
            for part in ("weight", "bias"):
                yield f"{layer}.{part}", of(f"{published}.{part}")


def width_tensors(state: Mapping[str, Tensor], config: TransformerConfig, order: Slots) -> Iterator[tuple[str, Tensor]]:
    """The stored width routers; none for a static model."""
    if config.dynamic:
        names = [f"{config.block_name(part.block)}.{_WIDTH[part.group.name]}.router" for part in config.units.parts]
        routers = [(state[f"{name}.weight"], state[f"{name}.bias"]) for name in names]
        yield from zip(WIDTH_ROUTER, width_router_rows(config, routers, order), strict=True)


def packed(tensor: Tensor) -> Tensor:
    """A tensor as it is stored: f32, contiguous."""
    return tensor.detach().to(torch.float32).contiguous()
