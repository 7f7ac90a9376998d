"""Multiply-adds against the paper's literals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dydit.models.dit.config import DiTConfig, preset
from dydit.models.macs import flops_ratio, static_macs, unit_costs
from dydit.models.transformer.units import attention_macs, mlp_macs

SMALL = DiTConfig(hidden_size=64, depth=3, num_heads=4, patch_size=2, input_size=8)


@pytest.mark.parametrize(
    ("name", "size", "attention", "mlp"),
    [
        ("S/2", 32, 201_326_592, 301_989_888),
        ("B/2", 32, 704_643_072, 1_207_959_552),
        ("XL/2", 32, 1_509_949_440, 2_717_908_992),
        ("XL/2", 64, 7_851_737_088, 10_871_635_968),
    ],
)
def test_blocks_cost_what_the_paper_counts(name, size, attention, mlp):
    config = preset(name, size)
    assert (attention_macs(config), mlp_macs(config)) == (attention, mlp)


@pytest.mark.parametrize(("name", "giga"), [("S/2", 6.07), ("B/2", 23.02), ("XL/2", 118.69)])
def test_models_cost_what_the_paper_counts(name, giga):
    assert round(preset(name).macs / 1e9, 2) == giga


def test_the_products_counted_are_those_of_the_model():
    """Count the multiply-adds of the matrix products from their shapes."""
    n, d, hd, h = SMALL.tokens, SMALL.hidden_size, SMALL.head_dim, SMALL.num_heads
    assert attention_macs(SMALL) == n * d * 3 * d + h * (n * hd * n + n * n * hd) + n * d * d
    assert mlp_macs(SMALL) == n * d * 4 * d + n * 4 * d * d


def by_part(heads, groups):
    """Units of each part, [..., P], from heads and groups by block, [..., L] each."""
    stack = torch.stack if isinstance(heads, torch.Tensor) else np.stack
    return stack([heads, groups], -1).reshape(*heads.shape[:-1], -1)


def test_ratio_of_a_known_step():
    heads, groups, tokens = np.array([4, 2, 1]), np.array([1, 4, 2]), np.array([1.0, 0.5, 0.25])
    a, m = attention_macs(SMALL), mlp_macs(SMALL)
    expected = (a * 7 / 4 + m * (1 / 4 + 4 / 4 * 0.5 + 2 / 4 * 0.25)) / (3 * (a + m))
    assert flops_ratio(SMALL, by_part(heads, groups), tokens) == pytest.approx(expected, rel=1e-14)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_ratio_is_the_same_in_numpy_and_torch(seed):
    rng = np.random.default_rng(seed)
    counts, tokens = rng.integers(0, 5, (5, 6)), rng.uniform(size=(5, 3))
    ratio = flops_ratio(SMALL, counts, tokens)
    assert ratio.shape == (5,) and ((ratio >= 0) & (ratio <= 1)).all()
    torch_ratio = flops_ratio(SMALL, torch.tensor(counts), torch.tensor(tokens))
    np.testing.assert_allclose(torch_ratio.numpy(), ratio, rtol=1e-12)


def test_ratio_ends():
    full, none = np.full(3, 4), np.zeros(3)
    assert flops_ratio(SMALL, by_part(full, full), np.ones(3)) == pytest.approx(1)
    assert flops_ratio(SMALL, by_part(none, full), none) == 0


def test_ratio_has_gradients():
    heads, groups, tokens = (torch.full((2, 3), value, requires_grad=True) for value in (2.0, 3.0, 0.5))
    flops_ratio(SMALL, by_part(heads, groups), tokens).sum().backward()
    a, m = attention_macs(SMALL), mlp_macs(SMALL)
    for tensor, slope in ((heads, a / 4), (groups, m / 4 * 0.5), (tokens, 3 * m / 4)):
        assert torch.allclose(tensor.grad, torch.full((2, 3), slope / (3 * (a + m))))


def test_unit_costs_add_up():
    costs = unit_costs(SMALL)
    assert costs.shape == (24,) and costs.dtype == np.float64
    heads, groups = costs.reshape(3, 2, 4).swapaxes(0, 1)
    assert heads.sum() == 3 * attention_macs(SMALL) and groups.sum() == 3 * mlp_macs(SMALL)
    assert costs.sum() == static_macs(SMALL)
    tokens = np.array([1.0, 0.5, 0.0])
    masks = np.random.default_rng(0).integers(0, 2, 24)
    ratio = flops_ratio(SMALL, masks.reshape(6, 4).sum(1), tokens)
    assert (unit_costs(SMALL, tokens) * masks).sum() / static_macs(SMALL) == pytest.approx(ratio)
