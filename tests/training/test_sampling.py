from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from dydit.diffusion.coefficients import apply_step, step_coefficients
from dydit.diffusion.noise import image_noise
from dydit.diffusion.schedule import Sampler, Schedule
from dydit.errors import ConfigError
from dydit.models.config import ModelConfig
from dydit.models.dit import DiT
from dydit.training.sampling import sample_torch

pytestmark = pytest.mark.numerics

Randomised = Callable[..., DiT]
STEPS = 6


@pytest.mark.parametrize("sampler", list(Sampler))
@pytest.mark.parametrize("learn_sigma", [True, False])
def test_sampling_is_the_formula_step_by_step(
    sampler: Sampler, learn_sigma: bool, dynamic_config: ModelConfig, randomised: Randomised
) -> None:
    model = randomised(dynamic_config.model_copy(update={"learn_sigma": learn_sigma}))
    schedule = Schedule.respaced(STEPS)
    x = image_noise(5, range(2), 0, (1, 16, 16))
    labels = torch.tensor([3, 7])
    for step, c in enumerate(step_coefficients(schedule, sampler, learn_sigma)):
        t = torch.full((2,), int(schedule.timesteps[::-1][step]))
        with torch.no_grad():
            output = model(torch.from_numpy(x), t, labels).numpy()
        v = output[:, 1:] if learn_sigma else 0.0
        x = apply_step(c, x, output[:, :1], v, image_noise(5, range(2), step + 1, (1, 16, 16))).astype(np.float32)
    got = sample_torch(model, [3, 7], steps=STEPS, sampler=sampler, seed=5).images
    assert got.dtype == np.float32 and got.std() > 0.1
    np.testing.assert_allclose(got, x, rtol=1e-4, atol=1e-4)


def test_images_do_not_depend_on_the_batch(dynamic_config: ModelConfig, randomised: Randomised) -> None:
    model, labels = randomised(dynamic_config), [1, 2, 3, 4, 5]
    whole = sample_torch(model, labels, steps=STEPS, record=True)
    parts = sample_torch(model, labels, steps=STEPS, batch=2, record=True)
    np.testing.assert_allclose(parts.images, whole.images, atol=1e-4)
    assert whole.tokens is not None and parts.tokens is not None
    assert parts.tokens.shape == whole.tokens.shape == (STEPS, 2, 5, 16)
    assert (parts.tokens == whole.tokens).mean() > 0.99


def test_guidance_of_one_changes_nothing_and_more_does(dynamic_config: ModelConfig, randomised: Randomised) -> None:
    model = randomised(dynamic_config)
    plain = sample_torch(model, [1, 2], steps=STEPS).images
    nearly = sample_torch(model, [1, 2], steps=STEPS, cfg_scale=1 + 1e-6).images
    strong = sample_torch(model, [1, 2], steps=STEPS, cfg_scale=4.0).images
    np.testing.assert_allclose(nearly, plain, atol=1e-3)
    assert np.abs(strong - plain).max() > 0.05


def test_guidance_leaves_the_channels_after_the_third(dynamic_config: ModelConfig, randomised: Randomised) -> None:
    """The fourth channel's epsilon stays the conditional one; one step from the same noise shows it."""
    model = randomised(dynamic_config.model_copy(update={"in_channels": 4}))
    plain, guided = (sample_torch(model, [1], steps=1, cfg_scale=scale).images for scale in (1.0, 4.0))
    np.testing.assert_allclose(guided[:, 3], plain[:, 3], rtol=1e-5, atol=1e-5)
    assert (np.abs(guided[:, :3] - plain[:, :3]).max((0, 2, 3)) > 1e-3).all()


def test_masks_are_those_of_the_routers(dynamic_config: ModelConfig, randomised: Randomised) -> None:
    model = randomised(dynamic_config)
    sample = sample_torch(model, [1, 2, 3], steps=STEPS, record=True, cfg_scale=2.0)
    assert sample.heads is not None and sample.groups is not None and sample.tokens is not None
    t = torch.from_numpy(Schedule.respaced(STEPS).timesteps[::-1].copy())
    with torch.no_grad():
        logits = torch.stack([block.attn_rate(model.t_embedder(t)) for block in model.blocks], 1)
    assert (sample.heads == (logits > 0).numpy()).all()
    for part in (sample.heads[..., 1:], sample.groups[..., 1:], sample.tokens):
        assert 0.1 < part.mean() < 0.9
    assert sample.tokens.shape == (STEPS, 2, 3, 16)  # the conditional half


def test_progress_counts_model_evaluations(static_config: ModelConfig, randomised: Randomised) -> None:
    told: list[tuple[int, int]] = []
    sample_torch(randomised(static_config), [1, 2, 3], steps=4, batch=2, progress=lambda *seen: told.append(seen))
    assert told == [(i, 8) for i in range(1, 9)]


@pytest.mark.parametrize("labels", [[], [11], [-1], [[1]]])
def test_labels_that_are_no_classes_are_refused(
    labels: list[int], static_config: ModelConfig, randomised: Randomised
) -> None:
    with pytest.raises(ConfigError, match=r"classes in 0\.\.10"):
        sample_torch(randomised(static_config), labels, steps=2)
