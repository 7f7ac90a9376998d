"""Checks the types of a built engine's kernels with TensorRT's engine inspector. Needs the engine's GPU.

TensorRT may still split or merge layers of the network. Here, fused attention and the type of each product are checked
on the kernels that were chosen.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dydit.bundle.stored_weights import Precision
from dydit.engines.findings import ATTENTION, Finding, Kind, fp32_products
from dydit.engines.flavour import present_gpu
from dydit.engines.network import Messages, Network, make_logger
from dydit.models.config import ModelConfig

_PRODUCT_TYPES = ("gemm", "matrixmultiply", "matrix_multiply", "fullyconnected")
_FUSED = "mha"  # in tactics such as _gemm_mha_v2 and fmha_v2_flash_attention
_FP32 = re.compile(r"\b(float|float32|fp32)\b", re.IGNORECASE)


def inspect_engine(
    trt: Any, engine: Any, network: Network, precision: Precision, model: ModelConfig
) -> list[Finding] | None:
    """Check a built engine (a buffer) of a bundle of `model` against its precision and its network.

    Empty if its types are right; None if this machine cannot tell: without a GPU, with another GPU than the engine's,
    or if the inspector gives no details of the layers.
    """
    if present_gpu() is None:
        return None
    runtime = trt.Runtime(make_logger(trt, Messages()))
    loaded = runtime.deserialize_cuda_engine(engine)
    if loaded is None:
        return None
    text = loaded.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    layers = json.loads(text).get("Layers", [])
    if not layers or not all(isinstance(layer, dict) for layer in layers):
        return None
    attends = any(layer.kind in ATTENTION for layer in network.layers)
    return engine_findings(layers, precision, fp32_products(network, precision, model), attends)


def engine_findings(
    layers: Sequence[Mapping[str, Any]], precision: Precision, exempt: frozenset[str], attends: bool
) -> list[Finding]:
    """Wrong types in the layers of an engine below fp32.

    `exempt`: the ONNX nodes whose products stay fp32 (`fp32_products`). `attends`: whether the network has attention,
    which must then be in a fused kernel.
    """
    if precision is Precision.FP32:
        return []
    findings = []
    for layer in layers:
        name, kind = str(layer.get("Name", "")), str(layer.get("LayerType", "")).lower()
        origin = str(layer.get("Metadata", ""))
        if kind in _PRODUCT_TYPES and _takes_fp32(layer) and not any(node in origin for node in exempt):
            findings.append(Finding(name, Kind.PRODUCT, f"the product takes float32, expected {precision.dtype}"))
        if "softmax" in f"{name} {kind}".lower() and not _is_fused(layer):
            findings.append(Finding(name, Kind.ATTENTION, "attention is not fused: its softmax is a kernel of its own"))
    if attends and not any(_is_fused(layer) for layer in layers):
        findings.append(Finding("(none)", Kind.ATTENTION, "attention is not fused: no kernel is one of attention"))
    return findings


def _is_fused(layer: Mapping[str, Any]) -> bool:
    """Whether a kernel is one of fused attention, by its tactic; by its name only where no tactic is stated.

    The names of kernels that attention was split into have the word attention in them too.
    """
    return _FUSED in str(layer.get("TacticName") or layer.get("Name", "")).lower()


def _takes_fp32(layer: Mapping[str, Any]) -> bool:
    """Whether a matrix among the inputs is fp32. A product's scalars alpha and beta always are."""
    for tensor in layer.get("Inputs", ()):
        dtype = str(tensor.get("Format/Datatype", tensor.get("Datatype", "")))
        if len(tensor.get("Dimensions", ())) > 1 and _FP32.search(dtype):
            return True
    return False
