"""Exponents of smoothed channels: as digits and as powers of two, and which model they are of."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dydit.errors import CalibrationError, ConfigError
from dydit.models.config import parse_config
from dydit.quantization.smoothing import MOST, Smoothing, as_digits, input_channels


@given(st.lists(st.integers(0, MOST), min_size=1, max_size=40))
def test_digits_come_back_as_powers_of_two(exponents):
    digits = as_digits(np.array(exponents))
    assert len(digits) == len(exponents)
    found = Smoothing(blocks=({}, {"fc1": digits}))
    assert found.exponents(1, "fc1").tolist() == exponents
    divisor = found.divisor(1, "fc1")
    assert divisor.dtype == np.float32 and divisor.tolist() == [2**each for each in exponents]
    assert found.divisor(0, "fc1") is None and found.exponents(1, "qkv") is None and found.layers == 1


@pytest.mark.parametrize("digits", ["", "b", "-1", "0 1", "A", "01\n"])
def test_what_is_no_exponent(digits):
    with pytest.raises(ConfigError, match="must match the pattern"):
        parse_config(Smoothing, {"blocks": [{"proj": digits}]})


def test_which_model(small_config):
    blocks = [{"qkv": "01" * 32, "fc2": "a" * 256}] * 3
    Smoothing(blocks=tuple(blocks)).require_fits(small_config)
    assert (input_channels(small_config, "proj"), input_channels(small_config, "fc2")) == (64, 256)
    with pytest.raises(CalibrationError, match=r"is for 2 blocks, but the model has 3; calibrate this checkpoint"):
        Smoothing(blocks=tuple(blocks[:2])).require_fits(small_config)
    blocks[1] = {"fc2": "0" * 64}
    with pytest.raises(CalibrationError, match=r"of block 1, fc2, is for 64 channels, but the model has 256"):
        Smoothing(blocks=tuple(blocks)).require_fits(small_config)
    blocks[1] = {"fc3": "0" * 256}
    with pytest.raises(CalibrationError, match=r"names the layer 'fc3', which the model's blocks do not have"):
        Smoothing(blocks=tuple(blocks)).require_fits(small_config)
