"""`weights.bin`: aligned, complete, and a subnetwork's slice is a window on it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dydit.bundle.stored_weights import Precision
from dydit.errors import CheckpointError
from dydit.export.weights import ALIGNMENT, write_weights
from dydit.graph.sources import runs
from dydit.models.dit.config import DiTConfig

MODEL = DiTConfig(hidden_size=64, depth=2, num_heads=4, patch_size=2, input_size=8)
SLOTS = st.sets(st.integers(0, 20)).map(sorted)


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (21, 3, 5), "b": (1,), "c": (2000,), "d": (4, 6), "e": (0, 7)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_tensors_lie_aligned_one_after_another(tmp_path):
    path = tmp_path / "weights.bin"
    entries = write_weights(path, tensors().items(), MODEL)
    assert list(entries) == ["a", "b", "c", "d", "e"]
    end = 0
    for name, tensor in tensors().items():
        entry = entries[name]
        assert entry.offset % ALIGNMENT == 0 and end <= entry.offset < end + ALIGNMENT
        assert entry.shape == tuple(tensor.shape) and entry.dtype == "float32"
        assert entry.nbytes == tensor.numel() * 4
        end = entry.offset + entry.nbytes
        read = np.fromfile(path, np.float32, tensor.numel(), offset=entry.offset).reshape(entry.shape)
        np.testing.assert_array_equal(read, tensor.numpy())
    assert path.stat().st_size == end


def test_dtypes_are_widened_and_layout_is_made_contiguous(tmp_path):
    values = torch.arange(12.0).view(3, 4)
    given = {"half": values.half().T, "double": values.double(), "grad": values.clone().requires_grad_()}
    entries = write_weights(tmp_path / "w", given.items(), MODEL)
    for name, expected in (("half", values.T), ("double", values), ("grad", values)):
        read = np.fromfile(tmp_path / "w", np.float32, 12, offset=entries[name].offset).reshape(entries[name].shape)
        np.testing.assert_array_equal(read, expected.numpy())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(tmp_path, value):
    with pytest.raises(
        CheckpointError, match="a value of weight bad is NaN or infinite; this checkpoint cannot be exported"
    ):
        write_weights(tmp_path / "w", [("bad", torch.tensor([0.0, value]))], MODEL)


@pytest.mark.parametrize(
    ("precision", "value"), [(Precision.FP16, 7e4), (Precision.FP32, 1e300), (Precision.BF16, 1e300)]
)
def test_values_that_the_precision_cannot_hold_are_refused(tmp_path, precision, value):
    with pytest.raises(CheckpointError, match=f"a value of weight blocks.0.fc1.weight is too large for {precision}"):
        weight = torch.tensor([value], dtype=torch.float64)
        write_weights(tmp_path / "w", [("blocks.0.fc1.weight", weight)], MODEL, precision)


@pytest.mark.parametrize(("precision", "dtype"), [(Precision.FP16, torch.float16), (Precision.BF16, torch.bfloat16)])
def test_products_follow_the_precision_and_all_else_stays_fp32(tmp_path, precision, dtype):
    names = ["qkv.weight", "qkv.bias", "proj.bias", "fc1.weight", "fc2.weight", "router.0.weight", "router.2.bias"]
    values = torch.randn(5, 3)
    given = {**{f"blocks.1.{name}": values for name in names}, "adaln.weight": values, "embed.weight": values}
    entries = write_weights(tmp_path / "w", given.items(), MODEL, precision)
    for name, entry in entries.items():
        narrow = not name.startswith(("embed", "blocks.1.router"))
        assert entry.dtype == (precision.dtype if narrow else "float32")
        assert entry.nbytes == 15 * (2 if narrow else 4)
        raw = np.fromfile(tmp_path / "w", np.uint8, entry.nbytes, offset=entry.offset)
        assert torch.equal(torch.tensor(raw), values.to(dtype if narrow else torch.float32).flatten().view(torch.uint8))


@settings(max_examples=25, deadline=None)
@given(SLOTS)
def test_runs_partition_the_slots(slots):
    found = list(runs(slots))
    assert [slot for first, count in found for slot in range(first, first + count)] == slots
    # As few as there can be: between two runs, at least one slot is missing.
    assert all(a + n < b for (a, n), (b, _) in itertools.pairwise(found))


def test_a_prefix_is_one_run():
    assert list(runs([])) == []
    assert list(runs([0, 1, 2])) == [(0, 3)]
    assert list(runs([0, 2, 3, 7])) == [(0, 1), (2, 2), (7, 1)]
