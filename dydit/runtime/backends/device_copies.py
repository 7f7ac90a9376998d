"""Copies between host and device that ONNX Runtime adds to a graph, read from an optimised graph that it saved.

A node without a kernel on the device runs on the host, and so does arithmetic on shapes. Where such a value meets a
value of the other side, ONNX Runtime adds a node that copies it. A step with copies waits for the host, and CUDA graphs
are refused for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

_TO_HOST, _FROM_HOST = "MemcpyToHost", "MemcpyFromHost"


@dataclass(frozen=True)
class Copy:
    """A copy of a value. `source`: the node that computes it, or the input. `readers`: the nodes that read the copy."""

    to_host: bool
    source: str
    readers: tuple[str, ...]

    def __str__(self) -> str:
        way = "from the GPU to the host" if self.to_host else "from the host to the GPU"
        return f"{self.source} is copied {way} for {', '.join(self.readers) or 'an output'}"


def copies(graph: str | Path) -> list[Copy]:
    """The copies in an optimised graph that ONNX Runtime wrote. Weights that it refers to are not read.

    Raises `OSError` if the file cannot be read, `ValueError` if it is not a graph.
    """
    nodes = list(_nodes(Path(graph).read_bytes()))
    sources = {name: _title(node) for node in nodes for name in node.output}
    found = []
    for node in nodes:
        if node.op_type in (_TO_HOST, _FROM_HOST):
            readers = [_title(each) for each in nodes if node.output[0] in each.input]
            (value,) = node.input
            source = f"the output of {sources[value]}" if value in sources else f"the input {value}"
            found.append(Copy(node.op_type == _TO_HOST, source, tuple(readers)))
    return found


def _title(node: Any) -> str:
    return f"{node.op_type} {node.name}" if node.name else f"{node.op_type} that gives {node.output[0]}"


def _nodes(data: bytes) -> Iterable[Any]:
    from google.protobuf.message import DecodeError

    model = _model_class()()
    try:
        model.ParseFromString(data)
    except DecodeError as error:
        raise ValueError(f"not an ONNX graph: {error}") from error
    return model.graph.node


@cache
def _model_class() -> Any:
    """A protobuf message with those fields of ONNX's ModelProto that are needed; the package onnx is not.

    The protobuf package comes with onnxruntime.
    """
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="dydit/optimised.proto", package="dydit", syntax="proto2")
    fields: dict[str, list[tuple[str, int, str | None]]] = {
        "Node": [("input", 1, None), ("output", 2, None), ("name", 3, None), ("op_type", 4, None)],
        "Graph": [("node", 1, ".dydit.Node")],
        "Model": [("graph", 7, ".dydit.Graph")],
    }
    for message, members in fields.items():
        added = file.message_type.add(name=message)
        for name, number, of in members:
            label = kinds.LABEL_REPEATED if name in ("input", "output", "node") else kinds.LABEL_OPTIONAL
            kind = kinds.TYPE_MESSAGE if of else kinds.TYPE_STRING
            added.field.add(name=name, number=number, label=label, type=kind, type_name=of)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("dydit.Model"))
