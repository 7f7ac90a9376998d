"""The table of number types says what the libraries say."""

from __future__ import annotations

import numpy as np
import pytest

from dydit.dtypes import DTYPES


@pytest.mark.parametrize("name", DTYPES)
def test_every_library_has_the_type(name: str) -> None:
    import onnx
    import torch

    dtype = DTYPES[name]
    assert getattr(torch, name).itemsize == np.dtype(dtype.storage).itemsize == dtype.bytes
    assert onnx.TensorProto.DataType.Name(dtype.onnx).lower().replace("float8", "float8_") in (
        name,
        {"float64": "double", "float32": "float"}.get(name),
    )


def test_tensorrt_has_the_types(rtx) -> None:
    """Of version 1.7, which has no double."""
    lacking = {name for name, dtype in DTYPES.items() if not hasattr(rtx.DataType, dtype.tensorrt)}
    assert lacking <= {"float64"}
