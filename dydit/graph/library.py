"""The local functions of one model in one precision: each is made when first asked for, and shared by all graphs."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Concatenate, ParamSpec

import onnx_ir as ir

from dydit.bundle.stored_weights import Precision
from dydit.models.config import ModelConfig

P = ParamSpec("P")
Make = Callable[Concatenate[Any, Precision, P], ir.Function]


class FunctionLibrary:
    """Functions by what made them. `cfg_channels`: how many channels guidance acts on."""

    def __init__(self, config: ModelConfig, cfg_channels: int, precision: Precision = Precision.FP32):
        self.config, self.cfg_channels, self.precision = config, cfg_channels, precision
        self._made: dict[Hashable, ir.Function] = {}

    def get(self, make: Make[P], *arguments: P.args, **options: P.kwargs) -> ir.Function:
        """`make(config, precision, *arguments)`, made once; arguments must be hashable."""
        key = (make, arguments, tuple(options.items()))
        if key not in self._made:
            self._made[key] = make(self.config, self.precision, *arguments, **options)
        return self._made[key]
