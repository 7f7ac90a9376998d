"""The verdict on the kernels of engines: as the inspector describes them, and, with a GPU, of a real engine.

What plans say of real engines is in test_rtx.py.
"""

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
from dydit.engines.inspector import ChosenKernels, Inspection, inspect_engine, judge
from dydit.engines.kernels import Kernel, KernelKind
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


ROUTED = Network(
    (
        Layer("blocks.0.router.0.weight", "constant", (), ("w",)),
        Layer("router", "matrix_multiply", ("x", "w"), ("y",), ROUTER),
        Layer("blocks.0.fc1.weight", "constant", (), ("v",)),
        Layer("fc1", "matrix_multiply", ("y", "v"), ("u",), FC1),
        Layer("attention", "attention_input", ("u",), ("z",), ATTENTION),
    ),
    dict.fromkeys("wxyzuv", "float32"),
    (TensorSpec("x", "float32", ("rows", 64)),),
    ("z",),
)


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


@pytest.fixture(autouse=True)
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(inspector, "present_gpu", lambda: Gpu("NVIDIA L4", "8.9"))


def inspected(text: str | None, precision: Precision = Precision.FP16, network: Network = ROUTED) -> Inspection | None:
    return inspect_engine(PretendedTensorRT(text), Flavour.TENSORRT, b"engine", network, precision, MODEL)


def found(layers: list[dict[str, Any]], precision: Precision = Precision.FP16) -> list[tuple[str, Kind]]:
    inspection = inspected(json.dumps({"Layers": layers}), precision)
    assert inspection is not None
    return [(finding.layer, finding.kind) for finding in inspection.findings]


def test_an_engine_by_the_recipe_has_no_faults() -> None:
    assert found(GOOD) == []
    inspection = inspected(json.dumps({"Layers": GOOD}))
    assert inspection is not None
    assert inspection.chosen == ChosenKernels(
        products={"float32": 1, "float16": 1}, fused_attention=1, in_8_bits=0, not_in_8_bits=()
    )


@pytest.mark.parametrize("dtype", ["Float", "FP32", "Row major linear FP32", "float32"])
def test_an_fp32_product_is_found(dtype: str) -> None:
    assert found([*GOOD, layer("fc2_myl0_4", "gemm", dtype, FC1)]) == [("fc2_myl0_4", Kind.PRODUCT)]


@pytest.mark.parametrize("dtype", ["Half", "Float16", "BFloat16", "Row major linear FP16", "Int8"])
def test_products_of_other_types_are_not(dtype: str) -> None:
    assert found([*GOOD, layer("fc2_myl0_4", "gemm", dtype, FC1)]) == []


def test_attention_that_was_not_fused_is_found() -> None:
    softmax = layer("__myl_MaxSubExpSoftmax_myl0_5", "kgen", "Half", ATTENTION)
    assert found([*GOOD, softmax]) == [("__myl_MaxSubExpSoftmax_myl0_5", Kind.ATTENTION)]
    assert found(GOOD[1:]) == [(ATTENTION, Kind.ATTENTION)]
    split = layer("node_attention_2_softmax_myl0_5", "kgen", "Half", ATTENTION, "__myl_MaxSubExpDivMul_0x12ab")
    assert found([*GOOD[1:], split]) == [(split["Name"], Kind.ATTENTION), (ATTENTION, Kind.ATTENTION)]
    named = layer("mha_split_softmax_myl0_6", "kgen", "Half", ATTENTION, "__myl_MaxSubExpDivMul_0x12ab")
    assert found([*GOOD[1:], named]) == [(named["Name"], Kind.ATTENTION), (ATTENTION, Kind.ATTENTION)]


def test_fp32_engines_have_nothing_to_find() -> None:
    assert found([FUSED, layer("fc1", "gemm", "Float", FC1)], Precision.FP32) == []


@pytest.mark.parametrize("text", [None, '{"Layers": []}', '{"Layers": ["fc1_myl0_3"]}', "{}"])
def test_an_engine_that_cannot_be_looked_into_is_not_judged(text: str | None) -> None:
    assert inspected(text) is None


def test_kernels_that_do_not_say_what_they_compute_are_not_judged() -> None:
    assert inspected(json.dumps({"Layers": [layer("fc1_myl0_3", "gemm", "Float")]})) is None


def test_without_a_gpu_nothing_is_loaded(monkeypatch) -> None:
    monkeypatch.setattr(inspector, "present_gpu", lambda: None)
    for flavour in Flavour:
        assert inspect_engine(object(), flavour, b"engine", ROUTED, Precision.FP16, MODEL) is None


IN_8_BITS = Network(
    (
        Layer("blocks.0.fc1.weight[0:3]", "constant", (), ("w8",)),
        Layer("q", "quantize", ("x", "s"), ("x8",)),
        Layer("dx", "dequantize", ("x8", "s"), ("xd",)),
        Layer("dw", "dequantize", ("w8", "s"), ("wd",)),
        Layer("fc1", "matrix_multiply", ("xd", "wd"), ("y",), FC1),
        Layer("blocks.0.fc2.weight16[0:3]", "constant", (), ("h",)),
        Layer("fc2", "matrix_multiply", ("g", "h"), ("z",), ROUTER),
    ),
    {**dict.fromkeys(("x", "s", "xd", "wd", "y"), "float32"), **dict.fromkeys("ghz", "float16"), "x8": "int8"}
    | {"w8": "int8"},
    (TensorSpec("x", "float32", ("rows", 64)),),
    ("z",),
)


@pytest.mark.parametrize(
    ("types", "not_in_8_bits"),
    [
        ([("int8", "int8")], ()),
        ([("int8", "float16")], ("blocks.0.fc1.weight",)),
        ([("int8", "int8"), ("float32", "float32")], ("blocks.0.fc1.weight",)),
        ([], ("blocks.0.fc1.weight",)),
    ],
)
def test_products_that_are_not_in_8_bits_are_told_from_those_that_should_not_be(types, not_in_8_bits) -> None:
    """Of the kernels of all optimization profiles, and where a product has none. It is no fault."""
    kernels = [Kernel("fc1", KernelKind.PRODUCT, each, FC1) for each in types]
    kernels.append(Kernel("fc2", KernelKind.PRODUCT, ("float16", "float16"), ROUTER))
    inspection = judge(kernels, IN_8_BITS, Precision.INT8_STATIC, MODEL)
    assert inspection.findings == []
    assert (inspection.chosen.in_8_bits, inspection.chosen.not_in_8_bits) == (1, not_in_8_bits)
    assert sum(inspection.chosen.products.values()) == 2 and inspection.chosen.products["float16"] == 1


@pytest.mark.parametrize("inspect", [True, False])
def test_an_engine_whose_kernels_are_wrong_is_refused_and_not_kept(
    rtx, capacity_bundle, tmp_path, monkeypatch, inspect: bool
) -> None:
    """The engine is real; what its inspector says is not."""
    bundle = capacity_bundle("fp16", max_subnets=2, capacities=None, steps=4)
    faults = [Finding("fc2_myl0_4", Kind.PRODUCT, "the product takes float32, expected float16")]
    nothing = ChosenKernels(products={}, fused_attention=0, in_8_bits=0, not_in_8_bits=())
    monkeypatch.setattr(builder, "inspect_engine", lambda *_: Inspection(nothing, faults))
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
