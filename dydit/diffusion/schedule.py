"""The posterior of a diffusion process at given timesteps: what DDPM and training need. NumPy, float64."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dydit.diffusion.process import Process


@dataclass(frozen=True)
class Schedule:
    """Gaussian diffusion with a set of betas, in ascending order of t."""

    betas: np.ndarray  # [S] float64

    @classmethod
    def training(cls, process: Process) -> Schedule:
        """All 1000 steps of a discrete process."""
        return cls(process.training_betas())

    @classmethod
    def visiting(cls, process: Process, timesteps: np.ndarray) -> Schedule:
        """The steps that have the full process' marginals q(x_t | x_0) at `timesteps`, ascending [S]."""
        cumulative = process.alphas_cumprod(timesteps)
        previous = np.concatenate([[1.0], cumulative[:-1]])
        return cls(1 - cumulative / previous)

    @property
    def steps(self) -> int:
        """Number of steps S."""
        return len(self.betas)

    @cached_property
    def alphas_cumprod(self) -> np.ndarray:
        """Product of (1 - beta) up to and including each step, [S]."""
        return np.cumprod(1 - self.betas)

    @cached_property
    def alphas_cumprod_prev(self) -> np.ndarray:
        """`alphas_cumprod` one step earlier, [S]; 1 at the first step."""
        return np.concatenate([[1.0], self.alphas_cumprod[:-1]])

    @cached_property
    def posterior_variance(self) -> np.ndarray:
        """Variance of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, eq. 7), [S]; 0 at the first step."""
        return self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

    @cached_property
    def log_variance_range(self) -> tuple[np.ndarray, np.ndarray]:
        """(smallest, largest) log variance, between which a model output in [-1, 1] interpolates (Nichol & Dhariwal,
        eq. 15). The smallest is that of the posterior; its first entry, log 0, is replaced by the second one, as in the
        reference code.
        """
        clipped = self.posterior_variance.copy()
        clipped[0] = clipped[1] if self.steps > 1 else self.betas[0]
        return np.log(clipped), np.log(self.betas)

    @cached_property
    def posterior_mean_coefficients(self) -> tuple[np.ndarray, np.ndarray]:
        """Weights of x_0 and x_t in the mean of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, eq. 7), each [S]."""
        of_x0 = self.betas * np.sqrt(self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)
        of_xt = (1 - self.alphas_cumprod_prev) * np.sqrt(1 - self.betas) / (1 - self.alphas_cumprod)
        return of_x0, of_xt
