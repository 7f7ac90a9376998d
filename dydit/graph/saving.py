"""Saves graphs in the form that runtimes and compilers read."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
from onnx.inliner import inline_local_functions


def save_graph(model: ir.Model, path: Path) -> None:
    """Write a graph to a file. External weights stay references to `weights.bin` in the same folder."""
    proto: onnx.ModelProto = ir.to_proto(model)
    if any(node.op_type == "QuantizeLinear" for function in proto.functions for node in function.node):
        # TensorRT's parser refuses two such layers of the same name, and every call of a function would add one.
        proto = inline_local_functions(proto)
        for node in proto.graph.node:
            node.name = ""
    path.write_bytes(proto.SerializeToString(deterministic=True))
