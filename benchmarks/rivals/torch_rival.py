"""What the rivals in PyTorch have in common: guidance and the sampler's formula as tensor operations."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
import torch
from rival import Rival
from torch import Tensor

from dydit.bench.timing import Loaded
from dydit.diffusion.sampler_step import sampler_step


class TorchRival(Rival):
    """A rival whose model maps tensors to tensors."""

    @abstractmethod
    def predict(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Epsilon and variance [R, 2C, S, S] of latents x [R, C, S, S] at timesteps t [R] with labels y [R]."""

    def load(self) -> Loaded:
        torch.set_num_threads(self.job.threads)
        return super().load()

    @torch.inference_mode()
    def step(self, k: int, x: np.ndarray) -> np.ndarray:
        latents, noise = torch.from_numpy(x), torch.from_numpy(self.noise[k])
        t = torch.full((len(self.rows),), int(self.timesteps[k]))
        out = self.predict(latents.repeat(len(self.rows) // len(x), 1, 1, 1), t, torch.from_numpy(self.rows))
        row = torch.from_numpy(self.coefficients[k])
        x_prev: np.ndarray = sampler_step(latents, out, noise, row, self.job.cfg_scale, self.job.cfg_channels).numpy()
        return x_prev
