"""Watching what enters every linear layer of a dynamic model while it samples, step by step (`dydit calibrate`).

The model runs in its sliced form (`dydit.models.dit.sliced`), so what is counted is what a subnetwork's layers see:
heads and groups that are on, and of the tokens those that are routed. A value belongs to the step that it was made in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dydit.calibrate.activation_ranges import Observations
from dydit.checkpoints.checkpoint import Checkpoint
from dydit.diffusion.coefficients import step_coefficients
from dydit.diffusion.guidance import Guidance
from dydit.diffusion.schedule import Sampler, Schedule
from dydit.errors import ConfigError
from dydit.export.exporter import GUIDED_CHANNELS
from dydit.models.config import ModelConfig
from dydit.models.dit.layout import stored_tensors
from dydit.models.dit.sliced import SlicedBlock, SlicedDiT, conditioning
from dydit.planning.masks import freeze_masks
from dydit.quantization.smoothing import Smoothing
from dydit.runtime.noise_source import SeededNoise
from dydit.runtime.request import make_batches

Progress = Callable[[int, int], None]
Watch = Callable[[int, SlicedBlock, str, np.ndarray], None]
"""Called with a segment, a block cut to its units, a layer, and what enters it, f32 [..., in]."""


class WatchedDiT(SlicedDiT):
    """A subnetwork that shows what enters its layers: `watch(block, layer, values [..., in])`."""

    watch: Callable[[SlicedBlock, str, np.ndarray], None]

    def linear(self, block: SlicedBlock, layer: str, x: Tensor) -> Tensor:
        """The layer, once its input has been shown."""
        self.watch(block, layer, x.numpy())
        return super().linear(block, layer, x)


def observe(
    checkpoint: Checkpoint,
    segments: Sequence[tuple[int, int]],
    labels: Sequence[int],
    *arguments: Any,
    smoothing: Smoothing | None = None,
    **settings: Any,
) -> Observations:
    """Sample and count what enters every layer, divided as a `smoothing` says, by segment of steps.

    Arguments and errors as those of `sample_watched`; the same give the same counts.
    """
    config = checkpoint.config
    names = config.units.layer_names
    seen = Observations(len(segments), config.depth, names)
    places = [(block, layer) for block in range(config.depth) for layer in names]
    divisors = {} if smoothing is None else {place: smoothing.divisor(*place) for place in places}

    def watch(segment: int, block: SlicedBlock, layer: str, values: np.ndarray) -> None:
        divisor = divisors.get((block.index, layer))
        if divisor is not None:
            values = values / divisor[entering(config, block, layer)]
        seen.add(segment, block.index, layer, values)

    sample_watched(watch, checkpoint, segments, labels, *arguments, **settings)
    return seen


def entering(model: ModelConfig, block: SlicedBlock, layer: str) -> np.ndarray:
    """The input channels of a layer, by the checkpoint's numbers, that the units of a block cut to them have, int64."""
    spec = model.units.blocks[block.index]
    each = next(each for each in spec.layers if each.name == layer)
    if each.out_major:
        return np.arange(each.features)
    units = block.slots[spec.group_of(layer)]
    return np.asarray((units[:, None] * each.unit_features + torch.arange(each.unit_features)).flatten().numpy())


def sample_watched(
    watch: Watch,
    checkpoint: Checkpoint,
    segments: Sequence[tuple[int, int]],
    labels: Sequence[int],
    cfg_scales: Sequence[float],
    steps: int,
    sampler: Sampler = Sampler.DDPM,
    seed: int = 0,
    batch: int = 16,
    cfg_channels: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Sample an image for each label and show what enters every layer, by segment of steps (half-open ranges).

    Guidance scales take turns over the batches; `cfg_channels`: latent channels that guidance acts on, by default the
    first 3. `progress(done, total)` counts steps of a batch. Raises `ConfigError` for no labels or scales, and what
    `watch` does.
    """
    if not labels or not cfg_scales:
        raise ConfigError("calibration needs at least one label and one guidance scale")
    config, schedule = checkpoint.config, Schedule.respaced(steps)
    for scale in cfg_scales:
        config.require_guidance(scale)
    timesteps = schedule.timesteps[::-1]
    masks = freeze_masks(checkpoint.width_routers(), timesteps)
    weights = dict(stored_tensors(checkpoint.state, config))
    coefficients = torch.from_numpy(step_coefficients(schedule, sampler, config.learn_sigma).astype(np.float32))
    channels = min(GUIDED_CHANNELS, config.in_channels) if cfg_channels is None else cfg_channels
    noise = SeededNoise(seed, (config.in_channels, config.input_size, config.input_size))
    batches = make_batches(labels, range(len(labels)), batch)
    latents = [torch.from_numpy(noise.initial(each)) for each in batches]
    segment_of = {step: index for index, (first, end) in enumerate(segments) for step in range(first, end)}
    for step in range(steps):
        model = WatchedDiT(config, weights, config.units.slots(masks[step]), channels)
        model.watch = partial(watch, segment_of[step])
        for index, each in enumerate(batches):
            scale = float(cfg_scales[index % len(cfg_scales)])
            used = Guidance(scale, config.null_class).rows(each.labels)
            time, classes = torch.tensor([int(timesteps[step])]), torch.from_numpy(used)
            out = model.step(
                latents[index],
                torch.from_numpy(noise.step(each, step)),
                coefficients[step],
                torch.tensor(scale),
                conditioning(config, weights, time, classes)[0],
            )
            latents[index] = out.x_prev
            if progress:
                progress(step * len(batches) + index + 1, steps * len(batches))
