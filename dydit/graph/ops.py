"""Writes ONNX nodes: the tape of `onnx_ir` with operators as methods, and value names that TensorRT accepts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

from dydit.bundle.stored_weights import Precision
from dydit.dtypes import DTYPES

OPSET, IR_VERSION = 23, 11  # the newest that every runtime we target reads
DATA_TYPES = {name: ir.DataType(dtype.onnx) for name, dtype in DTYPES.items()}
DOMAIN = "dydit"
CONTRIB = "com.microsoft"  # operators of ONNX Runtime's own, for int8


class Ops(tape.Tape):
    """Collects the nodes of one graph or function, in order. `ops.MatMul(a, b)` adds a node and returns its output.

    Names of values start with `scope`, because TensorRT's parser confuses values of the same name inside and outside of
    a function.
    """

    def __init__(self, scope: str = "main") -> None:
        super().__init__()
        self.scope = scope
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}

    def __getattr__(self, operator: str) -> Callable[..., ir.Value]:
        if not operator[0].isupper():
            raise AttributeError(operator)

        def add(*inputs: ir.Value | None, **attributes: Any) -> ir.Value:
            return self.call("", operator, inputs, 1, attributes)[0]

        return add

    def call(
        self,
        domain: str,
        operator: str,
        inputs: Sequence[ir.Value | None],
        outputs: int | Sequence[str],
        attributes: dict[str, Any] | None = None,
    ) -> Sequence[ir.Value]:
        """Add a node. `outputs`: their number, or their names."""
        count = outputs if isinstance(outputs, int) else len(outputs)
        if isinstance(outputs, int):
            outputs = [f"{self.scope}.{operator}_{len(self._nodes)}_{index}" for index in range(count)]
        values = self.op_multi_out(operator, inputs, attributes, num_outputs=count, domain=domain)
        for value, name in zip(values, outputs, strict=True):
            value.name = name
        return values

    def constant(self, value: Any, dtype: Any = np.int64) -> ir.Value:
        """A constant tensor: integers by default, for shapes and axes. Equal ones are one node."""
        array = np.asarray(value, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.call("", "Constant", (), 1, {"value": ir.tensor(array)})[0]
        return self._constants[key]

    def to_precision(self, value: ir.Value, precision: Precision) -> ir.Value:
        """An fp32 or bool value, cast to the type of matrix products. Nothing is added if that type is fp32."""
        return value if precision.is_fp32 else self.Cast(value, to=DATA_TYPES[precision.dtype])

    def to_fp32(self, value: ir.Value, precision: Precision) -> ir.Value:
        """A value in the type of matrix products, cast to fp32."""
        return value if precision.is_fp32 else self.Cast(value, to=ir.DataType.FLOAT)

    def between(self, value: ir.Value, source: Precision, target: Precision) -> ir.Value:
        """The output of a product of `source` precision, cast to the input type of one of `target` precision."""
        return value if source.dtype == target.dtype else self.Cast(value, to=DATA_TYPES[target.dtype])

    def split(self, value: ir.Value, axis: int, count: int) -> Sequence[ir.Value]:
        """Split a value into `count` equal parts along an axis."""
        return self.call("", "Split", (value,), count, {"axis": axis, "num_outputs": count})


def silu(ops: Ops, x: ir.Value) -> ir.Value:
    """x * sigmoid(x)."""
    return ops.Mul(x, ops.Sigmoid(x))


def function(name: str, inputs: Sequence[str], body: Callable[..., Sequence[ir.Value]]) -> ir.Function:
    """An ONNX local function: `body(ops, *inputs)` writes its nodes and returns its outputs."""
    ops = Ops(name)
    values = [ir.Value(name=each) for each in inputs]
    outputs = body(ops, *values)
    opsets = {"": OPSET, **({CONTRIB: 1} if (CONTRIB, None) in ops.used_opsets else {})}
    graph = ir.Graph(values, outputs, nodes=ops.nodes, opset_imports=opsets, name=name)
    return ir.Function(DOMAIN, name, graph=graph, attributes=())
