"""What a written graph looks like: interface, versions, external weights, shared functions."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dydit.bundle.io_spec import (
    conditioning_inputs,
    conditioning_outputs,
    residual_name,
    subnet_inputs,
    subnet_outputs,
    token_mask_name,
)
from dydit.bundle.manifest import Routing
from dydit.bundle.stored_weights import Precision, stored_type
from dydit.graph.saving import save_graph
from dydit.graph.sources import WeightInputs, Windows
from dydit.models.architecture import WIDTH_ROUTER
from dydit.models.dit.graph import conditioning_graph

TYPES = {"float32": onnx.TensorProto.FLOAT, "int64": onnx.TensorProto.INT64}
ALL = [range(4)] * 3
SOME = [[0, 2], [1], [0, 1, 3]]
MODES = [None, *Routing]
CAPACITIES = (3, 16, 7)


def spec_of(bench, routing, heads=SOME, groups=SOME, gated=frozenset()):
    capacities = CAPACITIES if routing is Routing.CAPACITY else None
    return bench.spec(heads, groups, routing, gated, capacities)


def load(path: Path) -> onnx.ModelProto:
    return onnx.load(path, load_external_data=False)


def interface(values) -> list[tuple]:
    types = [(value.name, value.type.tensor_type) for value in values]
    return [(name, each.elem_type, tuple(d.dim_param or d.dim_value for d in each.shape.dim)) for name, each in types]


def described(specs) -> list[tuple]:
    return [(spec.name, TYPES[spec.dtype], spec.shape) for spec in specs]


def external(proto: onnx.ModelProto) -> dict[str, tuple[int, int, tuple[int, ...]]]:
    """(offset, length, shape) of every external tensor."""
    found = {}
    for tensor in proto.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            where = {entry.key: entry.value for entry in tensor.external_data}
            assert where["location"] == "weights.bin" and not tensor.raw_data
            found[tensor.name] = int(where["offset"]), int(where["length"]), tuple(tensor.dims)
    return found


def embedded_bytes(proto: onnx.ModelProto) -> list[int]:
    nodes = [*proto.graph.node, *(node for each in proto.functions for node in each.node)]
    constants = [a.t for node in nodes for a in node.attribute if a.HasField("t")]
    inside = [t for t in proto.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    return [len(tensor.SerializeToString()) for tensor in (*inside, *constants)]


@pytest.mark.parametrize("routing", MODES)
@pytest.mark.parametrize("gated", [frozenset(), frozenset({(0, 0), (1, 1), (2, 0)})], ids=["plain", "gated"])
@pytest.mark.parametrize("source", [Windows, WeightInputs])
def test_interface_versions_and_size(make_bench, routing, gated, source):
    bench = make_bench()
    path = bench.write(spec_of(bench, routing, gated=gated), source)
    onnx.checker.check_model(str(path), full_check=True)
    proto = load(path)
    assert proto.ir_version == 11
    assert {each.domain: each.version for each in proto.opset_import} == {"": 23, "dydit": 1}
    for each in proto.functions:
        assert {used.domain: used.version for used in each.opset_import}[""] == 23
    own = described(subnet_inputs(bench.config, bool(gated)))
    assert interface(proto.graph.input)[: len(own)] == own
    weights = interface(proto.graph.input)[len(own) :]
    assert len(weights) == (6 * 3 if source is WeightInputs else 0)
    assert interface(proto.graph.output) == described(subnet_outputs(bench.config, routing is Routing.CAPACITY))
    assert {"batch", "rows"} <= {dim for _, _, shape in own for dim in shape if isinstance(dim, str)}
    assert max(embedded_bytes(proto)) < 2048
    assert path.stat().st_size < 45_000


def test_weights_as_inputs_have_symbolic_widths(make_bench):
    bench = make_bench()
    proto = load(bench.write(spec_of(bench, Routing.DYNAMIC), WeightInputs))
    found = {name: shape for name, _, shape in interface(proto.graph.input) if name.startswith("blocks.1.")}
    assert found == {
        "blocks.1.qkv.weight": ("heads_1*48", 64),
        "blocks.1.qkv.bias": ("heads_1*48",),
        "blocks.1.proj.weight": ("heads_1*16", 64),
        "blocks.1.fc1.weight": ("groups_1*64", 64),
        "blocks.1.fc1.bias": ("groups_1*64",),
        "blocks.1.fc2.weight": ("groups_1*64", 64),
    }


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sets(st.integers(0, 3)).map(sorted), min_size=6, max_size=6))
def test_windows_are_the_rows_of_the_slots(make_bench, slots):
    """Read from `weights.bin` by hand, the windows of a part in order are the rows of its slots, and nothing else."""
    bench = make_bench()
    path = bench.write(spec_of(bench, Routing.DENSE, slots[:3], slots[3:]))
    data = (path.parent / "weights.bin").read_bytes()
    windows = external(load(path))
    for block in range(3):
        for part in ("qkv.weight", "qkv.bias", "proj.weight", "fc1.weight", "fc1.bias", "fc2.weight"):
            name = f"blocks.{block}.{part}"
            held = slots[block] if part.startswith(("qkv", "proj")) else slots[3 + block]
            rows = []
            for window in (each for each in windows if each.startswith(f"{name}[")):
                offset, length, shape = windows[window]
                assert length == 4 * math.prod(shape)
                rows.append(np.frombuffer(data, np.float32, length // 4, offset).reshape(shape))
            expected = bench.stored[name][held].flatten(0, 1).numpy()
            np.testing.assert_array_equal(np.concatenate(rows) if rows else expected[:0], expected)


def test_a_prefix_needs_no_concatenation(make_bench):
    bench = make_bench()
    prefix = load(bench.write(spec_of(bench, None, [[0, 1]] * 3, [[0, 1, 2]] * 3)))
    assert not [node for node in prefix.graph.node if node.op_type == "Concat"]
    holes = load(bench.write(spec_of(bench, None, [[0, 1]] * 3, [[0, 2]] + [[0]] * 2)))
    assert len([node for node in holes.graph.node if node.op_type == "Concat"]) == 3, (
        "fc1, its bias, and fc2 of one block"
    )


def test_fixed_tensors_are_the_stored_ones(make_bench):
    bench = make_bench()
    windows = external(load(bench.write(spec_of(bench, Routing.DYNAMIC))))
    for name, (offset, length, shape) in windows.items():
        if "[" not in name:
            entry = bench.entries[name]
            assert (offset, length, shape) == (entry.offset, entry.nbytes, entry.shape)
    assert {
        "embed.weight",
        "pos_embed",
        "final.weight",
        "blocks.2.router.2.bias",
        "blocks.0.fc2.bias",
    } <= windows.keys()
    assert not any(name.startswith(("time", "label", "adaln")) for name in windows), "conditioning is no part of a step"


def test_functions_are_shared_by_blocks_and_only_those_used_are_there(make_bench):
    bench = make_bench()
    proto = load(bench.write(spec_of(bench, Routing.DYNAMIC)))
    calls = [node.op_type for node in proto.graph.node if node.domain == "dydit"]
    assert {each.name for each in proto.functions} == set(calls)
    heads = [len(slots) for slots, _ in spec_of(bench, Routing.DYNAMIC).units]
    blocks = [name for count in heads for name in (f"attention_{count}", "mlp_dynamic")]
    assert calls == ["embed", *blocks, "final", "sampler_step"]
    mixed = bench.spec([[], [0], [1]], [[0], [], [2]], Routing.DYNAMIC, {(2, 0), (2, 1)})
    calls = [node.op_type for node in load(bench.write(mixed)).graph.node if node.domain == "dydit"]
    assert calls[1:-2] == [
        "attention_none",
        "mlp_dynamic",
        "attention_1",
        "mlp_none_routed",
        "attention_1_gated",
        "mlp_dynamic_gated",
    ]


def test_only_dynamic_routing_has_data_dependent_shapes(make_bench):
    """TensorRT for RTX has no NonZero; the other two modes must do without."""
    bench = make_bench()
    for routing in MODES:
        proto = load(bench.write(spec_of(bench, routing)))
        used = {node.op_type for each in proto.functions for node in each.node}
        assert ("NonZero" in used) == (routing is Routing.DYNAMIC)
        assert not used & {"If", "Loop", "TopK", "Compress"}


def test_attributes_too_small_to_show_in_the_numbers(make_bench):
    """LayerNorm's epsilon moves a step by less than fp32 does; the model has 1e-6."""
    bench = make_bench()
    nodes = [node for each in load(bench.write(spec_of(bench, Routing.DYNAMIC))).functions for node in each.node]
    found = {
        (node.op_type, a.name): onnx.helper.get_attribute_value(a)
        for node in nodes
        if node.op_type in ("LayerNormalization", "Gelu")
        for a in node.attribute
    }
    assert found["LayerNormalization", "epsilon"] == pytest.approx(1e-6)
    assert found["LayerNormalization", "axis"] == -1
    assert found["Gelu", "approximate"] == b"tanh"


def test_values_for_debugging_are_in_the_main_graph(make_bench):
    bench = make_bench()
    for routing in MODES:
        proto = load(bench.write(spec_of(bench, routing, heads=[[], [0], [0]], groups=[[0], [], [0]])))
        made = {name for node in proto.graph.node for name in node.output}
        assert {residual_name(block) for block in range(3)} <= made
        assert ({token_mask_name(block) for block in range(3)} <= made) == (routing is not None)


def test_conditioning_graph(make_bench, tmp_path):
    bench = make_bench()
    save_graph(
        conditioning_graph(bench.config, Windows(bench.entries), Precision.FP32), bench.folder / "conditioning.onnx"
    )
    onnx.checker.check_model(str(bench.folder / "conditioning.onnx"), full_check=True)
    proto = load(bench.folder / "conditioning.onnx")
    assert proto.ir_version == 11 and [each.version for each in proto.opset_import] == [23]
    assert interface(proto.graph.input) == described(conditioning_inputs())
    assert interface(proto.graph.output) == described(conditioning_outputs(bench.config))
    assert max(embedded_bytes(proto)) < 2048


def test_stored_tensors_are_of_steps_or_of_the_conditioning(make_bench):
    """And what the model says of them holds in every graph: which are whose, and which products stay fp32.

    But for the width routers, which no graph reads: masks of other timesteps are computed from them.
    """
    bench = make_bench()
    save_graph(
        conditioning_graph(bench.config, Windows(bench.entries), Precision.FP32), bench.folder / "conditioning.onnx"
    )
    step = external(load(bench.write(spec_of(bench, Routing.DYNAMIC, ALL, ALL))))
    conditioning = external(load(bench.folder / "conditioning.onnx"))
    of_step, of_conditioning = ({name.partition("[")[0] for name in windows} for windows in (step, conditioning))
    routers = set(WIDTH_ROUTER)
    assert (of_step | of_conditioning) | routers == bench.entries.keys() and not (of_step | of_conditioning) & routers
    assert of_conditioning | routers == set(filter(bench.config.is_conditioning, bench.entries))
    assert not set(filter(bench.config.is_conditioning, of_step))
    fp32 = {name for name in bench.entries if stored_type(bench.config, name, Precision.FP16) == "float32"}
    assert bench.config.fp32_products == {name for name in fp32 - routers if name.endswith(".weight")}
    static = bench.config.without_routers()
    assert static.fp32_products == {name for name in bench.config.fp32_products if "router" not in name}


def test_same_graph_same_bytes(make_bench):
    bench = make_bench()
    paths = [bench.write(spec_of(bench, Routing.CAPACITY, gated=frozenset({(1, 0), (0, 1)}))) for _ in range(2)]
    assert paths[0].read_bytes() == paths[1].read_bytes()
