"""The number types of bundles, graphs and engines: one table of what each library calls them.

The key is the name that NumPy, PyTorch and manifests share. PyTorch has an attribute of that name.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Dtype:
    """One type of number.

    `bytes`: of one number. `storage`: the NumPy type that its bits are read as; NumPy has no bfloat16 and no float8.
    `onnx`: its number in ONNX's `TensorProto.DataType`. `tensorrt`: its name in `tensorrt.DataType`.
    """

    bytes: int
    storage: str
    onnx: int
    tensorrt: str


DTYPES = {
    "float64": Dtype(8, "float64", 11, "DOUBLE"),
    "float32": Dtype(4, "float32", 1, "FLOAT"),
    "float16": Dtype(2, "float16", 10, "HALF"),
    "bfloat16": Dtype(2, "uint16", 16, "BF16"),
    "float8_e4m3fn": Dtype(1, "uint8", 17, "FP8"),
    "int64": Dtype(8, "int64", 7, "INT64"),
    "int32": Dtype(4, "int32", 6, "INT32"),
    "int8": Dtype(1, "int8", 3, "INT8"),
    "bool": Dtype(1, "bool", 9, "BOOL"),
}
FLOATS = frozenset({"float16", "bfloat16", "float32", "float64"})
"""The floating point types that values between layers may have; float8 is of weights and what enters products."""
