"""Sampling in PyTorch from a model in memory, to evaluate a training run. Not the runtime: masks are only multiplied.

Noise is keyed by (seed, image), so what is sampled does not depend on the batch size, and two models can get the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dydit.diffusion.coefficients import step_coefficients
from dydit.diffusion.guidance import Guidance
from dydit.diffusion.noise import INITIAL_DRAW, image_noise, step_draw
from dydit.diffusion.schedule import Sampler, Schedule
from dydit.errors import ConfigError
from dydit.models.dit import DiT
from dydit.models.routers import Masked, Recording, Static

GUIDED_CHANNELS = 3  # the reference guides the first three latent channels only


@dataclass(frozen=True)
class Sample:
    """Images in label order and the routing of each step, in execution order. `None` where it was not asked for."""

    images: np.ndarray  # float32 [n, C, S, S]
    heads: np.ndarray | None = None  # bool [steps, L, H]
    groups: np.ndarray | None = None  # bool [steps, L, H]
    tokens: np.ndarray | None = None  # bool [steps, L, n, N], of the conditional half


@torch.no_grad()
def sample_torch(
    model: DiT,
    labels: Sequence[int] | np.ndarray,
    *,
    steps: int = 250,
    sampler: Sampler = Sampler.DDPM,
    cfg_scale: float = 1.0,
    seed: int = 0,
    batch: int = 256,
    record: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Sample:
    """Draw one image for each label, [n]. A guidance scale of 1 runs the conditional half only.

    `progress` is called with (model evaluations done, in all). Raises `ConfigError` for a label that is no class.
    """
    labels = np.asarray(labels, np.int64)
    if labels.ndim != 1 or not len(labels) or not ((labels >= 0) & (labels < model.config.class_rows)).all():
        last = model.config.class_rows - 1
        raise ConfigError(f"labels must be a list of classes in 0..{last}; got {labels.tolist()}")
    model.config.require_guidance(cfg_scale)
    schedule = Schedule.respaced(steps)
    coefficients = step_coefficients(schedule, sampler, model.config.learn_sigma)
    plan = _Plan(schedule.timesteps[::-1], coefficients, cfg_scale, seed, record)
    starts = range(0, len(labels), batch)
    parts = []
    for number, start in enumerate(starts):
        images = range(start, min(start + batch, len(labels)))

        def tick(step: int, before: int = number * steps) -> None:
            if progress is not None:
                progress(before + step + 1, len(starts) * steps)

        parts.append(_sample_batch(model, labels[images], images, plan, tick))
    joined = np.concatenate([part.images for part in parts])
    if not record:
        return Sample(joined)
    tokens = np.concatenate([part.tokens for part in parts if part.tokens is not None], axis=2)
    return Sample(joined, parts[0].heads, parts[0].groups, tokens)


@dataclass(frozen=True)
class _Plan:
    """What is the same for every batch of images; the steps in execution order."""

    timesteps: np.ndarray  # [S] int64
    coefficients: np.ndarray  # [S, 5]
    cfg_scale: float
    seed: int
    record: bool


def _sample_batch(
    model: DiT, labels: np.ndarray, images: Sequence[int], plan: _Plan, tick: Callable[[int], None]
) -> Sample:
    config, device = model.config, next(model.parameters()).device
    shape = (config.in_channels, config.input_size, config.input_size)
    x = torch.from_numpy(image_noise(plan.seed, images, INITIAL_DRAW, shape)).to(device)
    y = torch.from_numpy(labels).to(device)
    kept: list[tuple[np.ndarray, ...]] = []
    for step, (t, c) in enumerate(zip(plan.timesteps.tolist(), plan.coefficients.tolist(), strict=True)):
        gating = Recording(Masked() if config.dynamic else Static(), config)
        eps, v = _guided(model, x, t, y, plan.cfg_scale, gating)
        noise = torch.from_numpy(image_noise(plan.seed, images, step_draw(step), shape)).to(device)
        x = c[0] * x + c[1] * eps + c[2] * torch.exp(c[3] * v + c[4]) * noise
        if plan.record:
            made = gating.decisions()
            on = (made.heads[:, 0] > 0, made.groups[:, 0] > 0, made.tokens[:, : len(images)] > 0)
            kept.append(tuple(part.cpu().numpy() for part in on))
        tick(step)
    if not plan.record:
        return Sample(x.cpu().numpy())
    heads, groups, tokens = (np.stack(parts) for parts in zip(*kept, strict=True))
    return Sample(x.cpu().numpy(), heads, groups, tokens)


def _guided(model: DiT, x: Tensor, t: int, y: Tensor, cfg_scale: float, gating: Recording) -> tuple[Tensor, Tensor]:
    """(epsilon, raw variance output) [B, C, S, S]; with guidance, epsilon of the first channels is extrapolated."""
    channels, guidance = model.config.in_channels, Guidance(cfg_scale, model.config.null_class)
    y = torch.from_numpy(guidance.rows(y.cpu().numpy())).to(y.device)
    x = x.repeat(len(y) // len(x), 1, 1, 1)
    output = model(x, torch.full((len(x),), t, device=x.device), y, gating)
    eps = output[:, :channels]
    v = output[:, channels:] if model.config.learn_sigma else torch.zeros_like(eps)
    if not guidance.guided:
        return eps, v
    with_class, without = eps.chunk(2)
    mixed = with_class.clone()
    mixed[:, :GUIDED_CHANNELS] = without[:, :GUIDED_CHANNELS] + cfg_scale * (
        with_class[:, :GUIDED_CHANNELS] - without[:, :GUIDED_CHANNELS]
    )
    return mixed, v.chunk(2)[0]
