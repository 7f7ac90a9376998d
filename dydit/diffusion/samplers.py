"""The samplers, and the times that each of them visits. NumPy, float64.

Steps are executed from the noisy end: execution index 0 starts from pure noise, and the last one returns the sample.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

import numpy as np
from pydantic import Field, FiniteFloat

from dydit.diffusion.process import TRAIN_STEPS, NoiseSchedule, Process
from dydit.errors import ConfigError
from dydit.validation import Strict

DEFAULT_STEPS = 250
_MEAN_STEP = 0.04  # the last step of Euler-Maruyama for a flow, in its time (the default of SiT)
_VP_END = 1e-3  # the last time that Euler-Maruyama visits, of 0 .. 1 (U-ViT)


class Sampler(StrEnum):
    """How a step computes the next latents from the output of the model."""

    DDPM = "ddpm"  # ancestral sampling (Ho et al. 2020), with the learned variance if the model has one
    DDIM = "ddim"  # Song et al. 2021; deterministic with eta = 0
    DPM_SOLVER = "dpm-solver++"  # DPM-Solver++(2M) (Lu et al. 2022): second order, for 10 to 50 steps
    EULER = "euler"  # Euler's method for the ODE of a flow
    EULER_MARUYAMA = "euler-maruyama"  # Euler's method for the SDE of a flow (SiT) or of continuous time (U-ViT)


class Spacing(StrEnum):
    """Which of the training timesteps a run visits (Lin et al. 2023, table 2), as diffusers computes them."""

    LINSPACE = "linspace"  # from the noisiest to the last, evenly
    LEADING = "leading"  # multiples of a whole number, from 0
    TRAILING = "trailing"  # evenly, from the noisiest


class SamplerConfig(Strict):
    """A sampler and its settings. `spacing` None: the usual one of the sampler. `eta`: of DDIM, 0 to 1.

    Raises `ConfigError` in `times` and `dydit.diffusion.coefficients.sampling_run` where a sampler cannot sample a
    process.
    """

    sampler: Sampler = Sampler.DDPM
    steps: int = Field(default=DEFAULT_STEPS, ge=1, le=TRAIN_STEPS)
    spacing: Spacing | None = None
    eta: FiniteFloat = Field(default=0.0, ge=0, le=1)

    def times(self, process: Process) -> np.ndarray:
        """The model's own times that a run visits, in the order of execution, float64 [steps]."""
        require_sampler(self, process)
        if process.flow:
            return self._flow_times()
        if not process.discrete:
            return (TRAIN_STEPS - 1) * np.linspace(1, _VP_END, self.steps)
        times = _DISCRETE[self.spacing or Spacing.LINSPACE](self.steps, self.sampler is Sampler.DPM_SOLVER)
        if self.steps > 1 and times[0] == times[-1]:
            raise ConfigError(
                f"{self.steps} steps with timestep spacing {self.spacing} visit one timestep only; use fewer steps"
            )
        return times.astype(np.float64)

    @property
    def words(self) -> str:
        """The settings in words: "20 steps of dpm-solver++, spacing trailing"."""
        steps = f"{self.steps} step{'s' if self.steps != 1 else ''} of {self.sampler}"
        spacing = f", spacing {self.spacing}" if self.spacing else ""
        return steps + spacing + (f", eta {self.eta:g}" if self.eta else "")

    def _flow_times(self) -> np.ndarray:
        """1 - sigma of every step. The image is at time 1, where no step starts."""
        if self.sampler is Sampler.EULER_MARUYAMA:
            return np.linspace(0, 1 - mean_step(self.steps), self.steps)
        if self.spacing is Spacing.LINSPACE:  # as the schedulers of diffusers do by default
            first, last = 1.0, 1 / TRAIN_STEPS
            if self.sampler is Sampler.DPM_SOLVER:
                return np.linspace(last, 1, self.steps + 1)[:-1]
            return 1 - np.linspace(first, last, self.steps)
        return np.arange(self.steps) / self.steps


class SamplerChoice(Strict):
    """What to change of a run's settings (`SamplerConfig`); None changes nothing."""

    steps: int | None = Field(default=None, ge=1, le=TRAIN_STEPS)
    sampler: Sampler | None = None
    spacing: Spacing | None = None
    eta: FiniteFloat | None = Field(default=None, ge=0, le=1)

    def over(self, own: SamplerConfig) -> SamplerConfig:
        """The settings `own` with the changes. Another sampler starts from its own spacing and without eta."""
        if self.sampler not in (None, own.sampler):
            own = SamplerConfig(steps=own.steps)
        return own.model_copy(update={name: value for name, value in self if value is not None})


def mean_step(steps: int) -> float:
    """The length of the last step of Euler-Maruyama for a flow, which adds no noise; a single step goes all the way."""
    return _MEAN_STEP if steps > 1 else 1.0


def default_sampler(process: Process) -> Sampler:
    """The sampler with which models of this process are published."""
    return Sampler.DDPM if process.discrete else Sampler.EULER_MARUYAMA


def require_sampler(config: SamplerConfig, process: Process) -> None:
    """Raise `ConfigError` if a sampler or one of its settings does not exist for a process."""
    sampler, spacing = config.sampler, config.spacing
    fit: tuple[Sampler, ...]
    if process.flow:
        fit = (Sampler.EULER, Sampler.EULER_MARUYAMA, Sampler.DPM_SOLVER)
    elif process.discrete:
        fit = (Sampler.DDPM, Sampler.DDIM, Sampler.DPM_SOLVER)
    else:
        fit = (Sampler.EULER_MARUYAMA, Sampler.DDPM, Sampler.DDIM, Sampler.DPM_SOLVER)
    if sampler not in fit:
        raise ConfigError(
            f"sampler {sampler} does not fit this model, which {process.words}; use one of: {', '.join(fit)}"
        )
    if config.eta and sampler is not Sampler.DDIM:
        raise ConfigError(f"eta is a setting of sampler ddim; {sampler} has none")
    if spacing is not None and (process.schedule is NoiseSchedule.VP_SDE or sampler is Sampler.EULER_MARUYAMA):
        raise ConfigError("timestep spacing has no effect in continuous time; remove it")
    if spacing is Spacing.LEADING and process.flow:
        raise ConfigError("timestep spacing leading does not exist for a flow; use linspace or trailing")


def _linspace(steps: int, open_end: bool) -> np.ndarray:
    if open_end:  # one interval more, so that the last step ends where DDPM's would start
        return np.linspace(0, TRAIN_STEPS - 1, steps + 1).round()[:0:-1]
    return np.rint(np.arange(steps) * ((TRAIN_STEPS - 1) / max(1, steps - 1)))[::-1]


def _leading(steps: int, open_end: bool) -> np.ndarray:
    if open_end:
        return (np.arange(steps + 1) * (TRAIN_STEPS // (steps + 1)))[:0:-1]
    return (np.arange(steps) * (TRAIN_STEPS // steps))[::-1]


def _trailing(steps: int, open_end: bool) -> np.ndarray:
    return np.rint(np.arange(TRAIN_STEPS, 0, -TRAIN_STEPS / steps))[:steps] - 1


_DISCRETE: dict[Spacing, Callable[[int, bool], np.ndarray]] = {
    Spacing.LINSPACE: _linspace,
    Spacing.LEADING: _leading,
    Spacing.TRAILING: _trailing,
}
