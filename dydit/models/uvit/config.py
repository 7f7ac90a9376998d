"""The configuration of a U-ViT, and its published presets. NumPy only."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from dydit.diffusion.process import NoiseSchedule, Process
from dydit.errors import ConfigError
from dydit.models.config import ClassLabels, parse_config
from dydit.models.transformer.config import TransformerConfig
from dydit.models.uvit import units


class UViTConfig(TransformerConfig):
    """Sizes of a U-ViT (Bao et al. 2023) and the layout of its routers.

    `depth`: all blocks L, an odd number: (L-1)/2 before the middle one and as many after it. (The published settings
    count one less.) The tokens are that of the class, if there are classes, that of the time, and the patches.
    `num_classes`: without the row for "no class"; 0 for an unconditional model. `null_class_row`: whether the class
    table has a row for "no class" after those of the classes. `mlp_time_embed`: whether the time token is an MLP of the
    sinusoid, and not the sinusoid itself. `conv`: whether a 3x3 convolution follows the last linear layer. `skip`:
    whether the blocks of the second half have long skips.
    """

    GELU: ClassVar[Literal["tanh", "none"]] = "none"
    QKV_BIAS: ClassVar[bool] = False

    architecture: Literal["uvit"] = "uvit"
    learn_sigma: Literal[False] = False
    num_classes: int = Field(default=0, ge=0)
    null_class_row: bool = False
    mlp_time_embed: bool = False
    conv: bool = True
    skip: bool = True

    @model_validator(mode="after")
    def _of_two_halves(self) -> UViTConfig:
        if self.depth % 2 == 0:
            raise ValueError(f"depth {self.depth}: a U-ViT has an odd number of blocks, one of them in the middle")
        if self.hidden_size % 2:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of 2 (sinusoid of the time)")
        if self.null_class_row and not self.num_classes:
            raise ValueError("null_class_row: an unconditional model has no class table")
        return self

    @property
    def extra_tokens(self) -> int:
        return 2 if self.num_classes else 1

    @property
    def half(self) -> int:
        """The number of blocks before the middle one, and of those after it."""
        return self.depth // 2

    def block_name(self, block: int) -> str:
        if block == self.half:
            return "mid_block"
        return f"in_blocks.{block}" if block < self.half else f"out_blocks.{block - self.half - 1}"

    def has_skip(self, block: int) -> bool:
        """Whether a block reads the output of its counterpart in the first half."""
        return self.skip and block > self.half

    @property
    def classes(self) -> ClassLabels:
        if not self.num_classes:
            return ClassLabels(1, None)
        return ClassLabels(self.num_classes, self.num_classes if self.null_class_row else None)

    @property
    def condition_shape(self) -> tuple[int, ...]:
        return (self.extra_tokens, self.hidden_size)

    @property
    def usual_process(self) -> Process:
        """Stable Diffusion's betas for the published H sizes, a VP-SDE for all others."""
        if (self.hidden_size, self.depth) == (1152, 29):
            return Process(schedule=NoiseSchedule.SCALED_LINEAR)
        return Process(schedule=NoiseSchedule.VP_SDE)

    @property
    def first_time(self) -> int:
        """What is added to a time before it is embedded: the published models number 1000 discrete timesteps from 1."""
        return 1 if self.diffusion.discrete else 0

    @property
    def guided_channels(self) -> int:
        return self.in_channels

    def with_classes(self, count: int) -> Self:
        return self.model_copy(update={"num_classes": count, "class_names": None})

    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        return units.stored_shapes(self)

    @property
    def low_precision(self) -> tuple[str, ...]:
        return units.skip_tensors(self)

    @property
    def fp32_products(self) -> frozenset[str]:
        return units.fp32_products(self)

    @property
    def derived(self) -> frozenset[str]:
        return frozenset({"time.frequencies", *units.absent_biases(self)})

    def is_conditioning(self, tensor: str) -> bool:
        return tensor.startswith(units.CONDITIONING)

    @property
    def macs(self) -> int:
        """Attention and MLPs at the patches, without long skips: 11.34 G for CIFAR-10, the figure of DyDiT's paper."""
        return int(self.units.per_unit().sum())


_SIZES = {"S": (512, 13, 8), "M": (768, 17, 12), "L": (1024, 21, 16), "H": (1152, 29, 16)}
_PRESETS = {  # input, channels, classes, a row for "no class", convolution
    "cifar10-S/2": (32, 3, 0, False, True),
    "celeba64-S/4": (64, 3, 0, False, True),
    "imagenet64-M/4": (64, 3, 1000, False, True),
    "imagenet64-L/4": (64, 3, 1000, False, True),
    "imagenet256-L/2": (32, 4, 1000, True, True),
    "imagenet256-H/2": (32, 4, 1000, True, False),
    "imagenet512-L/4": (64, 4, 1000, True, True),
    "imagenet512-H/4": (64, 4, 1000, True, False),
}
PRESETS = tuple(_PRESETS)


def preset(name: str, **changes: Any) -> UViTConfig:
    """A published model by name: `cifar10-S/2`, `imagenet256-H/2`, ...; with routers, unless `changes` say otherwise.

    Raises `ConfigError`, which lists the presets, for a name that is not one of them.
    """
    if name not in _PRESETS:
        raise ConfigError(f"unknown preset {name!r}; expected one of: {', '.join(_PRESETS)}")
    size, patch = name.rpartition("-")[2].split("/")
    hidden, depth, heads = _SIZES[size]
    side, channels, classes, null_class_row, conv = _PRESETS[name]
    values = {
        "hidden_size": hidden,
        "depth": depth,
        "num_heads": heads,
        "patch_size": int(patch),
        "input_size": side,
        "in_channels": channels,
        "num_classes": classes,
        "null_class_row": null_class_row,
        "conv": conv,
    }
    return parse_config(UViTConfig, {**values, **changes})
