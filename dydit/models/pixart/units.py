"""The stored shapes of a PixArt-alpha (`dydit.models.pixart.layout`). NumPy only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dydit.models.architecture import Product, block_of, stored_name
from dydit.models.transformer import units
from dydit.models.transformer.units import block_shapes, in_every_block, token_router_products, width_router_shapes

if TYPE_CHECKING:
    from dydit.models.pixart.config import PixArtConfig

Shape = tuple[int, ...]
CROSS_KV = ("cross_kv.weight", "cross_kv.bias")
CROSS = (*CROSS_KV, "cross_q.weight", "cross_q.bias", "cross_proj.weight", "cross_proj.bias")
"""The stored tensors of a block's cross-attention, within the block."""
CONDITIONING = ("time.", "size.", "ratio.", "adaln.", "text.", "width.")
"""Prefixes of the stored tensors that no subnetwork reads, because they depend on the timestep and the text alone."""
TEXT = "text."
"""Prefix of the stored tensors of the caption projection."""
_LOW_PRECISION = ("adaln.weight", "adaln.bias", "text.0.weight", "text.0.bias", "text.2.weight", "text.2.bias")


def stored_shapes(config: PixArtConfig) -> dict[str, Shape]:
    """Shape of every stored tensor."""
    d, outputs = config.hidden_size, config.patch_size**2 * config.out_channels
    cross = ((2 * d, d), (2 * d,), (d, d), (d,), (d, d), (d,))
    return {
        "embed.weight": (config.patch_features, d),
        "embed.bias": (d,),
        "pos_embed": (config.tokens, d),
        **in_every_block(config, block_shapes(config) | dict(zip(CROSS, cross, strict=True))),
        "final.weight": (outputs, d),
        "final.bias": (outputs,),
        **_two_layers("time", 256, d),
        "time.frequencies": (128,),
        **(_two_layers("size", 256, d // 3) | _two_layers("ratio", 256, d // 3) if config.micro_conditions else {}),
        "adaln.weight": (6 * d, d),
        "adaln.bias": (6 * d,),
        "adaln.tables": (config.vectors, d),
        **_two_layers("text", config.caption_channels, d),
        **width_router_shapes(config),
    }


def _two_layers(name: str, inputs: int, size: int) -> dict[str, Shape]:
    first: dict[str, Shape] = {f"{name}.0.weight": (size, inputs), f"{name}.0.bias": (size,)}
    return first | {f"{name}.2.weight": (size, size), f"{name}.2.bias": (size,)}


def step_products(config: PixArtConfig) -> tuple[Product, ...]:
    """The products of a step outside of unit groups: those of every transformer, and cross-attention.

    Each row reads the keys and values of its text, with as many tokens as the model was trained with.
    """
    n, d, tokens = config.tokens, config.hidden_size, config.text_tokens
    products = list(units.step_products(config))
    for block in range(config.depth):
        q, proj = (stored_name(block, f"cross_{layer}.weight") for layer in ("q", "proj"))
        mixing = Product(2 * n * tokens * d, n * d + 2 * tokens * d, n * d)
        products += [Product.of(q, n, d, d), mixing, Product.of(proj, n, d, d)]
    return tuple(products)


def low_precision(config: PixArtConfig) -> tuple[str, ...]:
    """The stored tensors, besides those of units' layers, that have the precision of the bundle."""
    return (*(stored_name(block, name) for block in range(config.depth) for name in CROSS), *_LOW_PRECISION)


def fp32_products(config: PixArtConfig) -> frozenset[str]:
    """The stored weights whose products are fp32 in every precision."""
    layers = ["time.0", "time.2", *(f"{name}.{layer}" for name in ("size", "ratio") for layer in (0, 2))]
    embedders = {f"{layer}.weight" for layer in layers} & stored_shapes(config).keys()
    return frozenset({"embed.weight", "final.weight"} | embedders) | token_router_products(config)


def is_conditioning(tensor: str) -> bool:
    """Whether no subnetwork reads a stored tensor."""
    return is_text(tensor) or (block_of(tensor) is None and tensor.startswith(CONDITIONING))


def is_text(tensor: str) -> bool:
    """Whether the text graph alone reads a stored tensor."""
    block = block_of(tensor)
    if block is not None:
        return tensor in {stored_name(block, name) for name in CROSS_KV}
    return tensor.startswith(TEXT)
