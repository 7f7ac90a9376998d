from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import onnx
import onnx.inliner
import pytest
from onnx import helper

from dydit.bundle.io_spec import TensorSpec, subnet_inputs
from dydit.engines.network import Messages, Network, parse_graph, read_network, require_distinct_names, require_inputs
from dydit.errors import BackendError


def with_function(inner: str) -> onnx.ModelProto:
    """`out = twice(wide)`, with the function's inner value named as asked."""
    body = [helper.make_node("Neg", ["a"], [inner]), helper.make_node("Neg", [inner], ["b"])]
    twice = helper.make_function("own", "twice", ["a"], ["b"], body, [helper.make_opsetid("", 23)])
    nodes = [helper.make_node("Abs", ["x"], ["wide"]), helper.make_node("twice", ["wide"], ["out"], domain="own")]
    value = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2]) for name in ("x", "out")]
    graph = helper.make_graph(nodes, "main", value[:1], value[1:])
    imports = [helper.make_opsetid("", 23), helper.make_opsetid("own", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=11, functions=[twice])


@pytest.mark.parametrize("shared", ["x", "wide"])
def test_a_name_inside_and_outside_a_function_is_refused(tmp_path: Path, shared: str) -> None:
    path = tmp_path / "graph.onnx"
    onnx.save(with_function("inner"), path)
    require_distinct_names(path)
    onnx.save(with_function(shared), path)
    with pytest.raises(BackendError) as caught:
        require_distinct_names(path)
    assert str(caught.value) == (
        f"graph.onnx: function 'twice' and the main graph both have a value named '{shared}', and TensorRT's "
        "parser does not distinguish them; export the bundle again"
    )


def test_what_is_no_graph_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "graph.onnx"
    path.write_bytes(b"\xff\xff\xff not a graph")
    with pytest.raises(
        BackendError, match=r"graph\.onnx is not an ONNX graph \(DecodeError\); export the bundle again"
    ):
        require_distinct_names(path)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_graphs_that_we_export_have_distinct_names(capacity_bundle, precision: str) -> None:
    bundle = capacity_bundle(precision)
    for name in bundle.manifest.files:
        if name.endswith(".onnx"):
            require_distinct_names(bundle.path / name)


def wiring(trt: Any, network: Any) -> dict[str, str]:
    """What each output is computed from, as one hash over all that leads to it; names of values do not count."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    makers = {layer.get_output(k).name: layer for layer in layers for k in range(layer.num_outputs)}
    known = {network.get_input(index).name: network.get_input(index).name for index in range(network.num_inputs)}

    def describe(layer: Any) -> None:
        if layer.type == trt.LayerType.CONSTANT:
            layer.__class__ = trt.IConstantLayer
            parts = [repr(layer.weights)]
        else:
            taken = [layer.get_input(k) for k in range(layer.num_inputs)]
            parts = [known[tensor.name] if tensor is not None else "-" for tensor in taken]
        for k in range(layer.num_outputs):
            tensor = layer.get_output(k)
            text = "|".join([layer.type.name, str(k), str(tuple(tensor.shape)), tensor.dtype.name, *parts])
            known[tensor.name] = hashlib.sha256(text.encode()).hexdigest()

    for index in range(network.num_outputs):
        waiting = [network.get_output(index).name]
        while waiting:
            if waiting[-1] in known:
                waiting.pop()
                continue
            layer = makers[waiting[-1]]
            taken = [layer.get_input(k) for k in range(layer.num_inputs)]
            if missing := [tensor.name for tensor in taken if tensor is not None and tensor.name not in known]:
                waiting.extend(missing)
            else:
                describe(layer)
    return {network.get_output(k).name: known[network.get_output(k).name] for k in range(network.num_outputs)}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_functions_are_read_as_if_their_nodes_stood_in_the_main_graph(
    rtx, capacity_bundle, tmp_path: Path, precision: str
) -> None:
    bundle = capacity_bundle(precision)
    (tmp_path / "weights.bin").symlink_to(bundle.path / "weights.bin")
    hashes = set()
    for subnet in bundle.manifest.subnets:
        inlined = tmp_path / subnet.file
        model = onnx.load(bundle.path / subnet.file, load_external_data=False)
        assert model.functions
        onnx.save(onnx.inliner.inline_local_functions(model), inlined)
        ours = parse_graph(rtx, bundle.path / subnet.file, Messages())
        plain = parse_graph(rtx, inlined, Messages())
        assert wiring(rtx, ours.network) == wiring(rtx, plain.network), subnet.file
        hashes.add(wiring(rtx, ours.network)["x_prev"])
    assert len(hashes) == len(bundle.manifest.subnets), "and different subnetworks are different"


def test_the_picture_has_inputs_with_their_symbols_and_functions(rtx, capacity_bundle) -> None:
    bundle = capacity_bundle()
    gated = next(subnet for subnet in bundle.manifest.subnets if subnet.gated)
    parsed = parse_graph(rtx, bundle.path / gated.file, Messages())
    network = read_network(parsed.network)
    assert network.inputs == subnet_inputs(bundle.manifest.model, True)
    assert set(network.outputs) == {"x_prev", "next_history", "token_overflow"}
    functions = {layer.function for layer in network.layers if layer.kind == "matrix_multiply"}
    assert {"embed", "final"} < functions
    require_inputs(network, subnet_inputs(bundle.manifest.model, True), gated.file)


def test_a_graph_that_the_parser_refuses_is_named(rtx, tmp_path: Path) -> None:
    value = [helper.make_tensor_value_info("x", onnx.TensorProto.BOOL, ["n"])]
    out = [helper.make_tensor_value_info("out", onnx.TensorProto.INT64, [1, "m"])]
    graph = helper.make_graph([helper.make_node("NonZero", ["x"], ["out"])], "small", value, out)
    path = tmp_path / "small.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11), path)
    with pytest.raises(BackendError, match=r"tensorrt_rtx cannot parse small\.onnx: .*NonZero"):
        parse_graph(rtx, path, Messages())


def network_of(*inputs: TensorSpec) -> Network:
    return Network((), {}, inputs, ())


X = TensorSpec("x", "float32", ("batch", 4))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((), "graph: input 'x' is missing, expected float32 ['batch', 4]; export the bundle again"),
        ((TensorSpec("x", "float16", ("batch", 4)),), "input 'x' is float16 ['batch', 4], expected float32"),
        ((TensorSpec("x", "float32", (2, 4)),), "input 'x' is float32 [2, 4], expected float32 ['batch', 4]"),
        ((X, TensorSpec("y", "float32", (1,))), "input 'y' is float32 [1], expected missing"),
    ],
)
def test_inputs_that_are_not_as_described_are_refused(inputs: tuple[TensorSpec, ...], message: str) -> None:
    require_inputs(network_of(X), (X,), "graph")
    with pytest.raises(BackendError) as caught:
        require_inputs(network_of(*inputs), (X,), "graph")
    assert message in str(caught.value)


def test_what_the_builder_says_often_is_said_once() -> None:
    messages = Messages(["a\n b", "c"], {"slow": 3, "odd": 1})
    assert messages.reason() == "a b; c"
    assert messages.text() == "  error: a b\n  error: c\n  warning (3 times): slow\n  warning: odd\n"
    assert Messages().reason() == "no reason given"
