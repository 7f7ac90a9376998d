"""What the engine inspector says of built engines, on descriptions in its form; and, with a GPU, on a real engine."""

from __future__ import annotations

from typing import Any

import pytest

from dydit.bundle.manifest import Precision
from dydit.engines.findings import Kind
from dydit.engines.inspector import engine_findings

ROUTER = "[ONNX Layer: node_Gemm_5 | node_mlp_capacity_4 (mlp_capacity)]"
FC1 = "[ONNX Layer: node_Gemm_36 | node_mlp_capacity_4 (mlp_capacity)]"
ATTENTION = "[ONNX Layer: node_Attention_11 | node_attention_2 (attention)]"


def layer(name: str, kind: str, dtype: str, origin: str = "", tactic: str = "") -> dict[str, Any]:
    matrix = {"Name": "a", "Dimensions": [64, 64], "Format/Datatype": dtype}
    factor = {"Name": "alpha", "Dimensions": [1], "Format/Datatype": "Float"}
    return {
        "Name": name,
        "LayerType": kind,
        "Inputs": [matrix, matrix, factor],
        "Outputs": [matrix],
        "TacticName": tactic,
        "Metadata": origin,
    }


FUSED = layer("_gemm_mha_v2_myl0_17", "kgen", "Half", ATTENTION, "_gemm_mha_v2_0x957a")
GOOD = [
    FUSED,
    layer("fc1_myl0_3", "gemm", "Half", FC1),
    layer("router_myl0_2", "gemm", "Float", ROUTER),
    layer("__myl_AddMul", "kgen", "Float"),
]


def found(layers: list[dict[str, Any]], precision: Precision = Precision.FP16) -> list[tuple[str, Kind]]:
    findings = engine_findings(layers, precision, frozenset({ROUTER}), attends=True)
    return [(finding.layer, finding.kind) for finding in findings]


def test_an_engine_by_the_recipe_has_no_faults() -> None:
    assert found(GOOD) == []


@pytest.mark.parametrize("dtype", ["Float", "FP32", "Row major linear FP32", "float32"])
def test_an_fp32_product_is_found(dtype: str) -> None:
    assert found([*GOOD, layer("fc2_myl0_4", "gemm", dtype, FC1)]) == [("fc2_myl0_4", Kind.PRODUCT)]


@pytest.mark.parametrize("dtype", ["Half", "Float16", "BFloat16", "Row major linear FP16", "Int8"])
def test_products_of_other_types_are_not(dtype: str) -> None:
    assert found([*GOOD, layer("fc2_myl0_4", "gemm", dtype, FC1)]) == []


def test_attention_that_was_not_fused_is_found() -> None:
    softmax = layer("__myl_MaxSubExpSoftmax_myl0_5", "kgen", "Half", ATTENTION)
    assert found([*GOOD, softmax]) == [("__myl_MaxSubExpSoftmax_myl0_5", Kind.ATTENTION)]
    assert found(GOOD[1:]) == [("(none)", Kind.ATTENTION)]
    assert engine_findings(GOOD[1:], Precision.FP16, frozenset({ROUTER}), attends=False) == []


def test_fp32_engines_have_nothing_to_find() -> None:
    assert found([layer("fc1", "gemm", "Float", FC1)], Precision.FP32) == []


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_built_engine_keeps_the_types_of_its_graph(rtx, capacity_bundle, tmp_path, precision: str) -> None:
    import shutil

    from dydit.bundle.bundle import Bundle
    from dydit.engines.build import build_engines
    from dydit.engines.fingerprint import make_request
    from dydit.engines.flavour import Flavour, present_gpu
    from dydit.engines.inspector import inspect_graph
    from dydit.engines.store import open_store

    if present_gpu() is None:
        pytest.skip("no NVIDIA driver or GPU here")
    copy = tmp_path / "bundle"
    shutil.copytree(capacity_bundle(precision, max_subnets=1, capacities=None, steps=2).path, copy)
    bundle = Bundle.open(copy)
    build_engines(bundle, make_request(bundle.manifest, Flavour.TENSORRT_RTX, rtx.__version__, present_gpu()))
    store = open_store(bundle, Flavour.TENSORRT_RTX, rtx.__version__, present_gpu())
    for graph in ("subnet-0000.onnx", "conditioning.onnx"):
        assert inspect_graph(store, graph) == []
