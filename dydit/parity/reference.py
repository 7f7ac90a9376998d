"""The reference that bundles are compared with: the masked model and the sampler's update in PyTorch, fp32.

The model is the dense `DiT` of the checkpoint, with its routers running: nothing is frozen, sliced, patched or read
from a bundle. Timesteps and coefficients come from the diffusion process, not from the manifest. The rows of the model
are the images with their labels and then, with guidance, the same images with the null class.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from dydit.diffusion.coefficients import sampling_run
from dydit.diffusion.guidance import Guidance
from dydit.diffusion.noise import INITIAL_DRAW, image_noise, step_draw
from dydit.diffusion.sampler_step import sampler_step
from dydit.diffusion.samplers import SamplerConfig
from dydit.diffusion.steps import State, run_steps
from dydit.errors import ConfigError
from dydit.models.config import ModelConfig
from dydit.models.dynamic import DynamicModel
from dydit.models.routers import Gating, Masked, Recording, Static, TokenRouter
from dydit.models.text import TextRows


@dataclass(frozen=True)
class Images:
    """The images to sample: one for each label, with the noise of (seed, index), and the guidance scale (1: none)."""

    labels: tuple[int, ...]
    seed: int = 0
    cfg_scale: float = 4.0

    @property
    def batch(self) -> int:
        """The number of images."""
        return len(self.labels)

    def row_labels(self, config: ModelConfig) -> np.ndarray:
        """Labels of all rows, int64 [rows]. Raises `ConfigError` for a label outside the class table, and for guidance
        of a model without a null class."""
        for label in self.labels:
            if not 0 <= label < config.classes.rows:
                raise ConfigError(f"label {label} is outside 0..{config.classes.rows - 1}")
        return Guidance(self.cfg_scale, config.null_class).rows(np.asarray(self.labels, np.int64))

    def noise(self, config: ModelConfig, step: int | None) -> np.ndarray:
        """Noise of an execution step, or the initial latents if `step` is None, f32 [B, C, S, S]."""
        shape = (config.in_channels, config.input_size, config.input_size)
        return image_noise(self.seed, range(self.batch), INITIAL_DRAW if step is None else step_draw(step), shape)


@dataclass(frozen=True)
class ReferenceStep:
    """One step: the `state` after it, f32 [B, C, S, S] each; `masks` bool [R, U], the gates of units; `logits` f32
    [L, R, N] of the token routers (None for a static model); `residuals` f32 [L, R, N, D], if they were requested."""

    state: State[np.ndarray]
    masks: np.ndarray
    logits: np.ndarray | None
    residuals: np.ndarray | None = None


@dataclass(frozen=True)
class Trajectory:
    """A whole run: `latents` and `history` f32 [S+1, B, C, S, S], of which entry s is what step s starts from; the
    others are those of `ReferenceStep`, stacked over the steps."""

    latents: np.ndarray
    history: np.ndarray
    masks: np.ndarray
    logits: np.ndarray | None

    def state(self, step: int) -> State[np.ndarray]:
        """What a step starts from."""
        return State(self.latents[step], self.history[step])

    @property
    def tokens(self) -> np.ndarray | None:
        """The tokens that entered each MLP, bool [S, L, R, N]."""
        return None if self.logits is None else self.logits > 0


@dataclass
class _Watched(Masked):
    """The gates of inference. It keeps the logits of the token routers."""

    logits: list[Tensor] = field(default_factory=list)

    def tokens(self, block: int, router: TokenRouter | None, x: Tensor) -> Tensor | None:
        if router is None:
            return None
        logits = router(x)
        self.logits.append(logits)
        return self.gate(logits)


class Reference:
    """The masked model of a checkpoint, and the steps of a sampler. `texts`: those that labels number, if any."""

    def __init__(self, model: DynamicModel, sampling: SamplerConfig, cfg_channels: int, texts: TextRows | None = None):
        self.texts = texts
        self.model, self.config, self.cfg_channels = model.eval(), model.config, cfg_channels
        run = sampling_run(self.config.diffusion, sampling, self.config.learn_sigma)
        self.timesteps, self.coefficients = run.times, run.coefficients

    @torch.inference_mode()
    def after(
        self, step: int, state: State[Tensor], noise: Tensor, labels: Tensor, cfg_scale: float, gating: Gating
    ) -> State[Tensor]:
        """The state after a step: x, history, noise [B, C, S, S], labels [rows]."""
        x, rows = state.x, len(labels)
        timesteps = torch.full((rows,), float(self.timesteps[step]))
        given = labels if self.texts is None else self.texts[labels]
        out = self.model(x.repeat(rows // len(x), 1, 1, 1), timesteps, given, gating)
        row = torch.from_numpy(self.coefficients[step])
        return State(
            *sampler_step(x, state.history_or(torch.zeros_like), out, noise, row, cfg_scale, self.cfg_channels)
        )

    @torch.inference_mode()
    def step(self, images: Images, step: int, state: State[np.ndarray], residuals: bool = False) -> ReferenceStep:
        """One step from a state f32 [B, C, S, S] each, with its routing decisions."""
        watched = _Watched()
        recording = Recording(watched if self.config.dynamic else Static(), self.config)
        labels = torch.from_numpy(images.row_labels(self.config))
        noise = torch.from_numpy(images.noise(self.config, step))
        with _after_blocks(self.model, residuals) as streams:
            history = None if state.history is None else torch.from_numpy(state.history)
            before = State(torch.from_numpy(state.x), history)
            after = self.after(step, before, noise, labels, images.cfg_scale, recording)
            assert after.history is not None
        decisions = recording.decisions()
        return ReferenceStep(
            State(after.x.numpy(), after.history.numpy()),
            (decisions.units > 0).numpy(),
            torch.stack(watched.logits).numpy() if watched.logits else None,
            torch.stack(streams).numpy() if residuals else None,
        )

    def run(self, images: Images, progress: Callable[[], None] | None = None) -> Trajectory:
        """All steps from pure noise; `progress()` is called after each."""
        steps: list[ReferenceStep] = []

        def keep(step: int, outcome: ReferenceStep) -> None:
            steps.append(outcome)
            if progress:
                progress()

        initial = images.noise(self.config, None)
        run_steps(partial(self.step, images), State(initial), range(len(self.timesteps)), keep)
        logits = [each.logits for each in steps if each.logits is not None]
        states = [State(initial, np.zeros_like(initial)), *(each.state for each in steps)]
        latents, history = (np.stack(each) for each in zip(*((s.x, s.history) for s in states), strict=True))
        return Trajectory(
            latents, history, np.stack([each.masks for each in steps]), np.stack(logits) if logits else None
        )


@contextlib.contextmanager
def _after_blocks(model: DynamicModel, requested: bool) -> Iterator[list[Tensor]]:
    """While it is open, it keeps what each block returns. The forward hooks only observe."""
    streams: list[Tensor] = []

    def keep(module: nn.Module, inputs: object, output: Tensor) -> None:
        streams.append(output)

    handles = [block.register_forward_hook(keep) for block in model.ordered_blocks()] if requested else []
    try:
        yield streams
    finally:
        for handle in handles:
            handle.remove()
