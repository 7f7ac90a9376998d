"""Checks which kernels the builder chose: in which types products are computed, and whether attention is fused.

TensorRT may split or merge the layers of a network. A plan of TensorRT for RTX says what became of them, and is read
without a GPU. For other engines TensorRT's engine inspector is asked, which needs the engine's GPU.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from dydit.bundle.stored_weights import Precision
from dydit.engines.findings import ATTENTION, Finding, Kind, products
from dydit.engines.flavour import Flavour, present_gpu
from dydit.engines.kernels import Kernel, KernelKind, kind_of, plan_programs
from dydit.engines.network import Messages, Network, make_logger
from dydit.models.config import ModelConfig
from dydit.validation import Strict

_PRODUCT_TYPES = ("gemm", "matrixmultiply", "matrix_multiply", "fullyconnected")
_TYPES = {  # as the inspector writes them: "Half", "FP16", "Row major linear FP16"
    "float32": re.compile(r"\b(float|float32|fp32)\b", re.IGNORECASE),
    "float16": re.compile(r"\b(half|float16|fp16)\b", re.IGNORECASE),
    "bfloat16": re.compile(r"\b(bfloat16|bf16)\b", re.IGNORECASE),
    "int8": re.compile(r"\bint8\b", re.IGNORECASE),
    "float8_e4m3fn": re.compile(r"\b(fp8|float8|e4m3)", re.IGNORECASE),
}
_EIGHT_BITS = ("int8", "float8_e4m3fn")
_NO_PRODUCT = "elementwise"


class ChosenKernels(Strict):
    """What the builder made of a network's products and attention, over all optimization profiles."""

    products: dict[str, int] = Field(
        description="number of products by the type of their operands; `elementwise`: those without a kernel of their "
        "own, which are written out as sums"
    )
    fused_attention: int = Field(ge=0, description="number of attention operators that one kernel computes")
    in_8_bits: int = Field(ge=0, description="number of products whose weights the bundle holds in 8 bits")
    not_in_8_bits: tuple[str, ...] = Field(description="weights of those that the engine computes in another type")


@dataclass(frozen=True)
class Inspection:
    """The kernels of an engine, and what is wrong with them: empty if nothing is."""

    chosen: ChosenKernels
    findings: list[Finding]


def inspect_engine(
    trt: Any, flavour: Flavour, engine: Any, network: Network, precision: Precision, model: ModelConfig
) -> Inspection | None:
    """Inspect a built engine (a buffer) of a bundle of `model`.

    None if this machine cannot tell: the plan does not say, and there is no GPU, or another than the engine's, or the
    inspector does not say which nodes the kernels compute.
    """
    kernels: list[Kernel] = []
    if flavour is Flavour.TENSORRT_RTX:
        kernels = [kernel for program in plan_programs(engine) for kernel in program.kernels]
    kernels = kernels or _inspected(trt, engine)
    nodes = {layer.origin for layer in network.layers if layer.origin}
    if not any(node in kernel.origin for kernel in kernels for node in nodes):
        return None
    return judge(kernels, network, precision, model)


def judge(kernels: Sequence[Kernel], network: Network, precision: Precision, model: ModelConfig) -> Inspection:
    """Compare the kernels of an engine with the network that it was built from.

    A finding: a product that should be in 16 bits and takes float32, and attention that is not one kernel. A product
    that should be in 8 bits and is not is slower, and no finding.
    """
    expected, findings = products(network, precision, model), []
    taken: dict[str, set[str]] = {origin: set() for origin in expected}
    for kernel in kernels:
        if kernel.kind is KernelKind.PRODUCT:
            computed = [origin for origin in expected if origin and origin in kernel.origin]
            for origin in computed:
                taken[origin].update(kernel.dtypes)
            right = {expected[origin].dtype for origin in computed}
            if "float32" in kernel.dtypes and right and right <= {"float16", "bfloat16"}:
                text = f"the product takes float32, expected {' or '.join(sorted(right))}"
                findings.append(Finding(kernel.name, Kind.PRODUCT, text))
        elif kernel.kind is KernelKind.OTHER and "softmax" in kernel.name.lower() and precision is not Precision.FP32:
            text = "attention is not fused: its softmax is a kernel of its own"
            findings.append(Finding(kernel.name, Kind.ATTENTION, text))
    attention = {layer.origin for layer in network.layers if layer.kind in ATTENTION and layer.origin}
    fused = [kernel.origin for kernel in kernels if kernel.kind is KernelKind.ATTENTION]
    split = sorted(origin for origin in attention if not any(origin in each for each in fused))
    findings += [Finding(each, Kind.ATTENTION, "attention is not fused: no kernel computes it") for each in split]
    in_8_bits = {origin for origin, each in expected.items() if each.dtype in _EIGHT_BITS}
    wider = [expected[origin].weight for origin in in_8_bits if taken[origin] != {expected[origin].dtype}]
    chosen = ChosenKernels(
        products=dict(Counter("/".join(sorted(dtypes)) or _NO_PRODUCT for dtypes in taken.values())),
        fused_attention=len(attention) - len(split),
        in_8_bits=len(in_8_bits),
        not_in_8_bits=tuple(sorted(wider)),
    )
    return Inspection(chosen, findings)


def _inspected(trt: Any, engine: Any) -> list[Kernel]:
    """The kernels as TensorRT's inspector describes them; empty where it cannot."""
    if present_gpu() is None:
        return []
    runtime = trt.Runtime(make_logger(trt, Messages()))
    loaded = runtime.deserialize_cuda_engine(engine)
    if loaded is None:
        return []
    text = loaded.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    layers = json.loads(text).get("Layers", [])
    return [_kernel(layer) for layer in layers] if all(isinstance(layer, dict) for layer in layers) else []


def _kernel(layer: Mapping[str, Any]) -> Kernel:
    """A layer of the inspector's. Fused attention is known by its tactic, and by its name only where none is stated.

    The names of kernels that attention was split into have the word attention in them too.
    """
    name, kind = str(layer.get("Name", "")), str(layer.get("LayerType", "")).lower()
    matrices = [tensor for tensor in layer.get("Inputs", ()) if len(tensor.get("Dimensions", ())) > 1]
    dtypes = (_dtype(str(tensor.get("Format/Datatype", tensor.get("Datatype", "")))) for tensor in matrices)
    known = kind_of(str(layer.get("TacticName") or name), kind in _PRODUCT_TYPES)
    label = f"{name} {kind}" if "softmax" in kind else name
    return Kernel(label, known, tuple(dtypes), str(layer.get("Metadata", "")))


def _dtype(text: str) -> str:
    return next((dtype for dtype, pattern in _TYPES.items() if pattern.search(text)), "unknown")
