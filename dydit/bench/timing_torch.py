"""Timing a checkpoint in eager PyTorch: masked, like the public code, or static, without its routers.

A script that runs the model in another way derives from `MeasuredTorch` and overrides `build`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from dydit.bench.timing import Decided, Job, Loaded, Measured
from dydit.checkpoints.checkpoint import load_checkpoint
from dydit.diffusion.guidance import Guidance
from dydit.diffusion.sampler_step import sampler_step
from dydit.errors import ConfigError
from dydit.models.config import ModelConfig
from dydit.models.routers import Gating, Masked, Recording, Static
from dydit.models.text import TextRows
from dydit.reports.bench_report import SideKind
from dydit.runtime.text_files import texts_for


class MeasuredTorch(Measured):
    """The dense model, one step at a time, with embedders, conditioning and guidance, as in its loop."""

    def __init__(self, job: Job):
        torch.set_num_threads(job.threads)
        torch.backends.cudnn.allow_tf32 = False  # on by default, and the patches are embedded by a convolution
        self.device = torch.device(job.device)
        start = time.perf_counter()
        self.model, config = self.build(job)
        self.load_seconds = time.perf_counter() - start
        if config.sizes.without_routers() != job.sizes:
            raise ConfigError(f"{job.side.path} cannot be compared: its sizes differ from those of the bundle")
        super().__init__(job, config)
        masked = config.dynamic and job.side.kind is SideKind.TORCH_MASKED
        self.gating: Gating = Masked() if masked else Static()
        texts = texts_for(config, job.texts, max(job.labels) + 1)
        if texts is not None:
            config = config.with_texts(texts.count, texts.negative)
        rows = torch.from_numpy(Guidance(job.cfg_scale, config.null_class).rows(self.labels))
        given = rows if texts is None else TextRows.of(texts.embeddings, texts.mask)[rows]
        self.rows: torch.Tensor | TextRows = given.to(self.device)

    def build(self, job: Job) -> tuple[Callable[..., torch.Tensor], ModelConfig]:
        """The model on the job's device, called with (x, t, y, gating), and its configuration.

        Raises `UnavailableError` where this machine lacks something that the model needs.
        """
        checkpoint = load_checkpoint(Path(job.side.path))
        return checkpoint.model().to(self.device), checkpoint.config

    def load(self) -> Loaded:
        return Loaded(seconds=self.load_seconds, subnets=1, precision="fp32")

    @torch.inference_mode()
    def _step(self, k: int, latents: np.ndarray, gating: Gating) -> np.ndarray:
        x, noise = (torch.from_numpy(each).to(self.device) for each in (latents, self.noise[k]))
        timesteps = torch.full((len(self.rows),), float(self.timesteps[k]), device=self.device)
        out = self.model(x.repeat(len(self.rows) // len(x), 1, 1, 1), timesteps, self.rows, gating)
        row = torch.from_numpy(self.coefficients[k])
        history = torch.zeros_like(x)
        x_prev, _ = sampler_step(x, history, out, noise, row, self.job.cfg_scale, self.job.cfg_channels)
        array: np.ndarray = x_prev.cpu().numpy()  # waits for the device
        return array

    def step(self, k: int, x: np.ndarray) -> np.ndarray:
        return self._step(k, x, self.gating)

    def decided(self) -> Decided:
        if self.job.side.kind is SideKind.SCRIPT:  # a script's model takes no gates
            return super().decided()
        masks, tokens = [], []

        def step(k: int, x: np.ndarray) -> np.ndarray:
            recording = Recording(self.gating, self.config)
            after = self._step(k, x, recording)
            decisions = recording.decisions()
            masks.append(decisions.units[0].cpu().numpy() > 0)
            tokens.append(decisions.tokens.float().mean(dim=(1, 2)).cpu().numpy())
            return after

        self.over_round(step)
        return self._count(np.stack(masks), np.stack(tokens), np.ones(len(tokens)))
