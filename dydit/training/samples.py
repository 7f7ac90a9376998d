"""Pictures of what a model samples while it is trained: the EMA weights, with the gates of inference.

    samples-00001000.png           16 images of a model of pixels
    samples-00001000-latents.png   of a model of latents: the first three channels (or the first, if there are fewer),
                                   from -3 (black) to 3 (white), because the autoencoder is not at hand

Noise, labels and captions are the same every time, so the pictures of a run show its progress, and are the same if the
run is repeated or resumed.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dydit.diffusion.coefficients import sampling_run
from dydit.diffusion.guidance import Guidance, is_guided
from dydit.diffusion.noise import INITIAL_DRAW, image_noise
from dydit.diffusion.sampler_step import sampler_step
from dydit.diffusion.samplers import Sampler, SamplerConfig
from dydit.diffusion.steps import State, StateOnly, run_steps
from dydit.files import write_atomic
from dydit.models.config import ModelConfig
from dydit.models.dynamic import DynamicModel
from dydit.models.text import TextRows
from dydit.training.draws import BatchSource

SIDE = 4  # images of a row and of a column
STEPS = 20
LATENT_RANGE = 3.0


@dataclass(frozen=True)
class Conditions:
    """What the images are conditioned by: `y` of the rows of a step, and the guidance scale. The null rows are last."""

    y: Tensor | TextRows
    scale: float

    @classmethod
    def of(cls, config: ModelConfig, source: BatchSource, device: torch.device) -> Conditions:
        """The classes in turn, or the captions of the first images."""
        count = SIDE * SIDE
        if config.text is not None:
            captions, empty = source.probe(count).captions, source.data.no_caption()
            assert captions is not None, "data without captions"
            embeddings, mask = np.zeros_like(captions.embeddings), np.zeros_like(captions.mask)
            tokens = empty.mask.shape[1]
            embeddings[:, :tokens], mask[:, :tokens] = empty.embeddings, empty.mask
            texts = TextRows.of(
                np.concatenate([captions.embeddings, embeddings]), np.concatenate([captions.mask, mask])
            )
            return cls(texts.to(device), config.usual_guidance)
        scale = 1.0 if config.null_class is None else config.usual_guidance
        labels = np.arange(count, dtype=np.int64) % config.classes.count
        return cls(torch.from_numpy(Guidance(scale, config.null_class).rows(labels)).to(device), scale)


@torch.no_grad()
def sample(model: DynamicModel, conditions: Conditions, seed: int) -> np.ndarray:
    """Images or latents after 20 deterministic steps (DPM-Solver++, or Euler for a flow), f32 [16, C, S, S]."""
    config, device = model.config, next(model.parameters()).device
    sampler = Sampler.EULER if config.diffusion.flow else Sampler.DPM_SOLVER
    run = sampling_run(config.diffusion, SamplerConfig(sampler=sampler, steps=STEPS), config.learn_sigma)
    rows = torch.from_numpy(run.coefficients.astype(np.float32)).to(device)
    repeats = 2 if is_guided(conditions.scale) else 1

    def step(index: int, state: State[Tensor]) -> StateOnly[Tensor]:
        x = state.x
        times = torch.full((repeats * len(x),), float(run.times[index]), device=device)
        output = model(x.repeat(repeats, 1, 1, 1), times, conditions.y)
        history, still = state.history_or(torch.zeros_like), torch.zeros_like(x)
        after = sampler_step(x, history, output, still, rows[index], conditions.scale, config.guided_channels)
        return StateOnly(State(*after))

    shape = (config.in_channels, config.input_size, config.input_size)
    noise = torch.from_numpy(image_noise(seed, range(SIDE * SIDE), INITIAL_DRAW, shape)).to(device)
    final: Tensor = run_steps(step, State(noise), range(STEPS)).x
    return final.float().cpu().numpy()


def write_samples(out: Path, iteration: int, images: np.ndarray, config: ModelConfig) -> None:
    """Write the picture of an iteration: of 16 images or latents, f32 [16, C, S, S]."""
    from PIL import Image

    pixels = config.samples_pixels
    images = np.nan_to_num(images / (1.0 if pixels else LATENT_RANGE))
    channels = 3 if images.shape[1] >= 3 else 1
    values = np.clip((images[:, :channels] + 1) * 127.5, 0, 255).round().astype(np.uint8)
    side = images.shape[-1]
    grid = values.reshape(SIDE, SIDE, channels, side, side).transpose(0, 3, 1, 4, 2)
    grid = grid.reshape(SIDE * side, SIDE * side, channels)
    file = io.BytesIO()
    Image.fromarray(grid if channels == 3 else grid[..., 0]).save(file, "PNG")
    write_atomic(out / f"samples-{iteration:08d}{'' if pixels else '-latents'}.png", file.getvalue())
