"""The layout of stored weights: how a DiT's state dict becomes the tensors of a bundle's `weights.bin`.

Heads and groups are stored by slot: `order[l][g][slot]` is the checkpoint's unit in a slot of block l's heads (g = 0)
or groups (g = 1). The values of a unit are one contiguous row of a tensor's first axis, so a set of units is a set of
rows. All tensors are f32. D hidden channels, H heads and groups, hd channels per head, gs per group, L blocks, patches
of p*p, N tokens:

    embed.weight [C*p*p, D] (in, out; inputs ordered channel, y, x), embed.bias [D], pos_embed [N, D]
    blocks.{l}.qkv.weight [H, 3*hd, D] (out, in; per head its q rows, k rows, v rows), blocks.{l}.qkv.bias [H, 3*hd]
    blocks.{l}.proj.weight [H, hd, D] (in, out), blocks.{l}.proj.bias [D]
    blocks.{l}.fc1.weight [H, gs, D] (out, in), .fc1.bias [H, gs]; .fc2.weight [H, gs, D] (in, out), .fc2.bias [D]
    blocks.{l}.router.0.weight [D/16, D], .router.0.bias, .router.2.weight [1, D/16], .router.2.bias (dynamic models)
    final.weight [p*p*Cout, D] (out, in), final.bias
    time.0.weight, .bias, time.2.weight, .bias (out, in), time.frequencies [128], label.table [classes+1, D]
    adaln.weight [(6L+2)*D, D] (out, in), adaln.bias: each block's six vectors, then the final layer's shift and scale
    width.weight [U, D] (out, in), width.bias [U]: a row for each unit of the model, by slot (dynamic models)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from dydit.models.architecture import WIDTH_ROUTER, Slots, stored_name
from dydit.models.dit.config import DiTConfig
from dydit.models.dit.model import timestep_frequencies
from dydit.models.dit.units import GROUPS, HEADS
from dydit.models.routers import width_router_rows

_WIDTH = {HEADS: "attn_rate", GROUPS: "mlp_rate"}


def stored_tensors(
    state: Mapping[str, Tensor], config: DiTConfig, order: Slots | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) in storage order, one contiguous f32 tensor at a time, so that a writer can stream them.

    `state`: tensors by published name. `order`: by default that of the checkpoint.
    """
    order = order or config.units.every_unit
    yield "embed.weight", _packed(state["x_embedder.proj.weight"].flatten(1).T)
    yield "embed.bias", _packed(state["x_embedder.proj.bias"])
    yield "pos_embed", _packed(state["pos_embed"][0])
    for block, (heads, groups) in enumerate(order):
        for name, tensor in _block_tensors(state, config, block, heads, groups):
            yield stored_name(block, name), _packed(tensor)
    yield "final.weight", _packed(state["final_layer.linear.weight"])
    yield "final.bias", _packed(state["final_layer.linear.bias"])
    for layer in (0, 2):
        for part in ("weight", "bias"):
            yield f"time.{layer}.{part}", _packed(state[f"t_embedder.mlp.{layer}.{part}"])
    yield "time.frequencies", timestep_frequencies()
    yield "label.table", _packed(state["y_embedder.embedding_table.weight"])
    layers = [*(f"blocks.{block}" for block in range(config.depth)), "final_layer"]
    for part in ("weight", "bias"):
        yield f"adaln.{part}", torch.cat([_packed(state[f"{layer}.adaLN_modulation.1.{part}"]) for layer in layers])
    if config.dynamic:
        names = [f"blocks.{part.block}.{_WIDTH[part.group.name]}.router" for part in config.units.parts]
        routers = [(state[f"{name}.weight"], state[f"{name}.bias"]) for name in names]
        yield from zip(WIDTH_ROUTER, width_router_rows(config, routers, order), strict=True)


def _block_tensors(
    state: Mapping[str, Tensor], config: DiTConfig, block: int, heads: Sequence[int], groups: Sequence[int]
) -> Iterator[tuple[str, Tensor]]:
    def of(name: str) -> Tensor:
        return state[f"blocks.{block}.{name}"]

    d, hd, gs, h, g = config.hidden_size, config.head_dim, config.group_dim, list(heads), list(groups)
    yield "qkv.weight", of("attn.qkv.weight").reshape(3, -1, hd, d).transpose(0, 1)[h].flatten(1, 2)
    yield "qkv.bias", of("attn.qkv.bias").reshape(3, -1, hd).transpose(0, 1)[h].flatten(1, 2)
    yield "proj.weight", of("attn.proj.weight").T.reshape(-1, hd, d)[h]
    yield "proj.bias", of("attn.proj.bias")
    yield "fc1.weight", of("mlp.fc1.weight").reshape(-1, gs, d)[g]
    yield "fc1.bias", of("mlp.fc1.bias").reshape(-1, gs)[g]
    yield "fc2.weight", of("mlp.fc2.weight").T.reshape(-1, gs, d)[g]
    yield "fc2.bias", of("mlp.fc2.bias")
    if config.dynamic:
        for layer in (0, 2):
            for part in ("weight", "bias"):
                yield f"router.{layer}.{part}", of(f"token_selection.mlp_head.{layer}.{part}")


def _packed(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float32).contiguous()
