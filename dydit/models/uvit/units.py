"""The stored shapes of a U-ViT (`dydit.models.uvit.layout`). NumPy only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dydit.models.architecture import Product, stored_name
from dydit.models.transformer import units
from dydit.models.transformer.units import block_shapes, in_every_block, token_router_products, width_router_shapes

if TYPE_CHECKING:
    from dydit.models.uvit.config import UViTConfig

Shape = tuple[int, ...]
CONDITIONING = ("time.", "label.", "extra_positions", "width.")
"""Prefixes of the stored tensors that no subnetwork reads, because they depend on the timestep and the label alone."""
SKIP = ("skip.weight", "skip.bias")


def stored_shapes(config: UViTConfig) -> dict[str, Shape]:
    """Shape of every stored tensor."""
    d, outputs, c = config.hidden_size, config.patch_size**2 * config.out_channels, config.out_channels
    norms: dict[str, Shape] = {f"norm{place}.{part}": (d,) for place in (1, 2) for part in ("weight", "bias")}
    shapes: dict[str, Shape] = {
        "embed.weight": (config.patch_features, d),
        "embed.bias": (d,),
        "pos_embed": (config.patches, d),
        **in_every_block(config, block_shapes(config) | norms),
    }
    for block in filter(config.has_skip, range(config.depth)):
        shapes |= {stored_name(block, "skip.weight"): (d, 2 * d), stored_name(block, "skip.bias"): (d,)}
    shapes |= {"norm.weight": (d,), "norm.bias": (d,), "final.weight": (outputs, d), "final.bias": (outputs,)}
    if config.conv:
        shapes |= {"conv.weight": (c, c, 3, 3), "conv.bias": (c,)}
    if config.mlp_time_embed:
        shapes |= {"time.0.weight": (4 * d, d), "time.0.bias": (4 * d,)}
        shapes |= {"time.2.weight": (d, 4 * d), "time.2.bias": (d,)}
    shapes |= {"time.frequencies": (d // 2,), "extra_positions": (config.extra_tokens, d)}
    if config.num_classes:
        shapes["label.table"] = (config.classes.rows, d)
    return shapes | width_router_shapes(config)


def step_products(config: UViTConfig) -> tuple[Product, ...]:
    """The products of a step outside of unit groups: those of every transformer, long skips, and the convolution."""
    d, c, pixels = config.hidden_size, config.out_channels, config.input_size**2
    skips = (
        Product.of(stored_name(block, SKIP[0]), config.tokens, 2 * d, d)
        for block in filter(config.has_skip, range(config.depth))
    )
    conv = (Product(9 * c * c * pixels, c * pixels, c * pixels, "conv.weight"),) if config.conv else ()
    return (*units.step_products(config), *skips, *conv)


def skip_tensors(config: UViTConfig) -> tuple[str, ...]:
    """The stored tensors of the long skips, which have the precision of the bundle."""
    return tuple(stored_name(block, name) for block in filter(config.has_skip, range(config.depth)) for name in SKIP)


def absent_biases(config: UViTConfig) -> tuple[str, ...]:
    """Stored tensors of zeros, for the biases that queries, keys and values do not have."""
    return tuple(stored_name(block, "qkv.bias") for block in range(config.depth))


def fp32_products(config: UViTConfig) -> frozenset[str]:
    """The stored weights whose products are fp32 in every precision."""
    names = {"embed.weight", "final.weight", "conv.weight", "time.0.weight", "time.2.weight"}
    return frozenset(names & stored_shapes(config).keys()) | token_router_products(config)
