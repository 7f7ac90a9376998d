"""The text of plans, in its form; and what TensorRT for RTX writes into real ones (test_rtx.py)."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from dydit.engines.kernels import Kernel, KernelKind, plan_programs

TEXT = b"""header {
  version = 5
  region = { name=devmem size=8192 alignment=128 constant=true }
  tf32=0
  stream_capturable=1
  accelerators={sm89 sm120 }
}
descriptors {
  tensor={ alignment=128 dims={ "n.1" 64 } mem_prop=0 name="x.1" offset=0 region="" strides={ 64 1 } type=float }
  tensor={ alignment=128 dims={ 64 144 } name="blocks.0.qkv.weight[0:3]_constantInt8" region=c type=int8 }

  sub_tensor={ base="x.1" dims={ "n.1" 64 } name="q^deref" offset=0 strides={ 64 1 } type=int8 }
  tensor={ alignment=4 dims={ 1 } name="alpha" region=c type=float }
  tensor={ alignment=4 dims={ 1 } name="attended.1" region=c type=half }
}
main {
 label bb1:
  shape_call={ name="s_0" stream=0  layers="" subg_id=0 }
  function={ name=__myl_MulCast fqn=__myl_MulCast_0x1 args={ "x.1" } input_args={ "x.1" } output_args={ "q^deref" } \
kernel_kind=1 layers="[ONNX Layer: node_Mul_1]" swap_ab=false }
  fully_connected={ name="node_MatMul_10" output={"y.1" } input={"q^deref" "blocks.0.qkv.weight[0:3]_constantInt8" \
"alpha" "beta" } stream=0 runtime_tactic=true layers="[ONNX Layer: node_MatMul_10]\x1f[ONNX Layer: node_Dequant_7]" }
  function={ name=_gemm_mha_v2 fqn=_gemm_mha_v2_0x2 args={ "attended.1" } input_args={ "attended.1" } output_args={ \
} layers="[ONNX Layer: node_Attention_11 | node_attention_4 (attention)]" swap_ab=false }
  corrltn={ name="node_Conv_12" output={"z" } input={"x.1" "lost" "c" } layers="[ONNX Layer: node_Conv_12]" }
}
shape_main {
"""
KERNELS = (
    Kernel("s_0", KernelKind.OTHER, (), ""),
    Kernel("__myl_MulCast", KernelKind.OTHER, ("float32",), "[ONNX Layer: node_Mul_1]"),
    Kernel(
        "node_MatMul_10",
        KernelKind.PRODUCT,
        ("int8", "int8"),
        "[ONNX Layer: node_MatMul_10]\x1f[ONNX Layer: node_Dequant_7]",
    ),
    Kernel(
        "_gemm_mha_v2",
        KernelKind.ATTENTION,
        ("float16",),
        "[ONNX Layer: node_Attention_11 | node_attention_4 (attention)]",
    ),
    Kernel("node_Conv_12", KernelKind.PRODUCT, ("float32", "unknown"), "[ONNX Layer: node_Conv_12]"),
)


@settings(max_examples=20)
@given(st.lists(st.binary(max_size=200), min_size=1, max_size=4))
def test_programs_are_found_between_whatever_else_a_plan_holds(between: list[bytes]) -> None:
    programs = plan_programs(bytearray(TEXT.join(between)))
    assert [each.kernels for each in programs] == [KERNELS] * (len(between) - 1)
    for each in programs:
        assert {"tf32": "0", "stream_capturable": "1", "accelerators": "sm89 sm120"}.items() <= each.settings.items()


@settings(max_examples=20)
@given(st.integers(0, len(TEXT) - len(b"shape_main {\n") - 1))
def test_text_that_is_cut_off_says_nothing(end: int) -> None:
    assert plan_programs(TEXT[:end]) == []
