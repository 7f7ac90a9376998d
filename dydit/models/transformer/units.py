"""The units of a block, attention heads and as many groups of MLP channels, and its stored shapes. NumPy only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dydit.models.architecture import WIDTH_ROUTER, BlockSpec, Product, Side, UnitGroup, UnitLayer, stored_name

if TYPE_CHECKING:
    from dydit.models.transformer.config import TransformerConfig

Shape = tuple[int, ...]
HEADS, GROUPS = "heads", "groups"
QKV, PROJ, FC1, FC2 = "qkv", "proj", "fc1", "fc2"
TOKEN_ROUTER_LAYERS = ("router.0", "router.2")


def block_shapes(config: TransformerConfig) -> dict[str, Shape]:
    """Shapes of the stored tensors that every block has, by name within the block."""
    d, units, head, group = config.hidden_size, config.num_heads, config.head_dim, config.group_dim
    hidden = config.token_router_hidden
    shapes: dict[str, Shape] = {
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
        shapes |= {"router.0.weight": (hidden, d), "router.0.bias": (hidden,)}
        shapes |= {"router.2.weight": (1, hidden), "router.2.bias": (1,)}
    return shapes


def in_every_block(config: TransformerConfig, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """The shapes of a block's tensors for all blocks, by full name, block after block."""
    return {stored_name(block, name): shape for block in range(config.depth) for name, shape in shapes.items()}


def width_router_shapes(config: TransformerConfig) -> dict[str, Shape]:
    """Shapes of the stored width routers; none for a static model."""
    shapes = (config.units.size, config.hidden_size), (config.units.size,)
    return dict(zip(WIDTH_ROUTER, shapes, strict=True)) if config.dynamic else {}


def token_router_products(config: TransformerConfig) -> frozenset[str]:
    """The stored weights of the token routers, whose products are fp32 in every precision."""
    blocks = range(config.depth) if config.dynamic else ()
    return frozenset(stored_name(block, f"{layer}.weight") for block in blocks for layer in TOKEN_ROUTER_LAYERS)


def step_products(config: TransformerConfig) -> tuple[Product, ...]:
    """The products of a step outside of unit groups that every model has: embedding, final layer, token routers."""
    d, hidden, patch = config.hidden_size, config.token_router_hidden, config.patch_features
    outputs = config.patch_size**2 * config.out_channels
    first, second = (f"{layer}.weight" for layer in TOKEN_ROUTER_LAYERS)
    routers = (
        product
        for block in (range(config.depth) if config.dynamic else ())
        for product in (
            Product.of(stored_name(block, first), config.tokens, d, hidden, router=True),
            Product.of(stored_name(block, second), config.tokens, hidden, 1, router=True),
        )
    )
    return (
        Product.of("embed.weight", config.patches, patch, d, once=True),
        *routers,
        Product.of("final.weight", config.patches, d, outputs),
    )


def attention_macs(config: TransformerConfig) -> int:
    """Multiply-adds of one block's attention for one image, all heads on: 4ND^2 + 2N^2 D."""
    n, d = config.patches, config.hidden_size
    return 4 * n * d * d + 2 * n * n * d


def mlp_macs(config: TransformerConfig) -> int:
    """Multiply-adds of one block's MLP for one image, all groups and tokens on: 8ND^2."""
    return 8 * config.patches * config.hidden_size**2


def block_spec(config: TransformerConfig) -> BlockSpec:
    """The block of a model, all of whose blocks have the same units."""
    d, units, head, group = config.hidden_size, config.num_heads, config.head_dim, config.group_dim
    attention = (UnitLayer(QKV, Side.OUTPUT, 3 * head, d), UnitLayer(PROJ, Side.INPUT, head, d))
    mixing = 2 * config.patches**2 * head
    mlp = (UnitLayer(FC1, Side.OUTPUT, group, d), UnitLayer(FC2, Side.INPUT, group, d, scaled_inputs=True))
    return BlockSpec(
        (
            UnitGroup(
                HEADS,
                units,
                attention,
                attention_macs(config) / units,
                attention=True,
                title="attention heads",
                attention_macs=mixing,
            ),
            UnitGroup(GROUPS, units, mlp, mlp_macs(config) / units, routed=True, title="channel groups"),
        )
    )
