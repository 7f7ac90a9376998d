"""ONNX Runtime's CUDA provider has a kernel for every node of every graph, and no value crosses between GPU and host.

The table of kernels was read from the oldest release that dydit takes, by `scripts/cuda_kernels.py`.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from onnx import helper

from dydit.bundle.bundle import Bundle
from dydit.bundle.manifest import PlanKind, Routing
from dydit.bundle.stored_weights import Precision
from dydit.diffusion.process import Process
from dydit.models.config import Routers, TokenScope
from dydit.models.dit.config import DiTConfig
from dydit.models.pixart.config import PixArtConfig
from dydit.models.uvit.config import UViTConfig
from dydit.runtime.backends.session import OLDEST_CUDA
from tests.fixtures.cuda_kernels import TABLE, faults

SCRIPT = Path(__file__).parents[2] / "scripts" / "cuda_kernels.py"
SIZES = {"hidden_size": 32, "num_heads": 2, "patch_size": 2, "input_size": 8, "in_channels": 4}
MODELS = {
    "dit": DiTConfig(depth=2, num_classes=7, **SIZES),
    "pixart": PixArtConfig(hidden_size=48, depth=2, num_heads=3, input_size=8, caption_channels=24, text_tokens=6),
    "uvit": UViTConfig(depth=3, num_classes=7, null_class_row=True, mlp_time_embed=True, process=Process(), **SIZES),
}
PLANS = {
    "subnets": {"plan": PlanKind.MAX_SUBNETS, "max_subnets": 2},
    "per-step": {"plan": PlanKind.PER_STEP},
    "sliding": {"plan": PlanKind.DYNAMIC_WIDTH},
}


def graphs(bundle: Bundle) -> list[Path]:
    return [bundle.path / name for name in bundle.manifest.files if name.endswith(".onnx")]


def check(*bundles: Bundle) -> int:
    """Hold every graph against the table; returns the number of different ones."""
    different = {path.read_bytes(): path for bundle in bundles for path in graphs(bundle)}
    for data, path in different.items():
        assert faults(onnx.load_model_from_string(data)) == [], path
    return len(different)


def wanted(plan: str, precision: Precision, routing: Routing, depth: int, even_ranges) -> dict:
    settings = {"steps": 2, "routing": routing, "precision": precision, **PLANS[plan]}
    if routing is Routing.CAPACITY:
        settings["capacities"] = (9,) * depth
    if precision.is_calibrated:
        settings["activations"] = even_ranges(2, depth)
    return settings


ALL = [
    (plan, precision, routing)
    for plan, precision, routing in itertools.product(PLANS, Precision, Routing)
    if precision is not Precision.INT8  # refused on a GPU
    and not (precision.in_8_bits and plan != "subnets")
    and not (plan == "per-step" and precision is not Precision.FP32)  # such graphs differ from "subnets" in gates
]


@pytest.mark.parametrize("name", MODELS)
def test_every_node_of_every_bundle_has_a_kernel(name, make_bundle, make_checkpoint, even_ranges):
    checkpoint = make_checkpoint(MODELS[name], flops_ratio=0.4)
    bundles = [make_bundle(checkpoint, **wanted(*each, MODELS[name].depth, even_ranges)) for each in ALL]
    assert check(*bundles) > 2 * len(bundles)


@pytest.mark.parametrize(
    "changes",
    [
        {"routers": Routers.ALL_ROUTED},
        {"routers": Routers.NONE},
        {"token_scope": TokenScope.LAYER},
        {"learn_sigma": False},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_other_forms_of_a_model_too(changes, make_bundle, make_checkpoint):
    checkpoint = make_checkpoint(MODELS["dit"].model_copy(update=changes), flops_ratio=0.3)
    bundle = make_bundle(checkpoint, steps=4, plan=PlanKind.PER_STEP, routing=Routing.DENSE)
    assert changes.get("routers") is not Routers.ALL_ROUTED or any(
        not slots for entry in bundle.manifest.subnets for block in entry.units for slots in block
    )
    check(bundle)


def test_layers_in_16_bits_and_smoothed_inputs_too(mixed_bundle, capacity_bundle, make_smoothing, digits_like):
    for precision in ("int8-static", "fp8"):
        check(mixed_bundle(precision, 3))
        check(capacity_bundle(precision, smoothing=make_smoothing(digits_like), steps=4))


def test_the_table_is_that_of_the_oldest_release_that_is_taken():
    assert tuple(map(int, TABLE["version"].split(".")[:2])) == OLDEST_CUDA
    assert TABLE["version"] in TABLE["source"] and TABLE["opset"] == 23


def test_int8_which_is_for_the_cpu_has_no_kernels(make_bundle, make_checkpoint):
    """The check finds what has none, and names it."""
    bundle = make_bundle(make_checkpoint(MODELS["dit"]), steps=2, precision="int8", routing=Routing.DENSE)
    found = faults(onnx.load(bundle.path / "subnet-0000.onnx", load_external_data=False))
    assert any(each.startswith("MatMulIntegerToFloat that gives") and "no CUDA kernel" in each for each in found)


def graph(*nodes: onnx.NodeProto, x: int = onnx.TensorProto.FLOAT) -> onnx.ModelProto:
    """A graph of nodes that read x [a, 3, 3]."""
    given = [helper.make_tensor_value_info("x", x, ["a", 3, 3])]
    made = [helper.make_empty_tensor_value_info(nodes[-1].output[0])]
    number = helper.make_tensor("one", onnx.TensorProto.INT64, [1], [1])
    return helper.make_model(
        helper.make_graph(nodes, "graph", given, made, [number]), opset_imports=[helper.make_opsetid("", 23)]
    )


@pytest.mark.parametrize(
    ("nodes", "fault"),
    [
        ([("Det", ["x"], ["y"])], "Det that gives y, of (float), has no CUDA kernel"),
        ([("Shape", ["x"], ["s"]), ("Cast", ["x"], ["i"], {"to": 7}), ("Less", ["i", "s"], ["y"])],
         "Less that gives y, of (int64, int64), reads s from the other side"),
        ([("Cast", ["x"], ["i"], {"to": 7}), ("Reshape", ["i", "one"], ["r"]), ("Reshape", ["x", "r"], ["y"])],
         "Reshape that gives y, of (float, int64), reads r from the other side"),
        ([("Shape", ["x"], ["s"]), ("Mul", ["s", "one"], ["t"]), ("Reshape", ["x", "t"], ["y"])], None),
        ([("Shape", ["x"], ["s"]), ("ConstantOfShape", ["s"], ["c"]), ("Add", ["x", "c"], ["y"])], None),
    ],
    ids=["no kernel", "from the host", "to the host", "shapes", "filled on the device"],
)  # fmt: skip
def test_what_a_gpu_cannot_do_is_found(nodes, fault):
    made = [helper.make_node(each[0], each[1], each[2], **(each[3] if len(each) > 3 else {})) for each in nodes]
    assert faults(graph(*made)) == ([] if fault is None else [fault])


def test_types_are_told_apart():
    node = helper.make_node("LpNormalization", ["x"], ["y"])
    assert faults(graph(node)) == []
    (fault,) = faults(graph(node, x=onnx.TensorProto.BFLOAT16))
    assert fault == "LpNormalization that gives y, of (bfloat16), has no CUDA kernel"


@pytest.mark.release
def test_onnxruntime_itself_places_every_node_on_the_gpu(make_bundle, make_checkpoint, even_ranges):
    """By its own partitioning, in a package of which only CUDA's libraries are replaced."""
    wheel = os.environ.get("DYDIT_ONNXRUNTIME_GPU_WHEEL")
    if not wheel:
        pytest.skip("DYDIT_ONNXRUNTIME_GPU_WHEEL names no package: pip download --no-deps onnxruntime-gpu")
    bundles = []
    for config in MODELS.values():
        checkpoint = make_checkpoint(config, flops_ratio=0.4)
        bundles += [make_bundle(checkpoint, **wanted(*each, config.depth, even_ranges)) for each in ALL]
    paths = [str(bundle.path) for bundle in bundles]
    done = subprocess.run([sys.executable, SCRIPT, "place", wheel, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-1] == f"{sum(len(graphs(bundle)) for bundle in bundles)} graphs, 0 copies"
    int8 = make_bundle(make_checkpoint(MODELS["dit"]), steps=2, precision="int8", routing=Routing.DENSE)
    done = subprocess.run([sys.executable, SCRIPT, "place", wheel, str(int8.path)], capture_output=True, text=True)
    assert done.returncode == 1 and "the output of QuantizeLinear" in done.stdout
