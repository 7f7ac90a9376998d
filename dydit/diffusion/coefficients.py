"""The coefficients of the samplers. All samplers share one formula, so that one compiled graph serves DDPM and DDIM.

    x_prev = c_x * x + c_eps * eps + c_noise * exp(slope * v + offset) * noise

`eps` is the (guided) noise prediction, `v` the raw variance output of the model (0 if it does not learn its variance).
A step is a row of five numbers (c_x, c_eps, c_noise, slope, offset). `dydit.diffusion.sampler_step` applies a row in
PyTorch.
"""

from __future__ import annotations

import numpy as np

from dydit.diffusion.schedule import Sampler, Schedule

COEFFICIENTS = ("x", "eps", "noise", "log_std_slope", "log_std_offset")


def step_coefficients(schedule: Schedule, sampler: Sampler, learn_sigma: bool = True) -> np.ndarray:
    """Coefficients of all steps in execution order (largest t first), [S, 5] float64.

    DDPM: x_0 = x/sqrt(a) - sqrt(1/a - 1) eps in the posterior mean m_0 x_0 + m_x x (Ho et al. 2020, eqs. 7, 15); log
    variance = frac*max + (1-frac)*min with frac = (v+1)/2 (Nichol & Dhariwal 2021, eq. 15), and half of it for the
    standard deviation: slope = (max-min)/4, offset = (max+min)/4. Without learned variance it is that of the posterior.
    The last step adds no noise.

    DDIM, eta = 0: x_prev = sqrt(a') x_0 + sqrt(1 - a') eps (Song et al. 2021, eq. 12).
    """
    a, previous = schedule.alphas_cumprod, schedule.alphas_cumprod_prev
    x0_of_x, x0_of_eps = np.sqrt(1 / a), -np.sqrt(1 / a - 1)
    out = np.zeros((schedule.steps, len(COEFFICIENTS)))
    if sampler is Sampler.DDIM:
        out[:, 0] = np.sqrt(previous) * x0_of_x
        out[:, 1] = np.sqrt(previous) * x0_of_eps + np.sqrt(1 - previous)
    else:
        of_x0, of_xt = schedule.posterior_mean_coefficients
        low, high = schedule.log_variance_range
        out[:, 0] = of_x0 * x0_of_x + of_xt
        out[:, 1] = of_x0 * x0_of_eps
        out[1:, 2] = 1
        if learn_sigma:
            out[:, 3], out[:, 4] = (high - low) / 4, (high + low) / 4
        else:
            out[:, 4] = low / 2
    return out[::-1].copy()
