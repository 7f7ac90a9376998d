"""`weights.bin`: in which precision tensors are stored, and where each lies. The layout is `dydit.models.layout`'s."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Literal

from pydantic import Field, NonNegativeInt

from dydit.models.config import Strict

WEIGHTS = "weights.bin"
StoredType = Literal["float32", "float16", "bfloat16", "int8"]


class Precision(StrEnum):
    """The type of matrix products and attention, and of their weights; all else is fp32 (DESIGN, decision 9).

    int8 is of a block's linear layers alone: their weights and, token by token, what enters them; for ONNX Runtime on
    the CPU. What they give, attention and all else is fp32.
    """

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"

    @property
    def dtype(self) -> StoredType:
        """The type of what products take and give, and of biases, as `WeightEntry` names it."""
        return _VALUES[self]

    @property
    def is_fp32(self) -> bool:
        """Whether values between products are fp32."""
        return self.dtype == "float32"

    @property
    def weight_bytes(self) -> int:
        """Bytes of a number in a block's weight matrices."""
        return 1 if self is Precision.INT8 else ITEM_BYTES[self.dtype]


_VALUES: dict[Precision, StoredType] = {
    Precision.FP32: "float32",
    Precision.INT8: "float32",
    Precision.FP16: "float16",
    Precision.BF16: "bfloat16",
}
ITEM_BYTES: dict[StoredType, int] = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
STORAGE = {"float32": "float32", "float16": "float16", "bfloat16": "uint16", "int8": "int8"}
"""NumPy's type for each stored type; it has no bfloat16, whose bits are read as uint16."""


class WeightEntry(Strict):
    """Where a stored tensor lies in `weights.bin`: byte offset, shape, type."""

    offset: int = Field(ge=0)
    shape: tuple[NonNegativeInt, ...]
    dtype: StoredType = "float32"

    @property
    def item_bytes(self) -> int:
        """Bytes of one number."""
        return ITEM_BYTES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.item_bytes * math.prod(self.shape)
