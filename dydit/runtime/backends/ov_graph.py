"""Graphs of a bundle as OpenVINO reads them.

OpenVINO refuses local functions, so they are inlined. It refuses weights behind links, so constants are views of the
bundle's own map of the weights. And it computes per-token QuantizeLinear, in int8 graphs, incorrectly; see
`weights_in_8_bits`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from dydit.dtypes import DTYPES
from dydit.errors import BackendError, one_line
from dydit.extras import require

TYPES = {
    "float32": "f32",
    "float16": "f16",
    "bfloat16": "bf16",
    "float8_e4m3fn": "f8e4m3",
    "int8": "i8",
    "int64": "i64",
    "int32": "i32",
    "bool": "boolean",
}
"""The names of OpenVINO's types."""
_NAMES = {dtype.onnx: name for name, dtype in DTYPES.items()}
FLOATS_BELOW_FP32 = ("bf16", "f16")


def read_graph(
    ov: Any, core: Any, file: Path, weights: Callable[[str], np.ndarray], outputs: Collection[str] = ()
) -> Any:
    """An `openvino.Model` of a graph, whose constants are views of `weights(file name)`, uint8.

    The caller keeps that memory until the model, and what was compiled from it, are gone. `outputs`: values inside the
    graph that become outputs, as far as the graph has them. Raises `BackendError` if the graph cannot be read.
    """
    require("compiling a bundle with OpenVINO", ["onnx"], brought_by="openvino")
    import onnx
    from google.protobuf.message import DecodeError
    from onnx.inliner import inline_local_functions

    try:
        proto = inline_local_functions(onnx.load(file, load_external_data=False))
        weights_in_8_bits(proto)
        external = _without_weights(proto)
        model = core.read_model(proto.SerializeToString())
        _add_weights(ov, model, external, weights)
        values = {name for node in proto.graph.node for name in node.output}
        model.add_outputs([name for name in outputs if name in values])
    except (DecodeError, RuntimeError, ValueError, TypeError) as error:
        raise BackendError(f"openvino {ov.__version__} cannot load {file}: {one_line(error)}") from error
    return model


def weights_in_8_bits(proto: Any) -> None:
    """Replace the products of int8 graphs by products of fp32 with weights in 8 bits, in place.

        Mul(MatMulIntegerToFloat(QuantizeLinear(x, s), W, 1, w, z), s)  ->  MatMul(x, DequantizeLinear(W, w))

    What enters a product is then not rounded to 8 bits by the graph. OpenVINO keeps W in 8 bits, and on CPUs with VNNI
    rounds what enters in groups of its own. As written, the graph would need a QuantizeLinear with one scale for each
    token, for which OpenVINO 2026.4 returns empty values.
    """
    import onnx

    makers = {name: node for node in proto.graph.node for name in node.output}
    readers = {name: node for node in proto.graph.node for name in node.input}
    kept = []
    for node in proto.graph.node:
        if node.op_type == "MatMulIntegerToFloat":
            quantized, matrix, _, scale, _ = node.input
            wide, turn = f"{node.output[0]}.weight", makers.get(matrix)
            if turn is not None and turn.op_type == "Transpose":  # OpenVINO looks for 8 bits right before the product
                kept.append(onnx.helper.make_node("DequantizeLinear", [turn.input[0], scale], [f"{wide}.T"], axis=0))
                kept.append(onnx.helper.make_node("Transpose", [f"{wide}.T"], [wide], perm=[1, 0]))
            else:
                kept.append(onnx.helper.make_node("DequantizeLinear", [matrix, scale], [wide], axis=1))
            times_row_scales = readers[node.output[0]]
            assert times_row_scales.op_type == "Mul"
            x = makers[quantized].input[0]
            kept.append(onnx.helper.make_node("MatMul", [x, wide], [times_row_scales.output[0]]))
        elif not (node.op_type == "Mul" and makers.get(node.input[0], node).op_type == "MatMulIntegerToFloat"):
            kept.append(node)
    if len(kept) != len(proto.graph.node):
        nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
        del proto.graph.node[:]
        proto.graph.node.extend(nodes)


def _without_weights(proto: Any) -> dict[str, tuple[str, str, tuple[int, ...], int]]:
    """Turn the weights of a graph into inputs; returns their file, type, shape and byte offset, by name."""
    import onnx

    external, inside = {}, []
    for tensor in proto.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            inside.append(tensor)
            continue
        place = {entry.key: entry.value for entry in tensor.external_data}
        shape = tuple(tensor.dims)
        external[tensor.name] = place["location"], _NAMES[tensor.data_type], shape, int(place.get("offset", 0))
        proto.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, shape))
    initializers = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in inside]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(initializers)
    return external


def _add_weights(
    ov: Any,
    model: Any,
    external: dict[str, tuple[str, str, tuple[int, ...], int]],
    weights: Callable[[str], np.ndarray],
) -> None:
    """Replace the inputs that stand for weights by constants."""
    for parameter in model.get_parameters():
        name = parameter.get_friendly_name()
        if name not in external:
            continue
        location, dtype, shape, offset = external[name]
        raw = weights(location)[offset : offset + DTYPES[dtype].bytes * math.prod(shape)]
        if raw.nbytes != DTYPES[dtype].bytes * math.prod(shape):
            raise ValueError(f"weight {name} lies outside {location}; export the bundle again")
        tensor = ov.Tensor(raw, ov.Shape(shape), getattr(ov.Type, TYPES[dtype]))
        constant = ov.op.Constant(tensor, shared_memory=True)
        constant.set_friendly_name(name)
        parameter.output(0).replace(constant.output(0))
        model.remove_parameter(parameter)
    model.validate_nodes_and_infer_types()


def fp32_layers(model: Any) -> set[str]:
    """The layers of a model, not yet compiled, whose values are fp32: they must be computed in fp32.

    Layers that only convert are left out: what they are merged with decides where they run.
    """
    return {
        node.get_friendly_name()
        for node in model.get_ops()
        if node.get_type_name() not in ("Convert", "Parameter", "Constant", "Result")
        and all(output.get_element_type().get_type_name() == "f32" for output in node.outputs())
    }


def executed_layers(compiled: Any) -> list[tuple[str, frozenset[str]]]:
    """What a compiled model executes: of each node its precision ("f32", "bf16", "i8", ...), and the layers in it."""
    executed = []
    for node in compiled.get_runtime_model().get_ops():
        facts = node.get_rt_info()
        layers = str(facts["originalLayersNames"].get()) if "originalLayersNames" in facts else ""
        precision = str(facts["runtimePrecision"].get()) if "runtimePrecision" in facts else ""
        executed.append((precision, frozenset(filter(None, layers.split(",")))))
    return executed


def lowered_layers(fp32: Collection[str], executed: Iterable[tuple[str, frozenset[str]]]) -> list[str]:
    """The layers that must be fp32 (`fp32_layers`) and are computed in fp16 or bf16, sorted."""
    return sorted(
        {layer for precision, layers in executed if precision in FLOATS_BELOW_FP32 for layer in layers & set(fp32)}
    )
