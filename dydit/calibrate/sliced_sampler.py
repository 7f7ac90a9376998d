"""Sampling a checkpoint in PyTorch, step by step, with the subnetwork of each step in its sliced form. On the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dydit.calibrate.tokens import spread_labels, spread_scales
from dydit.checkpoints.checkpoint import Checkpoint
from dydit.diffusion.coefficients import step_coefficients
from dydit.diffusion.guidance import Guidance
from dydit.diffusion.schedule import Sampler, Schedule
from dydit.export.settings import guided_channels
from dydit.models.registry import architecture_of
from dydit.models.sliced import Linear, SlicedModel
from dydit.planning.masks import freeze_masks
from dydit.quantization.smoothing import Smoothing
from dydit.runtime.request import Batch, make_batches


class SlicedSampler:
    """The steps of a run. `masks` bool [S, U]; `weights`: those of the checkpoint by their stored names, smoothed."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        steps: int,
        sampler: Sampler,
        cfg_channels: int | None = None,
        smoothing: Smoothing | None = None,
    ):
        config, schedule = checkpoint.config, Schedule.respaced(steps)
        self.config, self.timesteps = config, schedule.timesteps[::-1]
        self.masks = freeze_masks(checkpoint.width_router_model(), self.timesteps)
        self._architecture = architecture_of(config)
        self.weights = dict(self._architecture.stored_tensors(checkpoint.state, config, smoothing=smoothing))
        self._factors = self._architecture.condition_factors(config, smoothing)
        coefficients = step_coefficients(schedule, sampler, config.learn_sigma).astype(np.float32)
        self._coefficients = torch.from_numpy(coefficients)
        self._channels = guided_channels(config, cfg_channels)

    def subnet(self, step: int, linear: Linear) -> SlicedModel:
        """The subnetwork of a step, whose layers `linear` computes."""
        slots = self.config.units.slots(self.masks[step])
        return self._architecture.sliced(self.config, self.weights, slots, self._channels, linear=linear)

    def condition(self, step: int, labels: np.ndarray, cfg_scale: float) -> Tensor:
        """What a step takes for labels [B] and, with guidance, for as many null classes after them."""
        rows = torch.from_numpy(Guidance(cfg_scale, self.config.null_class).rows(labels))
        time = torch.tensor([int(self.timesteps[step])])
        condition = self._architecture.conditioning(self.config, self.weights, time, rows)[0]
        return condition if self._factors is None else condition * torch.from_numpy(self._factors)

    def step(
        self, subnet: SlicedModel, step: int, x: np.ndarray, noise: np.ndarray, condition: Tensor, cfg_scale: float
    ) -> np.ndarray:
        """x_prev f32 [B, C, S, S] from `x`, with the subnetwork and the condition of this step."""
        latents, drawn, scale = torch.from_numpy(x), torch.from_numpy(noise), torch.tensor(float(cfg_scale))
        return subnet.step(latents, drawn, self._coefficients[step], scale, condition).x_prev.numpy()


def spread_batches(images: int, classes: int, scales: Sequence[float], size: int) -> list[tuple[float, list[Batch]]]:
    """The batches of each guidance scale. Images are numbered over all scales; each scale has all classes evenly."""
    batches, first = [], 0
    for scale, count in spread_scales(images, scales):
        batches.append((scale, make_batches(spread_labels(count, classes), range(first, first + count), size)))
        first += count
    return batches
