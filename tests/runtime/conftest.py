"""Bundles of a pixel model, and the reference that backends are held against: the masked PyTorch model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from dydit.bundle.bundle import Bundle
    from dydit.checkpoints.checkpoint import Checkpoint


@dataclass(frozen=True)
class Reference:
    """What the masked model says of one step: x_prev, next_history, and token decisions bool [L, rows, N]."""

    x_prev: np.ndarray
    next_history: np.ndarray
    tokens: np.ndarray


@pytest.fixture(scope="session")
def pixel_checkpoint(make_checkpoint, small_config) -> Checkpoint:
    """Three channels, so that samples are pictures."""
    return make_checkpoint(small_config.model_copy(update={"in_channels": 3}))


@pytest.fixture(scope="session")
def pixel_bundle(make_bundle, pixel_checkpoint) -> Bundle:
    """Four gated subnetworks for six steps."""
    bundle = make_bundle(pixel_checkpoint, steps=6, max_subnets=4, max_batch=8)
    assert any(subnet.gated for subnet in bundle.manifest.subnets)
    return bundle


@pytest.fixture(scope="session")
def reference() -> Callable[..., Reference]:
    """`reference(checkpoint, bundle, step, state, noise, labels, cfg_scale)`, computed by the dense masked model."""
    import torch

    from dydit.diffusion.sampler_step import sampler_step
    from dydit.models.routers import Masked, Recording, Static

    def compute(checkpoint, bundle, step, state, noise, labels, cfg_scale) -> Reference:
        x = state.x
        config, sampling = checkpoint.config, bundle.manifest.sampling
        model, guided = checkpoint.model(), cfg_scale not in (0, 1)
        null = np.full_like(labels, config.null_class)
        rows = np.concatenate([labels, null]) if guided else null if cfg_scale == 0 else labels
        images = torch.from_numpy(np.concatenate([x, x]) if guided else x)
        recording = Recording(Masked() if config.dynamic else Static(), config)
        with torch.no_grad():
            t = torch.full((len(rows),), float(sampling.timesteps[step]))
            out = model(images, t, torch.from_numpy(rows), recording)
        history = np.zeros_like(x) if state.history is None else state.history
        x, history, noise = map(torch.from_numpy, (x, history, noise))
        row = torch.tensor(sampling.coefficients[step])
        after = sampler_step(x, history, out, noise, row, cfg_scale, sampling.cfg_channels)
        return Reference(*(each.numpy() for each in after), recording.decisions().tokens.bool().numpy())

    return compute


def relative_l2(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.fixture(scope="session")
def relative() -> Callable[[np.ndarray, np.ndarray], float]:
    """|a - b| / |b|."""
    return relative_l2
