"""The transposes around attention: those that a target needs, and none where it takes what products give."""

from __future__ import annotations

import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F

from dydit.bundle.stored_weights import Precision
from dydit.models.architecture import UnitLayer
from dydit.models.dit.config import DiTConfig
from dydit.models.dit.layout import stored_tensors
from dydit.models.dit.model import DiT
from dydit.models.dit.sliced import SlicedDiT
from dydit.models.pixart.config import PixArtConfig
from dydit.models.pixart.graph import cross_function
from dydit.models.sliced import SlicedBlock, plain_linear
from dydit.models.transformer.blocks import attention_function
from dydit.models.transformer.norms import Modulated

DIT = DiTConfig(hidden_size=64, depth=1, num_heads=4, patch_size=2, input_size=8, num_classes=7)
PIXART = PixArtConfig(
    hidden_size=64, depth=1, num_heads=4, input_size=8, caption_channels=24, text_tokens=6, interpolation_scale=1
)


def transposes(function: ir.Function) -> int:
    """The number of transposes of activations. Those of weights are computed when a graph is compiled."""
    inputs = [node.inputs[0] for node in function if node.op_type == "Transpose"]
    makers = [value.producer() for value in inputs if value is not None]
    return sum(maker is not None and maker.op_type != "DequantizeLinear" for maker in makers)


@pytest.mark.parametrize("precision", Precision)
@pytest.mark.parametrize("heads", [3, None])
def test_attention_has_no_more_transposes_than_its_targets_need(precision: Precision, heads: int | None) -> None:
    """Of queries, keys and values together, and of the result; in fp32 also of the keys for their product.

    The operator of int8 takes the layout of products.
    """
    if heads is None and precision.in_8_bits:
        return  # no graph of dynamic width has 8 bits
    needed = {Precision.FP32: 3, Precision.INT8: 0}.get(precision, 2)
    assert transposes(attention_function(DIT, precision, Modulated(), heads, heads is not None)) == needed


@pytest.mark.parametrize("precision", Precision)
def test_so_has_attention_to_texts(precision: Precision) -> None:
    """Of queries, keys, values and the result; and of the keys for their product, where there are three operators."""
    apart = precision in (Precision.FP32, Precision.INT8)
    assert transposes(cross_function(PIXART, precision)) == 4 + apart


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(0, 1, 2, 3), (0, 1, 3)])
@pytest.mark.parametrize("gates", [None, torch.tensor([1.0, 1, 0, 1])])
def test_pytorch_gives_attention_views_of_the_product(
    heads: tuple[int, ...], dtype: torch.dtype, gates: torch.Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the next product takes the result, or what gates made of it, as a view."""
    attend, products = F.scaled_dot_product_attention, {}
    attended: list[torch.Tensor] = []

    def noted(*parts: torch.Tensor) -> torch.Tensor:
        attended[:] = [*parts, attend(*parts)]
        return attended[-1]

    def linear(block: SlicedBlock, layer: UnitLayer, x: torch.Tensor) -> torch.Tensor:
        products[layer.name] = x, plain_linear(block, layer, x)
        return products[layer.name][1]

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    weights = {name: value.to(dtype) for name, value in stored_tensors(DiT(DIT).state_dict(), DIT)}
    model = SlicedDiT(DIT, weights, ((heads, (0, 1, 2, 3)),), cfg_channels=4, linear=linear)
    with torch.inference_mode():
        model.attention(model.blocks[0], torch.randn(4, 16, 64, dtype=dtype), gates)
    *parts, result = attended
    memory = {each.untyped_storage().data_ptr() for each in (products["qkv"][1], *parts)}
    assert len(memory) == 1, "views of one tensor"
    assert all(each.shape == (4, len(heads), 16, 16) and each.stride(-1) == 1 for each in parts)
    taken = products["proj"][0]
    assert result.transpose(1, 2).is_contiguous(), "so that it is flattened without a copy"
    assert taken.is_contiguous() and (gates is not None or taken.data_ptr() == result.data_ptr())
