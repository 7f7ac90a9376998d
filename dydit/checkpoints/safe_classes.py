"""Stand-ins for harmless classes that training scripts save in their checkpoints together with the weights.

A pickle names classes and functions, and calls them. PyTorch's safe loading lets a file call only names that are
allowed. We allow none of the real classes: each name below leads to a stand-in in this module, which keeps its
arguments as plain data and does nothing else. So whatever a file passes to them, no code of the file runs, nothing is
opened, and no more memory is allocated than the file has bytes for.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any

import numpy as np

_NUMBER = re.compile(r"[biuf][1248]")


class Inert:
    """An object of an allowed class as plain data: its `arguments` and its `state`. Its attributes have no meaning."""

    def __new__(cls, *arguments: Any) -> Inert:
        instance = object.__new__(cls)
        instance.arguments, instance.state = arguments, None
        return instance

    def __init__(self, *arguments: Any):
        self.arguments: tuple[Any, ...] = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __hash__(self) -> int:
        return id(self)


def _path(*parts: Any) -> Any:
    """The text of a `pathlib` path of any operating system."""
    return str(PurePosixPath(*parts)) if all(isinstance(part, str) for part in parts) else Inert(*parts)


def _numpy_scalar(*arguments: Any) -> Any:
    """The Python number for a NumPy scalar, which is pickled as a dtype and bytes."""
    if len(arguments) == 2 and isinstance(arguments[0], Inert) and isinstance(arguments[1], bytes):
        (kind, *_), raw, state = arguments[0].arguments or ("",), arguments[1], arguments[0].state
        order = state[1] if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">") else "="
        if isinstance(kind, str) and _NUMBER.fullmatch(kind) and len(raw) == int(kind[1]):
            if kind == "b1":
                return raw != b"\0"
            if kind != "f1":
                return np.frombuffer(raw, np.dtype(f"{order}{kind}"))[0].item()
    return Inert(*arguments)


def _dictionary(*_: Any) -> dict[Any, Any]:
    return {}


_NUMPY_TYPES = [f"{kind}{bits}" for kind in ("int", "uint", "float") for bits in (8, 16, 32, 64)]
_STAND_INS: dict[Callable[..., Any], tuple[str, ...]] = {
    argparse.Namespace: ("argparse.Namespace", "types.SimpleNamespace"),
    _path: tuple(
        f"{module}.{name}"
        for module in ("pathlib", "pathlib._local")
        for name in ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
    ),
    _numpy_scalar: ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"),
    _dictionary: ("builtins.dict", "collections.defaultdict"),
    Inert: (
        *("numpy.dtype", "numpy.ndarray", "numpy.bool_", "numpy.bool", *(f"numpy.{name}" for name in _NUMPY_TYPES)),
        *("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"),
        *("datetime.datetime", "datetime.date", "datetime.time", "datetime.timedelta", "datetime.timezone"),
        *("decimal.Decimal", "fractions.Fraction", "uuid.UUID"),
        *(f"builtins.{name}" for name in ("int", "float", "str", "bool", "bytes", "list", "tuple", "frozenset")),
        *("builtins.range", "builtins.slice"),
    ),
}
ALLOWED: list[Any] = [(stand_in, name) for stand_in, names in _STAND_INS.items() for name in names]
"""For `torch.serialization.safe_globals`: pairs of a stand-in and the name in the file that leads to it."""
