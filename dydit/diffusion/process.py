"""What a model was trained on: how noise was added to its images, and what its output predicts. NumPy, float64.

    x_t = alpha(t) * x_0 + sigma(t) * eps

`alpha` and `sigma` follow from the noise schedule. A model's own time is what its timestep embedding receives:

    linear, scaled-linear, cosine    0 .. 999, integers; 999 is the noisiest (Ho et al. 2020; Nichol & Dhariwal 2021)
    vp-sde                           999 * s for s in 0 .. 1; 999 is the noisiest (Song et al. 2021, eq. 11)
    flow                             0 .. 1; 0 is pure noise and 1 the image (Ma et al. 2024, linear path)
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Self

import numpy as np
from pydantic import FiniteFloat, ValidationInfo, field_validator, model_validator

from dydit.validation import Strict

TRAIN_STEPS = 1000


class NoiseSchedule(StrEnum):
    """How alpha and sigma depend on the time."""

    LINEAR = "linear"  # betas of DDPM and DiT
    SCALED_LINEAR = "scaled-linear"  # betas of Stable Diffusion: linear in their square roots
    COSINE = "cosine"  # betas of improved DDPM
    VP_SDE = "vp-sde"  # continuous time: beta(s) is linear
    FLOW = "flow"  # continuous time: alpha = t, sigma = 1 - t


class Prediction(StrEnum):
    """What the output of a model stands for."""

    EPSILON = "epsilon"  # the noise
    X0 = "x0"  # the image
    V = "v"  # alpha * eps - sigma * x_0 (Salimans & Ho 2022)
    VELOCITY = "velocity"  # x_0 - eps, the derivative of a flow's x_t


_BETAS = {
    NoiseSchedule.LINEAR: (1e-4, 0.02),
    NoiseSchedule.SCALED_LINEAR: (0.00085, 0.012),
    NoiseSchedule.VP_SDE: (0.1, 20.0),
}


@dataclass(frozen=True)
class Conversion:
    """x_0 and eps from the latents x and the model's output, at some times: each is `of_x * x + of_out * output`.

    `x0`, `eps`: pairs (of_x, of_out) of float64 [S].
    """

    x0: tuple[np.ndarray, np.ndarray]
    eps: tuple[np.ndarray, np.ndarray]


class Process(Strict):
    """A noise schedule and a prediction. The default is DiT's.

    `betas`: (beta_start, beta_end) of a schedule that has them; None: the usual ones of the schedule. A flow predicts
    the velocity, and nothing else does.
    """

    schedule: NoiseSchedule = NoiseSchedule.LINEAR
    prediction: Prediction = Prediction.EPSILON
    betas: tuple[FiniteFloat, FiniteFloat] | None = None

    @field_validator("betas")
    @classmethod
    def _usual_are_none(cls, betas: tuple[float, float] | None, known: ValidationInfo) -> tuple[float, float] | None:
        """So that equal processes compare equal."""
        return None if betas == _BETAS.get(known.data.get("schedule", NoiseSchedule.COSINE)) else betas

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.flow != (self.prediction is Prediction.VELOCITY):
            raise ValueError(
                f"schedule {self.schedule} cannot be combined with prediction {self.prediction}: "
                "a flow predicts the velocity, and other schedules predict epsilon, x0 or v"
            )
        if self.betas is not None:
            if self.schedule not in _BETAS:
                raise ValueError(f"schedule {self.schedule} has no betas to set")
            if not 0 < self.betas[0] <= self.betas[1] or (self.discrete and self.betas[1] >= 1):
                wanted = "above 0 and below 1" if self.discrete else "above 0"
                raise ValueError(f"betas {self.betas[0]:g} to {self.betas[1]:g} do not ascend, {wanted}")
        return self

    @property
    def flow(self) -> bool:
        """Whether the model is a flow: its time runs from noise to the image."""
        return self.schedule is NoiseSchedule.FLOW

    @property
    def discrete(self) -> bool:
        """Whether the model knows 1000 integer timesteps only."""
        return self.schedule not in (NoiseSchedule.VP_SDE, NoiseSchedule.FLOW)

    @property
    def beta_range(self) -> tuple[float, float]:
        """(beta_start, beta_end) of a schedule that has them."""
        return self.betas or _BETAS[self.schedule]

    @property
    def words(self) -> str:
        """The process in words: "predicts epsilon; linear betas from 0.0001 to 0.02"."""
        return f"predicts {self.prediction}; {self.schedule_words}"

    @property
    def schedule_words(self) -> str:
        """The schedule in words: "linear betas from 0.0001 to 0.02"."""
        if self.flow:
            return "flow matching on the linear path"
        if self.schedule is NoiseSchedule.COSINE:
            return "cosine betas"
        first, last = self.beta_range
        kind = "VP-SDE with beta" if self.schedule is NoiseSchedule.VP_SDE else f"{self.schedule} betas"
        return f"{kind} from {first:g} to {last:g}"

    def training_betas(self) -> np.ndarray:
        """The betas of the 1000 training steps, [1000], of a discrete schedule."""
        if self.schedule is NoiseSchedule.COSINE:
            edges = np.arange(TRAIN_STEPS + 1) / TRAIN_STEPS
            remaining = np.cos((edges + 0.008) / 1.008 * np.pi / 2) ** 2
            return np.minimum(1 - remaining[1:] / remaining[:-1], 0.999)
        first, last = self.beta_range
        if self.schedule is NoiseSchedule.SCALED_LINEAR:
            return np.linspace(first**0.5, last**0.5, TRAIN_STEPS) ** 2
        assert self.schedule is NoiseSchedule.LINEAR, self.schedule
        return np.linspace(first, last, TRAIN_STEPS)

    def alphas_cumprod(self, times: np.ndarray) -> np.ndarray:
        """alpha(t)^2 at the model's own `times`, of a schedule with alpha^2 + sigma^2 = 1."""
        if self.discrete:
            return np.cumprod(1 - self.training_betas())[times.astype(np.int64)]
        first, last = self.beta_range
        s = times / (TRAIN_STEPS - 1)
        return np.exp(-(first * s + (last - first) * s**2 / 2))

    def alpha_sigma(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """alpha and sigma at the model's own `times`."""
        if self.flow:
            return times.astype(np.float64), 1 - times
        squared = self.alphas_cumprod(times)
        return np.sqrt(squared), np.sqrt(1 - squared)

    def conversion(self, times: np.ndarray) -> Conversion:
        """How x_0 and eps follow from the latents and the model's output at the model's own `times`."""
        alpha, sigma = self.alpha_sigma(times)
        zero, one = np.zeros(len(times)), np.ones(len(times))
        if self.prediction is Prediction.VELOCITY:
            return Conversion(x0=(one, sigma), eps=(one, -alpha))
        if self.prediction is Prediction.EPSILON:
            squared = self.alphas_cumprod(times)
            return Conversion(x0=(np.sqrt(1 / squared), -np.sqrt(1 / squared - 1)), eps=(zero, one))
        if self.prediction is Prediction.X0:
            return Conversion(x0=(zero, one), eps=(1 / sigma, -alpha / sigma))
        return Conversion(x0=(alpha, -sigma), eps=(sigma, alpha))
