"""Models without memory, on PyTorch's device "meta": for their shapes, or to be filled with weights that exist."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _Uninitialised(TorchFunctionMode):
    """`torch.nn.init` leaves tensors as they are."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == torch.nn.init.__name__:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


@contextlib.contextmanager
def without_memory() -> Iterator[None]:
    """Tensors that are made in the block have a shape and a dtype, and no values.

    Modules are not initialised, because drawing a number there makes PyTorch import its compiler, which takes a second.
    """
    with torch.device("meta"), _Uninitialised():
        yield
