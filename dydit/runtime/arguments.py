"""Checks numbers, names and arrays that Python callers pass.

Integers and arrays of Python, NumPy and PyTorch are accepted; no package is imported for that. Strings, booleans and
floats in place of integers are refused: "20" would be classes 2 and 0, True is 1, and 6.0 equals 6.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence, Set
from enum import StrEnum
from typing import Any, TypeVar

import numpy as np

from dydit.errors import ConfigError

N = TypeVar("N", bound=StrEnum)


def whole_number(value: Any, name: str, low: int, high: int) -> int:
    """`value` as an int in low..high. Raises `ConfigError` for other values and for types that are not integers.

    `name`: the argument's name, for the message.
    """
    simple = plain(value)
    if isinstance(simple, bool) or not hasattr(simple, "__index__"):
        raise ConfigError(f"{name} must be an integer such as {max(low, 1)}, not {short(value)}")
    number = operator.index(simple)
    if not low <= number <= high:
        raise ConfigError(f"{name} {number} is outside {low}..{high}")
    return number


def whole_numbers(value: Any, name: str, low: int, high: int) -> list[int]:
    """`value`, an integer or a sequence, array or range of them, as a list of ints in low..high.

    Raises `ConfigError` as `whole_number` does, and for text, unordered and nested collections.
    """
    simple = plain(value)
    if isinstance(simple, str | bytes | bytearray | Mapping | Set):
        raise ConfigError(f"{name} must be an integer or a list of integers, such as 20 or [2, 0], not {short(value)}")
    if not isinstance(simple, Iterable):
        return [whole_number(simple, name, low, high)]
    return [whole_number(each, name, low, high) for each in simple]


def real_number(value: Any, name: str, low: float, high: float | None = None) -> float:
    """`value` as a float of at least `low`, and at most `high`.

    Raises `ConfigError` for text, booleans, NaN and infinities.
    """
    simple = plain(value)
    if isinstance(simple, bool) or not (isinstance(simple, int | float) or hasattr(simple, "__index__")):
        raise ConfigError(f"{name} must be a number, not {short(value)}")
    try:
        number = float(simple)
    except OverflowError:  # of an integer
        number = math.inf
    if not low <= number < math.inf:
        raise ConfigError(f"{name} must be a finite number of at least {low:g}, not {number:g}")
    if high is not None and number > high:
        raise ConfigError(f"{name} must be at most {high:g}, not {number:g}")
    return number


def named(value: Any, name: str, kind: type[N]) -> N:
    """`value`, a member of `kind` or its name, as a member. Raises `ConfigError`, which lists the names."""
    try:
        return kind(value)
    except ValueError as error:
        raise ConfigError(f"{name} {short(value)} is not one of {', '.join(kind)}") from error


def float_array(value: Any, name: str, shape: Sequence[int]) -> np.ndarray:
    """`value`, a floating-point array of NumPy or PyTorch of that shape, as float32; shared where it is that already.

    Raises `ConfigError` for other types and shapes, and for values that are not finite.
    """
    if hasattr(value, "detach") and hasattr(value, "is_floating_point"):  # a tensor; NumPy has no bfloat16
        tensor = value.detach().cpu()
        array = np.asarray(tensor.float() if tensor.is_floating_point() else tensor)
    elif isinstance(value, np.ndarray):
        array = value
    else:
        raise ConfigError(f"{name} must be an array of NumPy or PyTorch, not {short(value)}")
    if not np.issubdtype(array.dtype, np.floating):
        raise ConfigError(f"{name} is {array.dtype.name}, expected floating point")
    if array.shape != tuple(shape):
        raise ConfigError(f"{name} has shape {array.shape}, expected {tuple(shape)}")
    with np.errstate(over="ignore"):
        single = np.require(array, np.float32, ["C", "W"])
    if not np.isfinite(single).all():
        raise ConfigError(f"{name} holds values that are NaN, infinite, or outside the range of float32")
    return single


def plain(value: Any) -> Any:
    """Arrays and scalars of NumPy and PyTorch as Python lists and numbers."""
    return value.tolist() if hasattr(value, "tolist") else value


def short(value: Any) -> str:
    """A value as text of one short line, for messages."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
