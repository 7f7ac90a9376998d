"""Whether 8-bit products of ONNX Runtime are exact on this CPU.

Without VNNI instructions an x86 CPU adds two products uint8 * int8 in 16 bits, and silently saturates: 255 * 127 +
255 * 127 becomes 32767.
"""

from __future__ import annotations

import base64
from functools import cache
from typing import Any

import numpy as np

from dydit.errors import BackendError

# The ONNX graph y = MatMulInteger(a, b) for a [1, 64] uint8, b [64, 16] int8, opset 23, IR 11: written out so that no
# package is needed to make it.
_GRAPH = base64.b64decode(
    "CAsSADpgChgKAWEKAWISAXkiDU1hdE11bEludGVnZXISBXByb2JlWhMKAWESDgoMCAISCAoCCAEK"
    "AghAWhMKAWISDgoMCAMSCAoCCEAKAggQYhMKAXkSDgoMCAYSCAoCCAEKAggQQgQKABAX"
)
_LARGEST = np.full((1, 64), 255, np.uint8), np.full((64, 16), 127, np.int8)


@cache
def products_are_exact(ort: Any) -> bool:
    """Whether ONNX Runtime (the module `ort`) multiplies the largest 8-bit values exactly on this CPU."""
    settings = ort.SessionOptions()
    settings.log_severity_level = 4
    session = ort.InferenceSession(_GRAPH, settings, providers=["CPUExecutionProvider"])
    a, b = _LARGEST
    (y,) = session.run(None, {"a": a, "b": b})
    return bool((y == a.astype(np.int32) @ b.astype(np.int32)).all())


def require_exact_products(ort: Any) -> None:
    """Raise `BackendError` if 8-bit products saturate on this CPU."""
    if not products_are_exact(ort):
        raise BackendError(
            f"8-bit products of onnxruntime {ort.__version__} saturate on this CPU, which has no VNNI; use a bundle of "
            "another precision"
        )
