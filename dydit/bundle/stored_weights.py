"""`weights.bin`: the precision and position of each stored tensor. The architecture says which tensors there are."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Literal

from pydantic import Field, NonNegativeInt

from dydit.dtypes import DTYPES
from dydit.models.config import ModelConfig
from dydit.validation import Strict

WEIGHTS = "weights.bin"
ALIGNMENT = 4096
"""Every tensor of `weights.bin` starts at a multiple of this many bytes, so that runtimes can map it."""
StoredType = Literal["float32", "float16", "bfloat16", "int8", "float8_e4m3fn"]


class Precision(StrEnum):
    """The type of matrix products and attention, and of their weights. Everything else is fp32.

    8 bits apply only to the linear layers of blocks: to their weights and inputs. Their outputs are fp32, and so is
    everything else but attention. int8 (for ONNX Runtime on the CPU): each token has its own scale, computed at run
    time. int8-static and fp8 (E4M3): scales are calibrated for each segment of the plan and each layer, and written as
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
        """The type of inputs and outputs of products, and of biases. `WeightEntry` has the same names."""
        return _VALUES[self]

    @property
    def is_fp32(self) -> bool:
        """Whether values between products are fp32."""
        return self.dtype == "float32"

    @property
    def weight_dtype(self) -> StoredType:
        """The type of the weights of a block's linear layers."""
        return _EIGHT_BITS.get(self, self.dtype)

    @property
    def in_8_bits(self) -> bool:
        """Whether linear layers of blocks have 8 bits."""
        return self in _EIGHT_BITS

    @property
    def is_calibrated(self) -> bool:
        """Whether the scales of activations come from calibration."""
        return self in (Precision.INT8_STATIC, Precision.FP8)

    @property
    def attention(self) -> Precision:
        """The precision of attention: that of products, or fp16 if these have calibrated 8 bits."""
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
    """The type of a stored tensor. Weights and biases of products have the bundle's precision; all others are fp32.

    Only weights of layers that units own are stored in 8 bits.
    """
    if name in model.units.weights:
        return precision.weight_dtype
    return precision.dtype if name in model.units.biases or name in model.low_precision else "float32"


class WeightEntry(Strict):
    """The position of a stored tensor in `weights.bin` (byte offset), its shape and its type."""

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
