"""The configuration of a DiT, and its published presets. NumPy only."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from dydit.errors import ConfigError
from dydit.models.config import ClassLabels, ModelConfig, Routers, parse_config
from dydit.models.dit import units
from dydit.models.transformer.config import ModulatedConfig
from dydit.models.transformer.units import attention_macs, mlp_macs


class DiTConfig(ModulatedConfig):
    """Sizes of a DiT (Peebles & Xie 2023) and the layout of its DyDiT routers.

    There are N = (input_size/patch_size)**2 tokens.
    `null_class_row`: whether the class table has a row for "no class" after the rows of the classes.
    """

    UNSTATED: ClassVar[dict[str, Any]] = {**ModelConfig.UNSTATED, "null_class_row": True}

    architecture: Literal["dit"] = "dit"
    num_classes: int = Field(default=1000, gt=0)
    null_class_row: bool = True

    @model_validator(mode="after")
    def _in_quarters(self) -> DiTConfig:
        if self.hidden_size % 4:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of 4 (2-D sine position embedding)")
        return self

    @property
    def classes(self) -> ClassLabels:
        return ClassLabels(self.num_classes, self.num_classes if self.null_class_row else None)

    def with_classes(self, count: int) -> Self:
        return self.model_copy(update={"num_classes": count, "class_names": None})

    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        return units.stored_shapes(self)

    @property
    def low_precision(self) -> tuple[str, ...]:
        return units.CONDITIONING_PRODUCT

    @property
    def fp32_products(self) -> frozenset[str]:
        return units.fp32_products(self)

    @property
    def title(self) -> str:
        return "DyDiT" if self.dynamic else "DiT"

    @property
    def derived(self) -> frozenset[str]:
        return frozenset({"time.frequencies"})

    def is_conditioning(self, tensor: str) -> bool:
        return tensor.startswith(units.CONDITIONING)

    @property
    def macs(self) -> int:
        """Blocks, adaLN projections, embedders, final layer, and 4 per LayerNorm element: 6.07 G for S/2, 23.02 G for
        B/2 and 118.69 G for XL/2 at 256 px.
        """
        n, d, patch = self.tokens, self.hidden_size, self.patch_size**2
        blocks = self.depth * (attention_macs(self) + mlp_macs(self) + 6 * d * d)
        embed = n * patch * self.in_channels * d + 256 * d + d * d
        final = n * d * patch * self.out_channels + 2 * d * d
        norms = 4 * n * d * (2 * self.depth + 1)
        return blocks + embed + final + norms


_DIGITS = {
    "hidden_size": 128,
    "depth": 6,
    "num_heads": 8,
    "patch_size": 2,
    "input_size": 16,
    "in_channels": 1,
    "num_classes": 10,
    "routers": Routers.NONE,
}
_SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}


def preset(name: str, input_size: int = 32, **changes: Any) -> DiTConfig:
    """The published sizes by name: `S/2`, `B/4`, `XL/2`, ... for a latent of `input_size` (32 at 256 px, 64 at 512 px);
    or `digits`, the static model of handwritten digits that comes with dydit.

    Raises `ConfigError`, which lists the presets, for a name that is not one of them.
    """
    if name == "digits":
        return parse_config(DiTConfig, {**_DIGITS, **changes})
    size, _, patch = name.removeprefix("DiT-").removeprefix("DyDiT-").partition("/")
    if size not in _SIZES or patch not in ("2", "4", "8"):
        known = ", ".join(f"{s}/{p}" for s in _SIZES for p in (2, 4, 8))
        raise ConfigError(f"unknown preset {name!r}; expected one of: {known}")
    hidden, depth, heads = _SIZES[size]
    fields = {"hidden_size": hidden, "depth": depth, "num_heads": heads, "patch_size": int(patch)}
    return parse_config(DiTConfig, {**fields, "input_size": input_size, **changes})
