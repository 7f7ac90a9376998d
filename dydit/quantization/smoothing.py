"""Range that moves from what enters a block's linear layers into their weights, in powers of two. NumPy only.

    y = x W = (x / s) (s W),  s_j = 2^e_j of each input channel j     (Xiao et al., "SmoothQuant", ICML 2023, eq. 3)

Channels that are much larger than the others leave these few of the 256 values that 8 bits have; divided, they do not.
Scaling by a power of two is exact in every floating type, so in fp32 the model stays itself, bit for bit. One vector
serves all steps, as weights do. `dydit.calibrate.smoothing_strength` chooses it; the architecture
says where it goes.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from dydit.errors import CalibrationError
from dydit.models.config import ModelConfig, Strict

MOST = 10
"""The largest exponent: further down, values of ordinary size would lose bits in fp16, which attention has."""
Exponents = Annotated[str, Field(pattern="^[0-9a]+$")]


class Smoothing(Strict):
    """Exponents e of the layers of every block, by name: a digit 0..a for each of the checkpoint's input channels.

    Of a layer that is not there nothing moves.
    """

    blocks: tuple[dict[str, Exponents], ...] = Field(min_length=1)

    def exponents(self, block: int, layer: str) -> np.ndarray | None:
        """e of a layer's input channels, int64 [in]; None where nothing moves."""
        text = self.blocks[block].get(layer)
        return None if text is None else np.array([int(digit, 16) for digit in text])

    def divisor(self, block: int, layer: str) -> np.ndarray | None:
        """s, f32 [in]; None where nothing moves."""
        exponents = self.exponents(block, layer)
        return None if exponents is None else np.ldexp(np.float32(1), exponents).astype(np.float32)

    @property
    def layers(self) -> int:
        """How many layers are smoothed."""
        return sum(map(len, self.blocks))

    def require_fits(self, model: ModelConfig) -> None:
        """Raise `CalibrationError`, naming the layer, where these are not the channels of a model."""
        if len(self.blocks) != model.depth:
            raise CalibrationError(
                f"the smoothing is of {len(self.blocks)} blocks, the model has {model.depth}; calibrate this checkpoint"
            )
        for index, block in enumerate(self.blocks):
            for layer, text in block.items():
                if layer not in model.units.layer_names:
                    raise CalibrationError(f"the smoothing names {layer!r}, which is no layer of the model's blocks")
                expected = input_channels(model, layer)
                if len(text) != expected:
                    raise CalibrationError(
                        f"the smoothing of block {index}, {layer}, is of {len(text)} channels, the model has "
                        f"{expected}; calibrate this checkpoint"
                    )


def as_digits(exponents: np.ndarray) -> str:
    """Exponents int [in] as `Smoothing` keeps them."""
    return "".join(f"{each:x}" for each in exponents.tolist())


def input_channels(model: ModelConfig, layer: str) -> int:
    """Channels that enter a block's layer at full width."""
    part = next(part for part in model.units.parts if layer in (each.name for each in part.group.layers))
    return next(each for each in part.group.layers if each.name == layer).in_features(part.group.count)
