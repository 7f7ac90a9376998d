"""The rules on types: on small pictures of networks, and on real graphs that were spoiled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from dydit.bundle.bundle import Bundle
from dydit.bundle.io_spec import TensorSpec
from dydit.bundle.stored_weights import Precision, stored_type
from dydit.engines.findings import Kind, products, require_types, type_findings
from dydit.engines.network import Layer, Messages, Network, parse_graph, read_network
from dydit.errors import BackendError
from dydit.models.config import ModelConfig
from dydit.models.dit.config import preset

MODEL = preset("XL/2")
LETTERS = {"f": "float32", "h": "float16", "b": "bfloat16", "d": "float64", "i": "int64"}


def picture(*lines: str, outputs: str = "f_out") -> Network:
    """`made = kind operand operand`: a tensor's first letter is its type; `f_x` and what has a dot are inputs.

    `made = constant NAME` names the constant layer.
    """
    layers = []
    for line in lines:
        made, _, rest = line.partition(" = ")
        kind, *operands = rest.split()
        name = operands[0] if kind == "constant" else f"L{len(layers)}"
        layers.append(Layer(name, kind, () if kind == "constant" else tuple(operands), (made,)))
    made = {name for layer in layers for name in layer.outputs}
    taken = {name for layer in layers for name in layer.inputs}
    inputs = tuple(TensorSpec(name, LETTERS[name[0]], ("batch",)) for name in sorted(taken - made))
    return Network(tuple(layers), {name: LETTERS[name[0]] for name in made | taken}, inputs, (outputs,))


def fp32_products(network: Network, precision: Precision, model: ModelConfig = MODEL) -> list[str]:
    """The weights of the products that should be in fp32."""
    return [each.weight for each in products(network, precision, model).values() if each.dtype == "float32"]


def kinds(network: Network, precision: Precision = Precision.FP16) -> list[tuple[str, Kind]]:
    return [(finding.layer, finding.kind) for finding in type_findings(network, precision, MODEL)]


BRANCH = (
    "f_n = normalization f_x",
    "f_m = elementwise f_n f_scale",
    "h_m = cast f_m",
    "h_w1 = constant blocks.0.fc1.weight[0:3]",
    "h_1 = matrix_multiply h_m h_w1",
    "h_b = constant blocks.0.fc1.bias[0:3]",
    "h_2 = elementwise h_1 h_b",
    "h_g = activation h_2",
    "h_gate = cast f_gates",
    "h_wide = shuffle h_gate",
    "h_3 = elementwise h_g h_wide",
    "h_w2 = constant blocks.0.fc2.weight[0:3]",
    "h_4 = matrix_multiply h_3 h_w2",
    "h_5 = shuffle h_4",
    "f_5 = cast h_5",
    "f_out = elementwise f_x f_5",
)


def replaced(old: str, *new: str) -> Network:
    lines = list(BRANCH)
    index = next(place for place, line in enumerate(lines) if line.startswith(f"{old} = "))
    lines[index : index + 1] = new
    return picture(*lines)


def test_a_branch_by_the_recipe_has_no_faults() -> None:
    assert kinds(picture(*BRANCH)) == []


@pytest.mark.parametrize(
    "weight",
    ["embed.weight", "final.weight", "time.0.weight", "blocks.7.router.0.weight", "blocks.12.router.2.weight"],
)
def test_products_that_stay_fp32_must_be_fp32(weight: str) -> None:
    assert stored_type(MODEL, weight, Precision.FP16) == "float32"
    fine = picture("f_w = constant " + weight, "f_t = shuffle f_w", "f_out = matrix_multiply f_x f_t")
    assert kinds(fine) == []
    assert fp32_products(fine, Precision.FP16) == fp32_products(fine, Precision.FP32) == [weight]
    halved = picture(f"h_w = constant {weight}", "h_x = cast f_x", "h_y = matrix_multiply h_x h_w", "f_out = cast h_y")
    assert kinds(halved) == [("L2", Kind.PRODUCT)]


@pytest.mark.parametrize("weight", ["blocks.0.fc1.weight[0:3]", "adaln.weight", "embed.weights", "routers.0.weight"])
def test_an_fp32_product_with_any_other_weight_is_found(weight: str) -> None:
    network = picture(f"f_w = constant {weight}", "f_out = matrix_multiply f_x f_w")
    assert kinds(network) == [("L1", Kind.PRODUCT)]
    assert kinds(network, Precision.FP32) == []
    assert fp32_products(network, Precision.FP16) == []
    assert fp32_products(network, Precision.FP32) == [weight.removesuffix("[0:3]")]


@pytest.mark.parametrize("precision", [each for each in Precision if each.in_8_bits])
def test_the_conditioning_product_is_fp32_where_linear_layers_are_in_8_bits(precision: Precision) -> None:
    network = picture("f_w = constant adaln.weight[0:6]", "f_out = matrix_multiply f_x f_w")
    assert kinds(network, precision) == []
    assert fp32_products(network, precision) == ["adaln.weight"]


def test_weights_may_be_inputs_of_the_graph_or_joined_from_windows() -> None:
    assert kinds(replaced("h_w1", "h_w1 = shuffle h.blocks.0.fc1.weight")) == []
    joined = replaced("h_w1", "h_a = constant q[0:1]", "h_c = constant q[2:3]", "h_w1 = concatenation h_a h_c")
    assert kinds(joined) == []


def test_attention_written_out_is_found() -> None:
    network = picture(
        "h_w = constant blocks.0.qkv.weight",
        "h_x = cast f_x",
        "h_q = matrix_multiply h_x h_w",
        "h_s = matrix_multiply h_q h_q",
        "h_p = softmax h_s",
        "h_o = matrix_multiply h_p h_q",
        "f_out = cast h_o",
    )
    assert kinds(network) == [("L3", Kind.ATTENTION), ("L4", Kind.ATTENTION), ("L5", Kind.ATTENTION)]


def test_attention_in_fp32_is_found() -> None:
    network = picture("f_a = attention_input f_x f_x f_x", "f_out = attention_output f_a")
    assert kinds(network) == [("L0", Kind.ATTENTION), ("L1", Kind.ATTENTION)]


def test_fp32_in_the_midst_of_a_branch_is_found() -> None:
    network = replaced("h_g", "f_2 = cast h_2", "f_g = activation f_2", "h_g = cast f_g")
    assert ("L9", Kind.CAST) in kinds(network)


def test_a_cast_before_the_modulation_is_found() -> None:
    network = replaced("h_m", "h_n = cast f_n", "h_s = cast f_scale", "h_m = elementwise h_n h_s")
    assert kinds(network) == [("L2", Kind.CAST), ("L3", Kind.CAST)]


CROSS = (  # a branch after BRANCH, without a normalization of its own
    "h_x = cast f_stream",
    "h_w = constant blocks.0.cross_q.weight",
    "h_q = matrix_multiply h_x h_w",
    "h_a = attention_input h_q h_k h_v",
    "h_o = attention_output h_a",
    "f_o = cast h_o",
    "f_out = elementwise f_stream f_o",
)


def test_a_product_may_read_the_stream_itself() -> None:
    """But not a sum that is no stream: it would be cast up and down between two products."""
    stream = [line.replace("f_out = ", "f_stream = ") for line in BRANCH]
    assert kinds(picture(*stream, *CROSS)) == []
    aside = [line.replace("elementwise f_x f_5", "elementwise f_scale f_5") for line in stream]
    assert (f"L{len(stream)}", Kind.CAST) in kinds(picture(*aside, *CROSS))


def test_a_residual_stream_below_fp32_is_found() -> None:
    network = picture(
        "h_w = constant blocks.0.fc2.weight",
        "h_x = cast f_x",
        "h_1 = matrix_multiply h_x h_w",
        "h_r = elementwise h_1 h_1",
        "h_n = normalization h_r",
        "h_2 = matrix_multiply h_n h_w",
        "f_out = cast h_2",
    )
    assert kinds(network) == [("L4", Kind.NORM)]


def test_a_rounding_of_the_result_is_found() -> None:
    assert kinds(picture("h_out = cast f_x", outputs="h_out")) == [("L0", Kind.CAST)]


def test_a_cast_up_of_what_no_product_gave_is_found() -> None:
    assert kinds(picture("f_out = cast h_x")) == [("L0", Kind.CAST)]


def test_casts_of_constants_and_of_integers_are_no_faults() -> None:
    assert kinds(picture("h_c = constant c", "f_c = cast h_c", "f_out = elementwise f_x f_c")) == []
    assert kinds(picture("f_i = cast i_x", "f_out = elementwise f_i f_i")) == []


@pytest.mark.parametrize(("letter", "precision"), [("b", Precision.FP16), ("h", Precision.BF16), ("d", Precision.FP32)])
def test_types_that_a_graph_does_not_use_are_found(letter: str, precision: Precision) -> None:
    network = picture(f"{letter}_1 = cast f_x", f"{letter}_2 = activation {letter}_1", f"f_out = cast {letter}_2")
    assert [kind for _, kind in kinds(network, precision)] == [Kind.CAST] * 3


def test_anything_below_fp32_in_an_fp32_graph_is_found() -> None:
    found = kinds(picture(*BRANCH), Precision.FP32)
    assert ("L2", Kind.CAST) in found
    assert ("L4", Kind.CAST) in found


# Real graphs.

Spoil = Callable[[onnx.ModelProto], None]


def parsed(rtx: Any, path: Path) -> Network:
    messages = Messages()
    holder = parse_graph(rtx, path, messages)
    return read_network(holder.network)


def function(model: onnx.ModelProto, start: str) -> onnx.FunctionProto:
    return next(each for each in model.functions if each.name.startswith(start))


def around(body: onnx.FunctionProto, node: onnx.NodeProto, floats: int, back: int) -> None:
    """Cast a node's first `floats` inputs to fp32, and its output to `back`."""
    nodes = list(body.node)
    place = nodes.index(node)
    before = []
    for index in range(floats):
        before.append(helper.make_node("Cast", [node.input[index]], [f"spoiled.{index}"], to=onnx.TensorProto.FLOAT))
        node.input[index] = f"spoiled.{index}"
    after = helper.make_node("Cast", ["spoiled.out"], [node.output[0]], to=back)
    node.output[0] = "spoiled.out"
    nodes[place : place + 1] = [*before, node, after]
    del body.node[:]
    body.node.extend(nodes)


def fp32_product(model: onnx.ModelProto) -> None:
    body = function(model, "mlp")
    gemm = next(node for node in body.node if node.op_type == "Gemm" and node.input[1] == "fc1_weight")
    around(body, gemm, 3, onnx.TensorProto.FLOAT16)


def fp32_gelu(model: onnx.ModelProto) -> None:
    body = function(model, "mlp")
    around(body, next(node for node in body.node if node.op_type == "Gelu"), 1, onnx.TensorProto.FLOAT16)


def unfused_attention(model: onnx.ModelProto) -> None:
    body = next(each for each in model.functions if each.name.startswith("attention_"))
    nodes = list(body.node)
    place = next(index for index, node in enumerate(nodes) if node.op_type == "Attention")
    (q, k, v), (out,) = nodes[place].input, nodes[place].output
    nodes[place : place + 1] = [
        helper.make_node("Transpose", [k], ["spoiled.k"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", [q, "spoiled.k"], ["spoiled.scores"]),
        helper.make_node("Softmax", ["spoiled.scores"], ["spoiled.shares"], axis=-1),
        helper.make_node("MatMul", ["spoiled.shares", v], [out]),
    ]
    del body.node[:]
    body.node.extend(nodes)


def half_router(model: onnx.ModelProto) -> None:
    body = function(model, "mlp")
    gemm = next(node for node in body.node if node.op_type == "Gemm" and node.input[1] == "router0_w")
    nodes = list(body.node)
    place = nodes.index(gemm)
    casts = []
    for index in range(3):
        casts.append(helper.make_node("Cast", [gemm.input[index]], [f"spoiled.{index}"], to=onnx.TensorProto.FLOAT16))
        gemm.input[index] = f"spoiled.{index}"
    back = helper.make_node("Cast", ["spoiled.out"], [gemm.output[0]], to=onnx.TensorProto.FLOAT)
    gemm.output[0] = "spoiled.out"
    nodes[place : place + 1] = [*casts, gemm, back]
    del body.node[:]
    body.node.extend(nodes)


SPOILED: list[tuple[Spoil, Kind, str]] = [
    (fp32_product, Kind.PRODUCT, "the matrix product with blocks.0.fc1.weight takes float32, expected float16"),
    (fp32_gelu, Kind.CAST, "casts a value from float16 to float32 and back to float16 between two matrix products"),
    (
        unfused_attention,
        Kind.ATTENTION,
        "attention consists of separate matrix products and a softmax, which TensorRT does not",
    ),
    (
        half_router,
        Kind.PRODUCT,
        "the matrix product with blocks.0.router.0.weight takes float16, expected float32 in every",
    ),
]


@pytest.mark.parametrize(("spoil", "kind", "text"), SPOILED, ids=lambda each: getattr(each, "__name__", ""))
def test_a_spoiled_graph_is_refused_naming_the_layer(rtx, bundle: Bundle, spoil: Spoil, kind: Kind, text: str) -> None:
    path = bundle.path / "subnet-0001.onnx"
    config = bundle.manifest.model
    assert type_findings(parsed(rtx, path), Precision.FP16, config) == []
    model = onnx.load(path, load_external_data=False)
    spoil(model)
    onnx.save(model, path)
    network = parsed(rtx, path)
    found = type_findings(network, Precision.FP16, config)
    fitting = [finding for finding in found if finding.kind is kind and text in finding.text]
    assert fitting, found
    names = {str(layer) for layer in network.layers}
    assert all(finding.layer in names for finding in found)
    with pytest.raises(BackendError) as caught:
        require_types(network, Precision.FP16, config, path.name)
    message = str(caught.value)
    assert message.startswith(
        f"{path.name} has types that fp16 does not allow: layer {found[0].layer}: {found[0].text}"
    )
    assert message.endswith("export the bundle again with --precision fp16")


@pytest.mark.parametrize("precision", [each for each in Precision if each is not Precision.INT8])
@pytest.mark.parametrize("routing", ["capacity", "dense"])
def test_what_we_export_has_no_faults(rtx, capacity_bundle, precision: Precision, routing: str) -> None:
    settings = {} if routing == "capacity" else {"routing": routing, "capacities": None}
    bundle = capacity_bundle(precision.value, **settings)
    model = bundle.manifest.model
    for name in bundle.manifest.files:
        if name.endswith(".onnx"):
            network = parsed(rtx, bundle.path / name)
            assert type_findings(network, precision, model) == [], name
            found = [layer for layer in network.layers if layer.kind == "matrix_multiply"]
            layers = model.depth + 1
            assert len(found) > 3 if name != "conditioning.onnx" else len(found) == 2 + layers
            exempt = 2 if name == "conditioning.onnx" else 2 + 2 * model.depth
            assert len(fp32_products(network, Precision.FP32, model)) == len(found)
            if name == "conditioning.onnx" and precision.in_8_bits:
                exempt += layers  # the inspector of engines asks for these
            if precision is not Precision.FP32:
                assert len(fp32_products(network, precision, model)) == exempt
            if name.startswith("subnet") and precision.in_8_bits:
                found = [
                    each.weight for each in products(network, precision, model).values() if each.dtype != "float32"
                ]
                assert sorted(found) == sorted(model.units.weights)
            for other in set(Precision) - {precision}:
                if name == "conditioning.onnx" and other.dtype == precision.dtype:
                    continue  # adaLN stays fp32 where linear layers are in 8 bits
                assert type_findings(network, other, model), f"{name} passes as {other}"


@pytest.mark.parametrize("precision", [each for each in Precision if each is not Precision.INT8])
def test_what_we_export_of_a_model_with_texts_has_no_faults(rtx, text_bundle, precision: Precision) -> None:
    bundle = text_bundle(precision.value)
    model = bundle.manifest.model
    for name in ("conditioning.onnx", "text.onnx", bundle.manifest.subnets[0].file):
        network = parsed(rtx, bundle.path / name)
        assert type_findings(network, precision, model) == [], name
        attends = sum(layer.kind == "attention_output" for layer in network.layers)
        in_steps = name.startswith("subnet") and precision is not Precision.FP32
        assert attends == 2 * model.depth * in_steps, "self-attention and cross-attention of each block"


@pytest.mark.parametrize("precision", [Precision.INT8_STATIC, Precision.FP8])
@pytest.mark.parametrize("every", [1, 2, 3])
def test_layers_that_stay_in_16_bits_are_asked_for(rtx, mixed_bundle, precision: Precision, every: int) -> None:
    bundle = mixed_bundle(precision.value, every)
    for subnet in bundle.manifest.subnets:
        network = parsed(rtx, bundle.path / subnet.file)
        assert type_findings(network, precision, bundle.manifest.model) == []
        kept = {f"blocks.{block}.{layer}" for block, layers in enumerate(subnet.fp16_layers) for layer in layers}
        halves = {each.name for each in network.layers if each.kind == "constant" and ".weight16" in each.name}
        assert {name.partition(".weight16")[0] for name in halves} == kept
        stored = sum(layer.kind == "dequantize" for layer in network.layers)
        assert (stored == 0) == (every == 1), "an input and a weight of each layer in 8 bits"


@pytest.mark.parametrize("precision", [Precision.INT8_STATIC, Precision.FP8])
def test_what_was_not_asked_for_in_16_bits_is_found(precision: Precision) -> None:
    """A layer that merely is in fp16 fell back; one that should be, in fp32, too."""
    asked = ("h_x = cast f_x", "h_w = constant blocks.0.fc1.weight16[0:3]", "h_y = matrix_multiply h_x h_w")
    assert kinds(picture(*asked, "f_out = cast h_y"), precision) == []
    fell = (line.replace("weight16", "weight") for line in asked)
    assert kinds(picture(*fell, "f_out = cast h_y"), precision) == [("L2", Kind.PRODUCT)]
    wide = picture("f_w = constant blocks.0.fc1.weight16[0:3]", "f_out = matrix_multiply f_x f_w")
    assert kinds(wide, precision) == [("L1", Kind.PRODUCT)]
    assert "takes float32, expected float16" in type_findings(wide, precision, MODEL)[0].text


def test_a_weight_that_is_cast_when_the_engine_is_built_is_no_fault(rtx, tmp_path: Path) -> None:
    half = np.ones((4, 4), np.float16)
    nodes = [
        helper.make_node("Cast", ["x"], ["low"], to=onnx.TensorProto.FLOAT16),
        helper.make_node("MatMul", ["low", "blocks.0.fc1.weight"], ["y"]),
        helper.make_node("Cast", ["y"], ["wide"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Cast", ["blocks.0.fc2.bias"], ["bias"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Add", ["wide", "bias"], ["out"]),
    ]
    weights = [
        onnx.numpy_helper.from_array(half, "blocks.0.fc1.weight"),
        onnx.numpy_helper.from_array(half[0], "blocks.0.fc2.bias"),
    ]
    value = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 4]) for name in ("x", "out")]
    graph = helper.make_graph(nodes, "small", value[:1], value[1:], weights)
    path = tmp_path / "small.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11), path)
    network = parsed(rtx, path)
    assert type_findings(network, Precision.FP16, MODEL) == []
    assert network.inputs == (TensorSpec("x", "float32", ("batch", 4)),)
