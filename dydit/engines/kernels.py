"""The kernels of an engine as its plan describes them: which ONNX nodes each computes, and on which types.

A plan of TensorRT for RTX (1.7.1) holds its programs as text, one for each optimization profile and one for each
product that is compiled together with what follows it. So they can be read where there is no GPU:

    header {         settings, such as tf32=0, stream_capturable=1 and accelerators={sm80 }
    descriptors {    the tensors: name="x.1" ... type=float
    main {           the kernels: fully_connected={ name="..." input={"a" "b" ...} layers="[ONNX Layer: node_Gemm_2]" }

NVIDIA does not document this text. A plan without such programs says nothing here, and is not judged. Which kernel
computes a product is decided on the GPU (`runtime_tactic=true`); its types are in the plan.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

# Lines of a program are indented or empty, so a search ends with the text and never runs into the weights after it.
_LINES = rb"((?:(?: .*)?\n)+)"
_PROGRAM = re.compile(
    rb"header \{\n" + _LINES + rb"\}\ndescriptors \{\n" + _LINES + rb"\}\nmain \{\n" + _LINES + rb"\}\n"
)
_SETTING = re.compile(rb"^  (\w+)=\{?(.*?) ?\}?$", re.MULTILINE)
_TENSOR = re.compile(rb'^  (?:sub_)?tensor=\{.*? name="([^"]*)".* type=(\w+) \}$', re.MULTILINE)
_KERNEL = re.compile(rb'^  (\w+)=\{ name=("[^"]*"|\S+) (.*)\}$', re.MULTILINE)
_OPERANDS = re.compile(rb"\b(?:input|input_args)=\{([^}]*)\}")
_ORIGIN = re.compile(rb'\blayers="([^"]*)"')
_PRODUCTS = frozenset({"fully_connected", "corrltn"})  # the second is a convolution
_FUSED_ATTENTION = "mha"  # in the names _gemm_mha_v2 and fmha_v2_flash_attention
_TYPES = {"float": "float32", "half": "float16", "bf16": "bfloat16", "fp8_e4m3": "float8_e4m3fn"}


class KernelKind(StrEnum):
    """What a kernel computes."""

    PRODUCT = "product"  # a matrix product or a convolution
    ATTENTION = "attention"  # attention as a whole
    OTHER = "other"


@dataclass(frozen=True)
class Kernel:
    """A kernel of an engine.

    `dtypes`: NumPy's names for the types of its inputs; of a product, those of its two operands. `origin`: the ONNX
    nodes that it computes a part of, as `Layer.origin` names them, one after another.
    """

    name: str
    kind: KernelKind
    dtypes: tuple[str, ...]
    origin: str


@dataclass(frozen=True)
class Program:
    """A program of a plan: its settings as they are written, and its kernels in the order in which they run."""

    settings: dict[str, str]
    kernels: tuple[Kernel, ...]


def plan_programs(plan: Any) -> list[Program]:
    """The programs that a plan (a buffer) describes; none if it has no such text."""
    return [_program(*each.groups()) for each in _PROGRAM.finditer(plan)]


def kind_of(name: str, is_product: bool) -> KernelKind:
    """The kind of a kernel by its name, or its tactic's."""
    if is_product:
        return KernelKind.PRODUCT
    return KernelKind.ATTENTION if _FUSED_ATTENTION in name.lower() else KernelKind.OTHER


def _program(header: bytes, descriptors: bytes, main: bytes) -> Program:
    settings = {name.decode(): value.decode(errors="replace") for name, value in _SETTING.findall(header)}
    dtypes = {name: _TYPES.get(kind.decode(), kind.decode()) for name, kind in _TENSOR.findall(descriptors)}
    kernels = []
    for operator, quoted, text in _KERNEL.findall(main):
        name, is_product = quoted.decode(errors="replace").strip('"'), operator.decode() in _PRODUCTS
        operands, origin = _OPERANDS.search(text), _ORIGIN.search(text)
        names = re.findall(rb'"([^"]*)"', operands[1]) if operands else []
        taken = names[:2] if is_product else names  # after its operands, a product has the factors alpha and beta
        kernels.append(
            Kernel(
                name,
                kind_of(name, is_product),
                tuple(dtypes.get(each, "unknown") for each in taken),
                origin[1].decode(errors="replace") if origin else "",
            )
        )
    return Program(settings, tuple(kernels))
