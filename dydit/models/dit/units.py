"""The stored shapes of a DiT (`dydit.models.dit.layout`). NumPy only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dydit.models.transformer.units import block_shapes, in_every_block, token_router_products, width_router_shapes

if TYPE_CHECKING:
    from dydit.models.dit.config import DiTConfig

CONDITIONING_PRODUCT = ("adaln.weight", "adaln.bias")
"""The stored tensors outside of blocks that have the precision of the bundle."""
CONDITIONING = ("time.", "label.", "adaln.", "width.")
"""Prefixes of the stored tensors that no subnetwork reads, because they depend on the timestep and the label alone."""


def stored_shapes(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every stored tensor."""
    d, outputs = config.hidden_size, config.patch_size**2 * config.out_channels
    rows = (6 * config.depth + 2) * d
    return {
        "embed.weight": (config.patch_features, d),
        "embed.bias": (d,),
        "pos_embed": (config.tokens, d),
        **in_every_block(config, block_shapes(config)),
        "final.weight": (outputs, d),
        "final.bias": (outputs,),
        "time.0.weight": (d, 256),
        "time.0.bias": (d,),
        "time.2.weight": (d, d),
        "time.2.bias": (d,),
        "time.frequencies": (128,),
        "label.table": (config.classes.rows, d),
        "adaln.weight": (rows, d),
        "adaln.bias": (rows,),
        **width_router_shapes(config),
    }


def fp32_products(config: DiTConfig) -> frozenset[str]:
    """The stored weights whose products are fp32 in every precision."""
    ends = {"embed.weight", "final.weight", "time.0.weight", "time.2.weight"}
    return frozenset(ends) | token_router_products(config)
