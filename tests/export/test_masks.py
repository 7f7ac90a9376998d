"""Frozen masks are the model's own decisions; slots are ordered by activity."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dydit.diffusion.schedule import Schedule
from dydit.export.masks import activity_order, by_slot, freeze_masks
from dydit.models.config import Routers
from dydit.models.synthetic import recorded_pass, synthetic_model


@pytest.mark.parametrize("routers", [Routers.FIRST_ON, Routers.ALL_ROUTED])
def test_frozen_masks_are_what_a_forward_pass_decides(small_config, routers):
    config = small_config.model_copy(update={"routers": routers})
    model = synthetic_model(config, seed=2)
    timesteps = Schedule.respaced(20).timesteps[::-1]
    masks = freeze_masks(model, timesteps)
    assert masks.shape == (20, 3, 2, 4) and masks.dtype == bool
    assert 0.2 < masks.mean() < 0.95 and (masks != masks[0]).any()
    for t, mask in zip(timesteps.tolist(), masks, strict=True):
        x = torch.randn(4, 4, 8, 8)
        _, recording = recorded_pass(model, x, torch.full((4,), t), torch.tensor([0, 3, 7, 7]))
        decisions = recording.decisions()
        for row in range(4):  # labels, and both halves of guidance, share them
            np.testing.assert_array_equal(mask[:, 0], decisions.heads[:, row].numpy() > 0)
            np.testing.assert_array_equal(mask[:, 1], decisions.groups[:, row].numpy() > 0)
    if routers is Routers.FIRST_ON:
        assert masks[..., 0].all()


def test_static_model_is_all_on(small_config):
    masks = freeze_masks(synthetic_model(small_config.without_routers()), np.arange(5))
    assert masks.shape == (5, 3, 2, 4) and masks.all()


def test_no_timestep_no_mask(small_config):
    assert freeze_masks(synthetic_model(small_config), np.arange(0)).shape == (0, 3, 2, 4)


def random_masks(seed: int, steps: int = 6, units: int = 5) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.random((steps, 3, 2, units)) < rng.random((3, 2, units))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_slots_are_a_permutation_by_activity(seed):
    masks = random_masks(seed)
    order = activity_order(masks)
    assert (np.sort(order, -1) == np.arange(5)).all()
    slots = by_slot(masks, order)
    counts = slots.sum(0)
    assert (np.diff(counts, axis=-1) <= 0).all()
    for block in range(3):
        for part in range(2):
            for slot in range(5):
                np.testing.assert_array_equal(
                    slots[:, block, part, slot], masks[:, block, part, order[block, part, slot]]
                )
    # Ties keep the checkpoint's order.
    same = np.diff(counts, axis=-1) == 0
    assert (np.diff(order, axis=-1)[same] > 0).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_nested_masks_become_prefixes(seed):
    rng = np.random.default_rng(seed)
    widths = rng.integers(0, 6, (7, 3, 2))
    rank = rng.permuted(np.broadcast_to(np.arange(5), (3, 2, 5)), axis=-1)
    nested = rank < widths[..., None]
    slots = by_slot(nested, activity_order(nested))
    assert (slots == (np.arange(5) < widths[..., None])).all()
