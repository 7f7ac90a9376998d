"""Frozen masks are the model's own decisions; slots are ordered by activity."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dydit.diffusion.process import Process
from dydit.diffusion.samplers import SamplerConfig
from dydit.models.config import Routers
from dydit.models.synthetic import recorded_pass, synthetic_model
from dydit.planning.masks import activity_order, by_slot, freeze_masks


@pytest.mark.parametrize("routers", [Routers.FIRST_ON, Routers.ALL_ROUTED])
def test_frozen_masks_are_what_a_forward_pass_decides(small_config, routers):
    config = small_config.model_copy(update={"routers": routers})
    model = synthetic_model(config, seed=2)
    timesteps = SamplerConfig(steps=20).times(Process())
    masks = freeze_masks(model, timesteps)
    assert masks.shape == (20, 24) and masks.dtype == bool
    assert 0.2 < masks.mean() < 0.95 and (masks != masks[0]).any()
    for t, mask in zip(timesteps.tolist(), masks, strict=True):
        x = torch.randn(4, 4, 8, 8)
        _, recording = recorded_pass(model, x, torch.full((4,), t), torch.tensor([0, 3, 7, 7]))
        decisions = recording.decisions()
        for row in range(4):  # labels, and both halves of guidance, share them
            np.testing.assert_array_equal(mask, decisions.units[row].numpy() > 0)
    if routers is Routers.FIRST_ON:
        assert masks[:, [part.start for part in config.units.parts]].all()


def test_static_model_is_all_on(small_config):
    masks = freeze_masks(synthetic_model(small_config.without_routers()), np.arange(5))
    assert masks.shape == (5, 24) and masks.all()


def test_no_timestep_no_mask(small_config):
    assert freeze_masks(synthetic_model(small_config), np.arange(0)).shape == (0, 24)


COUNTS = st.lists(st.lists(st.integers(1, 6), min_size=2, max_size=2), min_size=1, max_size=3)
"""Units of the groups of each block."""


@settings(max_examples=25, deadline=None)
@given(COUNTS, st.integers(0, 2**32 - 1))
def test_slots_are_a_permutation_by_activity(make_axis, counts, seed):
    axis, rng = make_axis(counts), np.random.default_rng(seed)
    masks = rng.random((6, axis.size)) < rng.random(axis.size)
    order = activity_order(masks, axis)
    slots = by_slot(masks, axis, order)
    assert slots.flags.c_contiguous and slots.dtype == bool
    for part, units in axis.zip(order):
        assert sorted(units) == list(range(part.group.count))
        steps = slots[:, part.units].sum(0)
        assert (np.diff(steps) <= 0).all()
        for slot, unit in enumerate(units):
            np.testing.assert_array_equal(slots[:, part.start + slot], masks[:, part.start + unit])
        # Ties keep the checkpoint's order.
        assert (np.diff(units)[np.diff(steps) == 0] > 0).all()


@settings(max_examples=25, deadline=None)
@given(COUNTS, st.integers(0, 2**32 - 1))
def test_nested_masks_become_prefixes(make_axis, counts, seed):
    axis, rng = make_axis(counts), np.random.default_rng(seed)
    widths = [rng.integers(0, part.group.count + 1, (7, 1)) for part in axis.parts]
    ranks = [rng.permutation(part.group.count) for part in axis.parts]
    nested = np.concatenate([rank < width for rank, width in zip(ranks, widths, strict=True)], axis=1)
    slots = by_slot(nested, axis, activity_order(nested, axis))
    for part, width in zip(axis.parts, widths, strict=True):
        assert (slots[:, part.units] == (np.arange(part.group.count) < width)).all()
