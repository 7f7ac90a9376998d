"""`weights.bin`: in which precision tensors are stored, and where each lies. The architecture says which."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Literal

from pydantic import Field, NonNegativeInt

from dydit.dtypes import DTYPES
from dydit.models.config import ModelConfig, Strict

WEIGHTS = "weights.bin"
ALIGNMENT = 4096
"""Every tensor of `weights.bin` starts at a multiple of this, so that runtimes can map it."""
StoredType = Literal["float32", "float16", "bfloat16", "int8", "float8_e4m3fn"]


class Precision(StrEnum):
    """The type of matrix products and attention, and of their weights; all else is fp32 (DESIGN, decision 9).

    8 bits are of a block's linear layers alone: of their weights, and of what enters them. What they give is fp32, and
    so is all else but attention. int8: each token has its own scale, found as it comes; for ONNX Runtime on the CPU.
    int8-static, fp8 (E4M3): scales are calibrated, for each segment of the plan and each layer, and written as
    QuantizeLinear and DequantizeLinear, which compilers read; attention is fp16.
    """

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"
    INT8_STATIC = "int8-static"
    FP8 = "fp8"

    @property
    def dtype(self) -> StoredType:
        """The type of what products take and give, and of biases, as `WeightEntry` names it."""
        return _VALUES[self]

    @property
    def is_fp32(self) -> bool:
        """Whether values between products are fp32."""
        return self.dtype == "float32"

    @property
    def weight_dtype(self) -> StoredType:
        """The type of a block's weight matrices."""
        return _EIGHT_BITS.get(self, self.dtype)

    @property
    def in_8_bits(self) -> bool:
        """Whether linear layers are."""
        return self in _EIGHT_BITS

    @property
    def is_calibrated(self) -> bool:
        """Whether the scales of activations come from calibration."""
        return self in (Precision.INT8_STATIC, Precision.FP8)

    @property
    def attention(self) -> Precision:
        """The type of attention: that of all products, and fp16 where these are calibrated 8 bits."""
        return Precision.FP16 if self.is_calibrated else self


_EIGHT_BITS: dict[Precision, StoredType] = {
    Precision.INT8: "int8",
    Precision.INT8_STATIC: "int8",
    Precision.FP8: "float8_e4m3fn",
}
_VALUES: dict[Precision, StoredType] = {
    Precision.FP32: "float32",
    **dict.fromkeys(_EIGHT_BITS, "float32"),
    Precision.FP16: "float16",
    Precision.BF16: "bfloat16",
}


def fp16_name(name: str) -> str:
    """The name of a weight's copy in fp16, in bundles whose other weights have 8 bits: `name16` for `name`."""
    return f"{name}16"


def stored_type(model: ModelConfig, name: str, precision: Precision) -> StoredType:
    """The type of a stored tensor: weights and biases of products follow the bundle's precision, all else is fp32.

    In 8 bits are the weights of layers that units own, and no others.
    """
    if name in model.units.weights:
        return precision.weight_dtype
    return precision.dtype if name in model.units.biases or name in model.low_precision else "float32"


class WeightEntry(Strict):
    """Where a stored tensor lies in `weights.bin`: byte offset, shape, type."""

    offset: int = Field(ge=0)
    shape: tuple[NonNegativeInt, ...]
    dtype: StoredType = "float32"

    @property
    def item_bytes(self) -> int:
        """Bytes of one number."""
        return DTYPES[self.dtype].bytes

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.item_bytes * math.prod(self.shape)
