"""`weights.bin`: in which precision tensors are stored, and where each lies. The layout is `dydit.models.layout`'s."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Literal

from pydantic import Field, NonNegativeInt

from dydit.models.config import Strict

WEIGHTS = "weights.bin"
StoredType = Literal["float32", "float16", "bfloat16"]


class Precision(StrEnum):
    """The type of matrix products and attention, and of their weights; all else is fp32 (DESIGN, decision 9)."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"

    @property
    def dtype(self) -> StoredType:
        """The name of the type, as `WeightEntry` has it."""
        return _STORED[self]


_STORED: dict[Precision, StoredType] = {
    Precision.FP32: "float32",
    Precision.FP16: "float16",
    Precision.BF16: "bfloat16",
}
STORAGE = {"float32": "float32", "float16": "float16", "bfloat16": "uint16"}
"""NumPy's type for each stored type; it has no bfloat16, whose bits are read as uint16."""


class WeightEntry(Strict):
    """Where a stored tensor lies in `weights.bin`: byte offset, shape, type."""

    offset: int = Field(ge=0)
    shape: tuple[NonNegativeInt, ...]
    dtype: StoredType = "float32"

    @property
    def item_bytes(self) -> int:
        """Bytes of one number."""
        return 4 if self.dtype == "float32" else 2

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.item_bytes * math.prod(self.shape)
