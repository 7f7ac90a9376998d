"""Observing the inputs of every linear layer of a dynamic model while it samples (`dydit calibrate`).

The model runs in its sliced form, so the observed values are those of a subnetwork: of heads and groups that are on,
and of tokens that are routed. A value belongs to the step in which it was computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dydit.calibrate.activation_ranges import Observations
from dydit.calibrate.sliced_sampler import SlicedSampler
from dydit.checkpoints.checkpoint import Checkpoint
from dydit.diffusion.samplers import SamplerConfig
from dydit.diffusion.steps import State, StateOnly, run_steps
from dydit.errors import ConfigError
from dydit.models.architecture import UnitLayer
from dydit.models.config import ModelConfig
from dydit.models.sliced import SlicedBlock, plain_linear
from dydit.quantization.smoothing import Smoothing
from dydit.runtime.noise_source import SeededNoise
from dydit.runtime.request import make_batches

Progress = Callable[[int, int], None]
Watch = Callable[[int, SlicedBlock, str, np.ndarray], None]
"""Called with a segment, a block sliced to its units, a layer, and the inputs of the layer, f32 [..., in]."""


@dataclass(frozen=True)
class ObservedRun:
    """A sampling run in which activations are observed: one image for each of `labels`.

    `segments`: half-open ranges that divide the steps. Batches of `batch` images take turns with the guidance scales.
    Image i has the noise of (`seed`, i). `cfg_channels`: the latent channels that guidance acts on, by default the
    first 3.
    """

    segments: Sequence[tuple[int, int]]
    labels: Sequence[int]
    cfg_scales: Sequence[float]
    sampling: SamplerConfig
    seed: int = 0
    batch: int = 16
    cfg_channels: int | None = None


def observe(
    checkpoint: Checkpoint, run: ObservedRun, smoothing: Smoothing | None = None, progress: Progress | None = None
) -> Observations:
    """Sample, and count the inputs of every layer in each segment, divided by the factors of `smoothing`.

    The same arguments give the same counts. Progress and errors are those of `sample_watched`.
    """
    config = checkpoint.config
    names = config.units.layer_names
    seen = Observations(len(run.segments), config.depth, names)
    layers = [(block, layer) for block in range(config.depth) for layer in names]
    divisors = {} if smoothing is None else {layer: smoothing.divisor(*layer) for layer in layers}

    def watch(segment: int, block: SlicedBlock, layer: str, values: np.ndarray) -> None:
        divisor = divisors.get((block.index, layer))
        if divisor is not None:
            values = values / divisor[entering(config, block, layer)]
        seen.add(segment, block.index, layer, values)

    sample_watched(watch, checkpoint, run, progress)
    return seen


def entering(model: ModelConfig, block: SlicedBlock, layer: str) -> np.ndarray:
    """The input channels of a layer that the units of a sliced block have, in the checkpoint's numbering, int64."""
    spec = model.units.blocks[block.index]
    each = next(each for each in spec.layers if each.name == layer)
    if each.out_major:
        return np.arange(each.features)
    units = block.slots[spec.group_of(layer)]
    return np.asarray((units[:, None] * each.unit_features + torch.arange(each.unit_features)).flatten().numpy())


def sample_watched(watch: Watch, checkpoint: Checkpoint, run: ObservedRun, progress: Progress | None = None) -> None:
    """Sample, and pass the inputs of every layer to `watch`.

    `progress(done, total)` counts steps of a batch. Raises `ConfigError` for a run without labels or guidance scales,
    and whatever `watch` raises.
    """
    if not run.labels or not run.cfg_scales:
        raise ConfigError("calibration needs at least one label and one guidance scale")
    config = checkpoint.config
    for scale in run.cfg_scales:
        config.guidance_scale(scale)
    sampler = SlicedSampler(checkpoint, run.sampling, run.cfg_channels)
    noise = SeededNoise(run.seed, (config.in_channels, config.input_size, config.input_size))
    batches = make_batches(run.labels, range(len(run.labels)), run.batch)
    segment_of = [index for index, (first, end) in enumerate(run.segments) for _ in range(first, end)]

    def step(index: int, states: State[list[State[np.ndarray]]]) -> StateOnly[list[State[np.ndarray]]]:
        """One step of all batches, on the subnetwork of this step."""

        def layer(block: SlicedBlock, layer: UnitLayer, x: Tensor) -> Tensor:
            watch(segment_of[index], block, layer.name, x.numpy())
            return plain_linear(block, layer, x)

        subnet, after = sampler.subnet(index, layer), []
        for number, (batch, state) in enumerate(zip(batches, states.x, strict=True)):
            scale = run.cfg_scales[number % len(run.cfg_scales)]
            condition = sampler.condition(index, batch.labels, scale)
            after.append(sampler.step(subnet, index, state, noise.step(batch, index), condition, scale))
            if progress:
                progress(index * len(batches) + number + 1, run.sampling.steps * len(batches))
        return StateOnly(State(after))

    run_steps(step, State([State(noise.initial(batch)) for batch in batches]), range(run.sampling.steps))
