"""Sampling a checkpoint in PyTorch, step by step, with the subnetwork of each step in its sliced form. On the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dydit.calibrate.tokens import spread_labels, spread_scales
from dydit.checkpoints.checkpoint import Checkpoint
from dydit.diffusion.coefficients import sampling_run
from dydit.diffusion.guidance import Guidance
from dydit.diffusion.samplers import SamplerConfig
from dydit.diffusion.steps import State
from dydit.export.settings import guided_channels
from dydit.models.registry import architecture_of
from dydit.models.sliced import Linear, SlicedModel, text_feeds
from dydit.models.text import TextRows
from dydit.planning.masks import freeze_masks
from dydit.quantization.smoothing import Smoothing
from dydit.runtime.request import Batch, make_batches

Condition = dict[str, Tensor]
"""The inputs of `SlicedModel.step` that depend on the timestep and on the label of each row."""


class SlicedSampler:
    """The steps of a run. `masks` bool [S, U]; `weights`: those of the checkpoint by their stored names, smoothed."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        sampling: SamplerConfig,
        cfg_channels: int | None = None,
        smoothing: Smoothing | None = None,
    ):
        config = checkpoint.config
        run = sampling_run(config.diffusion, sampling, config.learn_sigma)
        self.config, self.timesteps = config, run.times
        self.masks = freeze_masks(checkpoint.width_router_model(), self.timesteps)
        self._architecture = architecture_of(config)
        self.weights = dict(self._architecture.stored_tensors(checkpoint.state, config, smoothing=smoothing))
        self._factors = self._architecture.condition_factors(config, smoothing)
        self._coefficients = torch.from_numpy(run.coefficients.astype(np.float32))
        texts = checkpoint.texts
        self._texts = None if texts is None else TextRows.of(texts.embeddings, texts.mask)
        self._channels = guided_channels(config, cfg_channels)

    def subnet(self, step: int, linear: Linear) -> SlicedModel:
        """The subnetwork of a step, whose layers `linear` computes."""
        slots = self.config.units.slots(self.masks[step])
        return self._architecture.sliced(self.config, self.weights, slots, self._channels, linear=linear)

    def condition(self, step: int, labels: np.ndarray, cfg_scale: float) -> Condition:
        """What a step takes for labels [B] and, with guidance, for as many null classes after them."""
        rows = torch.from_numpy(Guidance(cfg_scale, self.config.null_class).rows(labels))
        time = torch.from_numpy(self.timesteps[step : step + 1])
        condition = self._architecture.conditioning(self.config, self.weights, time, rows)[0]
        if self._factors is not None:
            condition = condition * torch.from_numpy(self._factors)
        texts = {} if self._texts is None else text_feeds(self.config, self.weights, self._texts, rows)
        return {"condition": condition, **texts}

    def step(
        self,
        subnet: SlicedModel,
        step: int,
        state: State[np.ndarray],
        noise: np.ndarray,
        condition: Condition,
        cfg_scale: float,
    ) -> State[np.ndarray]:
        """The state after a step, f32 [B, C, S, S] each, with the subnetwork and the condition of this step."""
        x, before, drawn = map(torch.from_numpy, (state.x, state.history_or(np.zeros_like), noise))
        scale = torch.tensor(float(cfg_scale))
        out = subnet.step(x, before, drawn, self._coefficients[step], scale, **condition)
        return State(out.x_prev.numpy(), out.next_history.numpy())


def spread_batches(images: int, classes: int, scales: Sequence[float], size: int) -> list[tuple[float, list[Batch]]]:
    """The batches of each guidance scale. Images are numbered over all scales; each scale has all classes evenly."""
    batches, first = [], 0
    for scale, count in spread_scales(images, scales):
        batches.append((scale, make_batches(spread_labels(count, classes), range(first, first + count), size)))
        first += count
    return batches
