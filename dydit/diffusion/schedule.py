"""The diffusion process and its respacing to fewer sampling steps. NumPy, float64.

Steps are executed from the noisy end: execution index 0 starts from pure noise, and the last one returns the sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

import numpy as np

from dydit.errors import ConfigError

TRAIN_STEPS = 1000


class Sampler(StrEnum):
    """How a step computes x_{t-1} from the output of the model."""

    DDPM = "ddpm"  # ancestral sampling with the learned-range variance
    DDIM = "ddim"  # deterministic (eta = 0)


def linear_betas() -> np.ndarray:
    """Betas of DDPM's linear schedule, [1000] float64 (Ho et al. 2020)."""
    return np.linspace(1e-4, 0.02, TRAIN_STEPS)


def respaced_timesteps(count: int) -> np.ndarray:
    """The original timesteps that a `count`-step run visits, ascending: `round(i * 999 / (count-1))`.

    Returns int64 [count], distinct, from 0 to 999 (only 0 if count is 1). Raises `ConfigError` for a count outside
    1..1000.
    """
    if not 1 <= count <= TRAIN_STEPS:
        raise ConfigError(f"sampling steps {count} is outside 1..{TRAIN_STEPS}")
    if count == 1:
        return np.zeros(1, np.int64)
    return np.rint(np.arange(count) * ((TRAIN_STEPS - 1) / (count - 1))).astype(np.int64)


@dataclass(frozen=True)
class Schedule:
    """Gaussian diffusion with a set of betas and the original timestep of each. Arrays are in ascending order of t."""

    betas: np.ndarray  # [S] float64
    timesteps: np.ndarray  # [S] int64, the input of the model

    @classmethod
    def training(cls) -> Schedule:
        """All 1000 steps."""
        return cls(linear_betas(), np.arange(TRAIN_STEPS))

    @classmethod
    def respaced(cls, count: int) -> Schedule:
        """`count` steps whose marginals q(x_t | x_0) are those of the full process at the visited timesteps."""
        timesteps = respaced_timesteps(count)
        cumulative = np.cumprod(1 - linear_betas())[timesteps]
        previous = np.concatenate([[1.0], cumulative[:-1]])
        return cls(1 - cumulative / previous, timesteps)

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
