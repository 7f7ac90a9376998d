"""The ONNX local functions of one model in one precision. Each is made when first needed, and all graphs share it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Concatenate, ParamSpec

import onnx_ir as ir

from dydit.bundle.stored_weights import Precision
from dydit.models.config import ModelConfig

P = ParamSpec("P")
Make = Callable[Concatenate[Any, Precision, P], ir.Function]


class FunctionLibrary:
    """Local functions by the Python function and arguments that make them.

    `cfg_channels`: the number of channels that guidance acts on.
    """

    def __init__(self, config: ModelConfig, cfg_channels: int, precision: Precision = Precision.FP32):
        self.config, self.cfg_channels, self.precision = config, cfg_channels, precision
        self._functions: dict[Hashable, ir.Function] = {}

    def get(self, make: Make[P], *arguments: P.args, **options: P.kwargs) -> ir.Function:
        """`make(config, precision, *arguments)`, called once for the same arguments, which must be hashable."""
        key = (make, arguments, tuple(options.items()))
        if key not in self._functions:
            self._functions[key] = make(self.config, self.precision, *arguments, **options)
        return self._functions[key]
