"""Checks numbers that Python callers pass.

Integers and arrays of Python, NumPy and PyTorch are accepted; no package is imported for that. Strings, booleans and
floats in place of integers are refused: "20" would be classes 2 and 0, True is 1, and 6.0 equals 6.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Set
from typing import Any

from dydit.errors import ConfigError


def whole_number(value: Any, name: str, low: int, high: int) -> int:
    """`value` as an int in low..high. Raises `ConfigError` for other values and for types that are not integers.

    `name`: the argument's name, for the message.
    """
    plain = _plain(value)
    if isinstance(plain, bool) or not hasattr(plain, "__index__"):
        raise ConfigError(f"{name} must be an integer such as {max(low, 1)}, not {_short(value)}")
    number = operator.index(plain)
    if not low <= number <= high:
        raise ConfigError(f"{name} {number} is outside {low}..{high}")
    return number


def whole_numbers(value: Any, name: str, low: int, high: int) -> list[int]:
    """`value`, an integer or a sequence, array or range of them, as a list of ints in low..high.

    Raises `ConfigError` as `whole_number` does, and for text, unordered and nested collections.
    """
    plain = _plain(value)
    if isinstance(plain, str | bytes | bytearray | Mapping | Set):
        raise ConfigError(f"{name} must be an integer or a list of integers, such as 20 or [2, 0], not {_short(value)}")
    if not isinstance(plain, Iterable):
        return [whole_number(plain, name, low, high)]
    return [whole_number(each, name, low, high) for each in plain]


def real_number(value: Any, name: str, low: float) -> float:
    """`value` as a float of at least `low`. Raises `ConfigError` for text, booleans, NaN and infinities."""
    plain = _plain(value)
    if isinstance(plain, bool) or not (isinstance(plain, int | float) or hasattr(plain, "__index__")):
        raise ConfigError(f"{name} must be a number, not {_short(value)}")
    number = float(plain)
    if not low <= number < math.inf:
        raise ConfigError(f"{name} must be a finite number of at least {low:g}, not {number:g}")
    return number


def _plain(value: Any) -> Any:
    """Arrays and scalars of NumPy and PyTorch as Python lists and numbers."""
    return value.tolist() if hasattr(value, "tolist") else value


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
