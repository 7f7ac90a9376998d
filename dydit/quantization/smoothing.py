"""Smoothing: input channels of a linear layer are divided by powers of two, and its weights multiplied by them.

    y = x W = (x / s) (s W),  s_j = 2^e_j for each input channel j     (Xiao et al., "SmoothQuant", ICML 2023, eq. 3)

If some channels are much larger than the others, few of the 256 values of 8 bits are left for the others; dividing the
large channels avoids that. Scaling by a power of two is exact in every floating-point type, so in fp32 the model does
not change by a bit. One vector serves all steps, like the weights. `dydit.calibrate.smoothing_strength` chooses the
vectors; the architecture says where they are applied. NumPy only.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from dydit.errors import CalibrationError
from dydit.models.config import ModelConfig
from dydit.validation import Strict
from dydit.words import counted

MOST = 10
"""The largest exponent. With larger ones, values of ordinary size would lose bits in fp16, the type of attention."""
Exponents = Annotated[str, Field(pattern="^[0-9a]+$")]


class Smoothing(Strict):
    """Exponents e of the layers of every block, by name: a digit 0..a for each input channel, in the checkpoint's
    order.

    A layer without an entry is not smoothed.
    """

    blocks: tuple[dict[str, Exponents], ...] = Field(min_length=1)

    def exponents(self, block: int, layer: str) -> np.ndarray | None:
        """e of the input channels of a layer, int64 [in]; None if the layer is not smoothed."""
        text = self.blocks[block].get(layer)
        return None if text is None else np.array([int(digit, 16) for digit in text])

    def divisor(self, block: int, layer: str) -> np.ndarray | None:
        """s of the input channels of a layer, f32 [in]; None if the layer is not smoothed."""
        exponents = self.exponents(block, layer)
        return None if exponents is None else np.ldexp(np.float32(1), exponents).astype(np.float32)

    @property
    def layers(self) -> int:
        """The number of layers that are smoothed."""
        return sum(map(len, self.blocks))

    def require_fits(self, model: ModelConfig) -> None:
        """Raise `CalibrationError`, naming the layer, if the channels are not those of a model."""
        if len(self.blocks) != model.depth:
            raise CalibrationError(
                f"the smoothing is for {counted(len(self.blocks), 'block')}, but the model has {model.depth}; "
                "calibrate this checkpoint"
            )
        for index, block in enumerate(self.blocks):
            for layer, text in block.items():
                if layer not in model.units.layer_names:
                    raise CalibrationError(
                        f"the smoothing names the layer {layer!r}, which the model's blocks do not have"
                    )
                expected = input_channels(model, layer)
                if len(text) != expected:
                    raise CalibrationError(
                        f"the smoothing of block {index}, {layer}, is for {len(text)} channels, but the model has "
                        f"{expected}; calibrate this checkpoint"
                    )


def as_digits(exponents: np.ndarray) -> str:
    """Exponents int [in] in the form of `Smoothing`."""
    return "".join(f"{each:x}" for each in exponents.tolist())


def input_channels(model: ModelConfig, layer: str) -> int:
    """The number of input channels of a layer at full width."""
    part = next(part for part in model.units.parts if layer in (each.name for each in part.group.layers))
    return next(each for each in part.group.layers if each.name == layer).in_features(part.group.count)
