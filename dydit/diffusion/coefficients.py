"""The coefficients of the samplers. All samplers share one linear formula, so that one compiled graph serves them all.

    x_prev       = c_x * x + c_out * out + c_history * history + c_noise * exp(slope * v + offset) * noise
    next_history = d_x * x + d_out * out

`out` is the (guided) output of the model, `v` its raw variance (0 if it does not learn one), and `history` what the
step before left for this one: of a multistep solver, its estimate of x_0. A step is a row of these eight numbers, in
this order. `dydit.diffusion.sampler_step` applies a row in PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dydit.diffusion.process import TRAIN_STEPS, Process
from dydit.diffusion.samplers import Sampler, SamplerConfig, mean_step
from dydit.diffusion.schedule import Schedule

COEFFICIENTS = ("x", "out", "history", "noise", "log_std_slope", "log_std_offset", "history_of_x", "history_of_out")
NOISE, HISTORY = COEFFICIENTS.index("noise"), COEFFICIENTS.index("history")


@dataclass(frozen=True)
class SamplingRun:
    """The steps of a run in the order of execution: the model's own `times`, float32 [S], and rows float64 [S, 8]."""

    times: np.ndarray
    coefficients: np.ndarray


def sampling_run(process: Process, config: SamplerConfig, learn_sigma: bool) -> SamplingRun:
    """Times and coefficients of a run. Raises `ConfigError` where the sampler cannot sample the process."""
    times = config.times(process)
    return SamplingRun(times.astype(np.float32), step_coefficients(process, config, times, learn_sigma))


def step_coefficients(process: Process, config: SamplerConfig, times: np.ndarray, learn_sigma: bool) -> np.ndarray:
    """The rows of a run that visits the model's own `times`, [S, 8] float64."""
    if config.sampler is Sampler.DDPM:
        update = _ddpm(process, times, learn_sigma)
    elif config.sampler is Sampler.DPM_SOLVER:
        update = _dpm_solver(process, times)
    elif config.sampler is Sampler.EULER_MARUYAMA:
        update = _flow_sde(times) if process.flow else _vp_sde(process, times)
    else:
        update = _ddim(process, times, config.eta)
    conversion = process.conversion(times)
    rows = np.zeros((len(times), len(COEFFICIENTS)))
    for column, of_x0, of_eps in zip((0, 1), conversion.x0, conversion.eps, strict=True):
        rows[:, column] = update.x0 * of_x0 + update.eps * of_eps
    rows[:, 0] += update.x
    rows[:, HISTORY], rows[:, NOISE] = update.history, update.noise
    rows[:, 4], rows[:, 5] = update.log_std_slope, update.log_std_offset
    if update.remembers:
        rows[:, 6], rows[:, 7] = conversion.x0
    return rows


@dataclass(frozen=True)
class _Update:
    """x_prev = x * x_t + x0 * x_0 + eps * eps + history * history + noise * exp(slope * v + offset) * noise.

    Each is a number or float64 [S]. `remembers`: whether the next step gets x_0 as its history.
    """

    x: np.ndarray | float = 0
    x0: np.ndarray | float = 0
    eps: np.ndarray | float = 0
    history: np.ndarray | float = 0
    noise: np.ndarray | float = 0
    log_std_slope: np.ndarray | float = 0
    log_std_offset: np.ndarray | float = 0
    remembers: bool = False


def _ddpm(process: Process, times: np.ndarray, learn_sigma: bool) -> _Update:
    """The posterior mean m_0 x_0 + m_x x (Ho et al. 2020, eqs. 7, 15), and noise in all steps but the last.

    log variance = share*max + (1-share)*min with share = (v+1)/2 (Nichol & Dhariwal 2021, eq. 15), and half of it for
    the standard deviation: slope = (max-min)/4, offset = (max+min)/4. Without learned variance it is the posterior's.
    """
    schedule = Schedule.visiting(process, times[::-1])
    of_x0, of_xt = schedule.posterior_mean_coefficients
    low, high = schedule.log_variance_range
    noise = np.ones(len(times))
    noise[-1] = 0
    learned = (high - low) / 4, (high + low) / 4
    slope, offset = learned if learn_sigma else (np.zeros_like(low), low / 2)
    return _Update(x=of_xt[::-1], x0=of_x0[::-1], noise=noise, log_std_slope=slope[::-1], log_std_offset=offset[::-1])


def _ddim(process: Process, times: np.ndarray, eta: float) -> _Update:
    """x_prev = alpha' x_0 + sqrt(sigma'^2 - std^2) eps + std noise, with ' at the next time (Song et al. 2021, eq. 12).

    For a flow and eta = 0 this is Euler's method: x + (t' - t) (x_0 - eps).
    """
    alpha, sigma = process.alpha_sigma(times)
    after, remaining = _following(alpha, 1.0), _following(sigma, 0.0)
    if not eta:
        return _Update(x0=after, eps=remaining)
    std = eta * remaining / sigma * np.sqrt(np.maximum(0, 1 - (alpha / after) ** 2))
    return _Update(x0=after, eps=np.sqrt(np.maximum(0, remaining**2 - std**2)), noise=std)


def _dpm_solver(process: Process, times: np.ndarray) -> _Update:
    """DPM-Solver++(2M), midpoint form (Lu et al. 2022, algorithm 2).

    With lambda = log(alpha/sigma) and h = lambda' - lambda:

        x_prev = sigma'/sigma x + (alpha' - sigma' alpha/sigma) D,   D = x_0 + (x_0 - history) h / (2 h_before)

    The first step, which has no history, and the last, which ends without noise, are of first order: D = x_0. So is a
    step from, or after, a time that is visited twice.
    """
    alpha, sigma = process.alpha_sigma(times)
    after, remaining = _following(alpha, 1.0), _following(sigma, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        lengths = np.diff(np.log(alpha) - np.log(sigma))  # h of all steps but the last
        half_ratio = lengths[1:] / lengths[:-1] / 2  # of the steps between the first and the last
    half_ratio[~np.isfinite(half_ratio)] = 0
    correction = np.concatenate([[0.0], half_ratio, [0.0]])[-len(times) :]
    of_estimate = after - remaining * alpha / sigma
    return _Update(
        x=remaining / sigma, x0=of_estimate * (1 + correction), history=-of_estimate * correction, remembers=True
    )


def _flow_sde(times: np.ndarray) -> _Update:
    """x_prev = x + (v + w score) dt + sqrt(2 w dt) noise with w = sigma, so w score = -eps (Ma et al. 2024, eq. 4).

    The velocity v is x_0 - eps. The last step, of `mean_step`, adds no noise.
    """
    dt = np.append(np.diff(times), mean_step(len(times)))
    noise = np.sqrt(2 * (1 - times) * dt)
    noise[-1] = 0
    return _Update(x=1, x0=dt, eps=-2 * dt, noise=noise)


def _vp_sde(process: Process, times: np.ndarray) -> _Update:
    """x_prev = x + (beta/2 x - beta eps/sigma) ds + sqrt(beta ds) noise; the last step adds no noise.

    The reverse SDE of Song et al. 2021, eq. 6, for the VP-SDE; its score is -eps/sigma. s = times/999, and the last
    step ends at 0.
    """
    first, last = process.beta_range
    s = times / (TRAIN_STEPS - 1)
    beta, ds = first + (last - first) * s, s - _following(s, 0.0)
    noise = np.sqrt(beta * ds)
    noise[-1] = 0
    return _Update(x=1 + beta / 2 * ds, eps=-beta * ds / process.alpha_sigma(times)[1], noise=noise)


def _following(values: np.ndarray, final: float) -> np.ndarray:
    """The value after each step: that at the next step's time, and `final` after the last step."""
    return np.append(values[1:], final)
