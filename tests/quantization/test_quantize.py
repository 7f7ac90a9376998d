"""Weights in 8 bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from dydit.bundle.stored_weights import Precision, stored_type
from dydit.models.dit.config import preset
from dydit.quantization.quantize import quantize, scale_name

VALUES = st.floats(-1e4, 1e4, width=32)
WEIGHTS = array_shapes(min_dims=3, max_dims=3, max_side=5).flatmap(
    lambda shape: arrays(np.float32, shape, elements=VALUES)
)


@given(WEIGHTS, st.booleans())
def test_no_weight_is_off_by_more_than_half_a_scale(values, out_major):
    weight = torch.from_numpy(values)
    stored, scale = quantize(weight, out_major)
    assert stored.dtype == torch.int8 and stored.shape == weight.shape and scale.dtype == torch.float32
    assert scale.shape == (weight.shape[:2] if out_major else weight.shape[2:])
    spread = (scale[..., None] if out_major else scale).double()
    assert ((stored.double() * spread - weight.double()).abs() <= 0.5001 * spread).all()
    assert stored.abs().max() <= 127


@given(WEIGHTS)
def test_a_channel_uses_all_of_its_range(values):
    stored, _ = quantize(torch.from_numpy(values), out_major=True)
    largest = stored.abs().amax(2)
    zero = torch.from_numpy(np.abs(values).max(2) < 1e-30)
    assert ((largest == 127) | zero).all()


def test_a_channel_of_zeros_is_exact():
    stored, scale = quantize(torch.zeros(2, 3, 4), out_major=False)
    assert not stored.any() and scale.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("blocks.0.qkv.weight", True),
        ("blocks.11.fc2.weight", True),
        ("blocks.12.fc2.weight", False),
        ("blocks.0.proj.weight", True),
        ("blocks.0.fc1.weight", True),
        ("blocks.0.qkv.bias", False),
        ("blocks.0.router.0.weight", False),
        ("adaln.weight", False),
        ("pos_embed", False),
        ("final.weight", False),
    ],
)
def test_which_tensors(name, expected):
    model = preset("S/2")
    assert (name in model.units.weights) == expected
    for precision in Precision:
        in_8_bits = stored_type(model, name, precision) in ("int8", "float8_e4m3fn")
        assert in_8_bits == (expected and precision.in_8_bits)


def test_which_side_units_share_out():
    layers = {layer.name: layer.out_major for layer in preset("S/2").units.layers}
    assert layers == {"qkv": True, "proj": False, "fc1": True, "fc2": False}


def test_name_of_scales():
    assert scale_name("blocks.0.qkv.weight") == "blocks.0.qkv.scale"
