"""What the engine inspector says of built engines, on descriptions in its form; and, with a GPU, on a real engine."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest

from dydit.bundle.bundle import Bundle
from dydit.bundle.io_spec import TensorSpec, conditioning_inputs
from dydit.bundle.stored_weights import Precision
from dydit.engines import builder, inspector
from dydit.engines.builder import Job, build_engine
from dydit.engines.bundle_engines import build_engines
from dydit.engines.findings import Finding, Kind
from dydit.engines.fingerprint import make_request
from dydit.engines.flavour import Flavour, Gpu, present_gpu
from dydit.engines.inspector import engine_findings, inspect_engine
from dydit.engines.network import Layer, Network
from dydit.engines.profiles import symbol_ranges
from dydit.errors import BackendError
from dydit.models.dit.config import preset

MODEL = preset("S/2")
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
    split = layer("node_attention_2_softmax_myl0_5", "kgen", "Half", ATTENTION, "__myl_MaxSubExpDivMul_0x12ab")
    assert found([*GOOD[1:], split]) == [(split["Name"], Kind.ATTENTION), ("(none)", Kind.ATTENTION)]
    named = layer("mha_split_softmax_myl0_6", "kgen", "Half", ATTENTION, "__myl_MaxSubExpDivMul_0x12ab")
    assert found([*GOOD[1:], named]) == [(named["Name"], Kind.ATTENTION), ("(none)", Kind.ATTENTION)]
    assert engine_findings(GOOD[1:], Precision.FP16, frozenset({ROUTER}), attends=False) == []


def test_fp32_engines_have_nothing_to_find() -> None:
    assert found([layer("fc1", "gemm", "Float", FC1)], Precision.FP32) == []


class PretendedTensorRT:
    """Loads anything, and describes it by a text."""

    __version__ = "11.4.0"

    class ILogger:
        WARNING = 2

    class LayerInformationFormat:
        JSON = "json"

    def __init__(self, text: str | None):
        self.text = text

    def Runtime(self, logger: Any) -> PretendedTensorRT:
        return self

    def deserialize_cuda_engine(self, engine: bytes) -> PretendedTensorRT | None:
        return None if self.text is None else self

    def create_engine_inspector(self) -> PretendedTensorRT:
        return self

    def get_engine_information(self, form: str) -> str:
        assert form == "json" and self.text is not None
        return self.text


ROUTED = Network(
    (
        Layer("blocks.0.router.0.weight", "constant", (), ("w",)),
        Layer("router", "matrix_multiply", ("x", "w"), ("y",), ROUTER),
        Layer("attention", "attention_input", ("y",), ("z",), ATTENTION),
    ),
    dict.fromkeys("wxyz", "float32"),
    (TensorSpec("x", "float32", ("rows", 64)),),
    ("z",),
)


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspector, "present_gpu", lambda: Gpu("NVIDIA L4", "8.9"))


def test_the_layers_of_an_engine_are_held_against_its_network(on_a_gpu) -> None:
    trt = PretendedTensorRT(json.dumps({"Layers": GOOD}))
    assert inspect_engine(trt, b"engine", ROUTED, Precision.FP16, MODEL) == []
    spoiled = [*GOOD[1:], layer("fc2_myl0_4", "gemm", "Float", FC1)]
    found = inspect_engine(PretendedTensorRT(json.dumps({"Layers": spoiled})), b"engine", ROUTED, Precision.FP16, MODEL)
    assert found is not None
    assert [(finding.layer, finding.kind) for finding in found] == [
        ("fc2_myl0_4", Kind.PRODUCT),
        ("(none)", Kind.ATTENTION),
    ]


@pytest.mark.parametrize("text", [None, '{"Layers": []}', '{"Layers": ["fc1_myl0_3"]}', "{}"])
def test_an_engine_that_cannot_be_looked_into_is_not_judged(on_a_gpu, text: str | None) -> None:
    assert inspect_engine(PretendedTensorRT(text), b"engine", ROUTED, Precision.FP16, MODEL) is None


def test_without_a_gpu_nothing_is_loaded(monkeypatch) -> None:
    monkeypatch.setattr(inspector, "present_gpu", lambda: None)
    assert inspect_engine(object(), b"engine", ROUTED, Precision.FP16, MODEL) is None


@pytest.mark.parametrize("inspect", [True, False])
def test_an_engine_whose_kernels_are_wrong_is_refused_and_not_kept(
    rtx, capacity_bundle, tmp_path, monkeypatch, inspect: bool
) -> None:
    """The engine is real; what its inspector says is not."""
    bundle = capacity_bundle("fp16", max_subnets=2, capacities=None, steps=4)
    faults = [Finding("fc2_myl0_4", Kind.PRODUCT, "the product takes float32, expected float16")]
    monkeypatch.setattr(builder, "inspect_engine", lambda *_: faults)
    request = make_request(bundle.manifest, Flavour.TENSORRT_RTX, rtx.__version__, None)
    ranges = symbol_ranges(bundle.manifest, request.opt_batches, request.max_batch)
    graph, engine, log = bundle.path / "conditioning.onnx", tmp_path / "x.engine", tmp_path / "build.log"
    job = Job(
        graph=graph,
        engine=engine,
        request=request,
        model=bundle.manifest.model,
        inputs=conditioning_inputs(),
        ranges=ranges,
        log=log,
        inspect=inspect,
    )
    if not inspect:
        assert build_engine(job).bytes == engine.stat().st_size
        return
    with pytest.raises(BackendError) as caught:
        build_engine(job)
    assert str(caught.value) == (
        f"tensorrt-rtx {rtx.__version__} built conditioning.onnx with types that fp16 does not allow: layer "
        "fc2_myl0_4: the product takes float32, expected float16; try another version of it, or keep such engines "
        "with --no-inspect"
    )
    assert not engine.exists()
    assert "x.engine from conditioning.onnx: failed" in log.read_text()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_built_engine_keeps_the_types_of_its_graph(rtx, capacity_bundle, tmp_path, precision: str) -> None:
    if present_gpu() is None:
        pytest.skip("no NVIDIA driver or GPU here")
    copy = tmp_path / "bundle"
    shutil.copytree(capacity_bundle(precision, max_subnets=1, capacities=None, steps=2).path, copy)
    bundle = Bundle.open(copy)
    report = build_engines(bundle, make_request(bundle.manifest, Flavour.TENSORRT_RTX, rtx.__version__, present_gpu()))
    assert report.log.read_text().count("its kernels inspected") == 2
