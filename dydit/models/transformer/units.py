"""The units of a DiT's block, attention heads and as many groups of MLP channels, and its stored shapes. NumPy only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dydit.models.architecture import WIDTH_ROUTER, BlockSpec, Side, UnitGroup, UnitLayer, stored_name

if TYPE_CHECKING:
    from dydit.models.dit.config import DiTConfig

HEADS, GROUPS = "heads", "groups"
QKV, PROJ, FC1, FC2 = "qkv", "proj", "fc1", "fc2"
CONDITIONING_PRODUCT = ("adaln.weight", "adaln.bias")
"""The stored tensors outside of blocks that have the precision of the bundle."""
CONDITIONING = ("time.", "label.", "adaln.", "width.")
"""Prefixes of the stored tensors that no subnetwork reads, because they depend on the timestep and the label alone."""


def stored_shapes(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every stored tensor (`dydit.models.dit.layout`)."""
    d, patch, router = config.hidden_size, config.patch_size**2, config.token_router_hidden
    units, head, group, rows = config.num_heads, config.head_dim, config.group_dim, (6 * config.depth + 2) * d
    block: dict[str, tuple[int, ...]] = {
        "qkv.weight": (units, 3 * head, d),
        "qkv.bias": (units, 3 * head),
        "proj.weight": (units, head, d),
        "proj.bias": (d,),
        "fc1.weight": (units, group, d),
        "fc1.bias": (units, group),
        "fc2.weight": (units, group, d),
        "fc2.bias": (d,),
    }
    if config.dynamic:
        block |= {"router.0.weight": (router, d), "router.0.bias": (router,)}
        block |= {"router.2.weight": (1, router), "router.2.bias": (1,)}
    width = (config.units.size, d), (config.units.size,)
    return {
        "embed.weight": (config.in_channels * patch, d),
        "embed.bias": (d,),
        "pos_embed": (config.tokens, d),
        **{stored_name(index, name): shape for index in range(config.depth) for name, shape in block.items()},
        "final.weight": (patch * config.out_channels, d),
        "final.bias": (patch * config.out_channels,),
        "time.0.weight": (d, 256),
        "time.0.bias": (d,),
        "time.2.weight": (d, d),
        "time.2.bias": (d,),
        "time.frequencies": (128,),
        "label.table": (config.classes.rows, d),
        "adaln.weight": (rows, d),
        "adaln.bias": (rows,),
        **(dict(zip(WIDTH_ROUTER, width, strict=True)) if config.dynamic else {}),
    }


def attention_macs(config: DiTConfig) -> int:
    """Multiply-adds of one block's attention for one image, all heads on: 4ND^2 + 2N^2 D."""
    n, d = config.tokens, config.hidden_size
    return 4 * n * d * d + 2 * n * n * d


def mlp_macs(config: DiTConfig) -> int:
    """Multiply-adds of one block's MLP for one image, all groups and tokens on: 8ND^2."""
    return 8 * config.tokens * config.hidden_size**2


def fp32_products(config: DiTConfig) -> frozenset[str]:
    """The stored weights whose products are fp32 in every precision."""
    blocks = range(config.depth) if config.dynamic else ()
    routers = (stored_name(block, f"router.{layer}.weight") for block in blocks for layer in (0, 2))
    return frozenset({"embed.weight", "final.weight", "time.0.weight", "time.2.weight", *routers})


def block_spec(config: DiTConfig) -> BlockSpec:
    """The block of a model, all of whose blocks are alike."""
    d, units, head, group = config.hidden_size, config.num_heads, config.head_dim, config.group_dim
    attention = (UnitLayer(QKV, Side.OUTPUT, 3 * head, d), UnitLayer(PROJ, Side.INPUT, head, d))
    mlp = (UnitLayer(FC1, Side.OUTPUT, group, d), UnitLayer(FC2, Side.INPUT, group, d, scaled_inputs=True))
    return BlockSpec(
        (
            UnitGroup(HEADS, units, attention, attention_macs(config) / units, attention=True, title="attention heads"),
            UnitGroup(GROUPS, units, mlp, mlp_macs(config) / units, routed=True, title="channel groups"),
        )
    )
