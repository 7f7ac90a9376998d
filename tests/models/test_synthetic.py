"""Synthetic models stand in for trained ones: gates differ, masks drift, and the FLOPs ratio is near what was asked."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dydit.errors import ConfigError
from dydit.models.config import Routers
from dydit.models.dit.config import DiTConfig
from dydit.models.macs import flops_ratio
from dydit.models.synthetic import recorded_pass, synthetic_model
from dydit.planning.masks import freeze_masks

CONFIG = DiTConfig(hidden_size=128, depth=4, num_heads=8, patch_size=2, input_size=16)
TIMESTEPS = np.arange(0, 1000, 50)


def measured_ratio(model) -> float:
    config, generator = model.config, torch.Generator().manual_seed(77)
    ratios = []
    for t in TIMESTEPS:
        x = torch.randn(2, config.in_channels, config.input_size, config.input_size, generator=generator)
        _, recording = recorded_pass(model, x, torch.full((2,), int(t)), torch.tensor([1, config.null_class]))
        kept = recording.decisions()
        counts = config.units.counts(kept.units.numpy() > 0)
        ratios.append(flops_ratio(config, counts, kept.tokens.mean(-1).T.numpy()).mean())
    return float(np.mean(ratios))


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("routers", [Routers.FIRST_ON, Routers.ALL_ROUTED])
def test_flops_ratio_is_near_what_was_asked(ratio, routers):
    model = synthetic_model(CONFIG.model_copy(update={"routers": routers}), seed=1, flops_ratio=ratio)
    assert measured_ratio(model) == pytest.approx(ratio, abs=0.03)


def test_ratio_one_opens_everything():
    assert measured_ratio(synthetic_model(CONFIG, flops_ratio=1.0)) > 0.95
    masks = freeze_masks(synthetic_model(CONFIG, flops_ratio=1.0), TIMESTEPS)
    assert masks.mean() > 0.98


def test_gates_differ_over_timesteps_tokens_and_blocks():
    model = synthetic_model(CONFIG)
    masks = freeze_masks(model, TIMESTEPS)
    assert 0.3 < masks.mean() < 0.95
    toggles = (masks[1:] != masks[:-1]).any(axis=1)
    assert toggles.mean() > 0.3, "masks drift with the timestep"
    assert (np.diff(masks[..., 1:].sum(0).astype(int), axis=-1) > 0).any(), "the busiest units do not simply come first"
    share = masks.mean(axis=0)
    assert (share == 1).any() and ((share > 0) & (share < 1)).any(), "some units always on, others now and then"
    _, recording = recorded_pass(model, torch.randn(2, 4, 16, 16), torch.tensor([10, 900]), torch.tensor([0, 5]))
    tokens = recording.decisions().tokens
    assert ((tokens.mean(-1) > 0) & (tokens.mean(-1) < 1)).float().mean() > 0.5
    assert not torch.equal(tokens[0, 0], tokens[1, 0]) and not torch.equal(tokens[0, 0], tokens[0, 1])


def test_output_depends_on_everything():
    model = synthetic_model(CONFIG)
    x, t, y = torch.randn(1, 4, 16, 16), torch.tensor([500]), torch.tensor([3])
    base = model(x, t, y)
    assert torch.isfinite(base).all() and 0.05 < base.std() < 20
    for other in (model(x + 0.1, t, y), model(x, t + 300, y), model(x, t, y + 1)):
        assert (other - base).norm() / base.norm() > 1e-3


def test_same_seed_same_weights():
    models = [synthetic_model(CONFIG, seed).state_dict() for seed in (5, 5, 6)]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert not torch.equal(models[0]["blocks.0.attn.qkv.weight"], models[2]["blocks.0.attn.qkv.weight"])


def test_static_model():
    model = synthetic_model(CONFIG.without_routers())
    assert model(torch.randn(1, 4, 16, 16), torch.tensor([0]), torch.tensor([0])).std() > 0.05


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_one_head():
    model = synthetic_model(DiTConfig(hidden_size=16, depth=1, num_heads=1, patch_size=2, input_size=4))
    assert freeze_masks(model, TIMESTEPS).all()


@pytest.mark.parametrize("ratio", [0, -0.1, 1.01, float("nan")])
def test_ratios_out_of_range_are_refused(ratio):
    with pytest.raises(ConfigError, match="FLOPs ratio"):
        synthetic_model(CONFIG, flops_ratio=ratio)
