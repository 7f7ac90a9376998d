"""The description of inputs and outputs, and how feeds are held against it."""

from __future__ import annotations

import numpy as np
import pytest

from dydit.bundle.io_spec import (
    TensorSpec,
    check_feeds,
    conditioning_inputs,
    conditioning_outputs,
    subnet_inputs,
    subnet_outputs,
)
from dydit.errors import BackendError


def feeds_of(config, batch: int = 2, rows: int = 4, gated: bool = True) -> dict[str, np.ndarray]:
    symbols = {"batch": batch, "rows": rows}
    return {spec.name: np.zeros(spec.concrete(symbols), spec.dtype) for spec in subnet_inputs(config, gated)}


def test_shapes(small_config):
    inputs = {spec.name: spec for spec in subnet_inputs(small_config, gated=True)}
    assert inputs["x"].shape == inputs["history"].shape == inputs["noise"].shape == ("batch", 4, 8, 8)
    assert inputs["coefficients"].shape == (8,) and inputs["cfg_scale"].shape == ()
    assert inputs["condition"].shape == ("rows", 20, 64) and small_config.vectors == 20
    assert inputs["gates"].shape == (24,)
    assert [spec.name for spec in subnet_inputs(small_config, gated=False)] == list(inputs)[:-1]
    x_prev, history, overflow = subnet_outputs(small_config, capacity=True)
    assert (x_prev.name, x_prev.shape) == ("x_prev", ("batch", 4, 8, 8))
    assert (history.name, history.shape) == ("next_history", ("batch", 4, 8, 8))
    assert (overflow.name, overflow.dtype, overflow.shape) == ("token_overflow", "int64", (3,))
    assert subnet_outputs(small_config, capacity=False) == (x_prev, history)
    assert [spec.shape for spec in conditioning_inputs()] == [("steps",), ("labels",)]
    assert [spec.dtype for spec in conditioning_inputs()] == ["float32", "int64"]
    assert conditioning_outputs(small_config)[0].shape == ("steps", "labels", 20, 64)
    assert TensorSpec("a", "float32", ("batch", 3)).concrete({"batch": 7}) == (7, 3)


@pytest.mark.parametrize(("batch", "rows"), [(1, 1), (1, 2), (3, 6), (5, 5)])
def test_fitting_feeds_give_their_symbols(small_config, batch, rows):
    for gated in (True, False):
        symbols = check_feeds(subnet_inputs(small_config, gated), feeds_of(small_config, batch, rows, gated), "it")
        assert symbols == {"batch": batch, "rows": rows}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": None}, "it: input 'x' is missing; expected ['cfg_scale', 'coefficients', 'condition', 'gates', "),
        ({"y": np.zeros(1)}, "it: unknown input 'y'; expected ['cfg_scale', "),
        ({"x": np.zeros((2, 4, 8, 8))}, "it: input 'x' is float64, expected float32"),
        (
            {"x": np.zeros((2, 4, 8, 9), np.float32)},
            "it: input 'x' has shape (2, 4, 8, 9), expected ('batch', 4, 8, 8)",
        ),
        ({"x": np.zeros((2, 4, 8), np.float32)}, "it: input 'x' has shape (2, 4, 8), expected"),
        ({"x": np.zeros((2, 4, 8, 8, 1), np.float32)}, "it: input 'x' has shape (2, 4, 8, 8, 1), expected"),
        ({"noise": np.zeros((3, 4, 8, 8), np.float32)}, "it: input 'noise' has shape (3, 4, 8, 8), expected"),
        ({"history": np.zeros((1, 4, 8, 8), np.float32)}, "it: input 'history' has shape (1, 4, 8, 8), expected"),
        ({"history": None}, "it: input 'history' is missing; expected ['cfg_scale', "),
        ({"coefficients": np.zeros(5, np.float32)}, "it: input 'coefficients' has shape (5,), expected (8,)"),
        ({"cfg_scale": np.zeros(1, np.float32)}, "it: input 'cfg_scale' has shape (1,), expected ()"),
        ({"gates": np.zeros((6, 4), np.float32)}, "it: input 'gates' has shape (6, 4), expected (24,)"),
        ({"gates": np.zeros(23, np.float32)}, "it: input 'gates' has shape (23,), expected (24,)"),
        (
            {"condition": np.zeros((3, 20, 64), np.float32)},
            "it: condition has 3 rows for 2 images; expected one row for each image, or two",
        ),
    ],
)
def test_feeds_that_do_not_fit_are_named(small_config, change, message):
    feeds = {name: array for name, array in {**feeds_of(small_config), **change}.items() if array is not None}
    with pytest.raises(BackendError) as caught:
        check_feeds(subnet_inputs(small_config, gated=True), feeds, "it")
    assert message in str(caught.value)


def test_empty_batch_is_refused(small_config):
    with pytest.raises(BackendError, match="0 rows for 0 images"):
        check_feeds(subnet_inputs(small_config, True), feeds_of(small_config, 0, 0), "it")
