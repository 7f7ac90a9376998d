"""The posterior of a process at the timesteps that a run visits, against its definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dydit.diffusion.process import TRAIN_STEPS, NoiseSchedule, Process
from dydit.diffusion.samplers import SamplerConfig
from dydit.diffusion.schedule import Schedule

LAW = settings(max_examples=25, deadline=None)
DISCRETE = [NoiseSchedule.LINEAR, NoiseSchedule.SCALED_LINEAR, NoiseSchedule.COSINE]


def visited(count: int) -> np.ndarray:
    """The timesteps of a run of DDPM, ascending."""
    return SamplerConfig(steps=count).times(Process())[::-1]


def respaced(count: int, schedule: NoiseSchedule = NoiseSchedule.LINEAR) -> Schedule:
    return Schedule.visiting(Process(schedule=schedule), visited(count))


def test_signal_and_noise_at_the_ends():
    training = Schedule.training(Process())
    assert training.steps == TRAIN_STEPS
    assert training.alphas_cumprod[0] == pytest.approx(1 - 1e-4, rel=1e-14)
    # The well-known end of the linear schedule: almost pure noise.
    assert training.alphas_cumprod[-1] == pytest.approx(4.0358e-5, rel=1e-4)
    logs = math.fsum(math.log1p(-b) for b in training.betas)
    assert math.log(training.alphas_cumprod[-1]) == pytest.approx(logs, rel=1e-12)


@LAW
@given(st.integers(1, 1000), st.sampled_from(DISCRETE))
def test_respacing_keeps_the_marginals(count, schedule):
    full, short = Schedule.training(Process(schedule=schedule)), respaced(count, schedule)
    marginals = full.alphas_cumprod[visited(count).astype(int)]
    # A beta is 1 minus a number: 1e-16 of 1, which shows beside the last alpha-bar of the cosine schedule, 2e-9.
    lost = 1e-15 if schedule is NoiseSchedule.COSINE else 0
    np.testing.assert_allclose(short.alphas_cumprod, marginals, rtol=1e-12, atol=lost)
    assert ((short.betas > 0) & (short.betas < 1)).all()
    assert short.steps == count


@pytest.mark.parametrize("schedule", DISCRETE)
def test_all_steps_is_the_training_process(schedule):
    betas = Process(schedule=schedule).training_betas()
    np.testing.assert_allclose(respaced(1000, schedule).betas, betas, rtol=1e-11, atol=1e-15)


def test_continuous_time_has_a_posterior_between_any_times():
    times = SamplerConfig(steps=30).times(Process(schedule="vp-sde"))[::-1]
    schedule = Schedule.visiting(Process(schedule="vp-sde"), times)
    s = times / 999
    np.testing.assert_allclose(schedule.alphas_cumprod, np.exp(-0.1 * s - 19.9 * s**2 / 2), rtol=1e-12)
    assert ((schedule.betas > 0) & (schedule.betas < 1)).all()


@LAW
@given(st.integers(2, 1000), st.data())
def test_posterior_is_bayes_rule(count, data):
    """q(x_{t-1} | x_t, x_0) from the product of two Gaussians, with nothing but their precisions."""
    schedule = respaced(count)
    t = data.draw(st.integers(1, count - 1))
    beta, before = schedule.betas[t], schedule.alphas_cumprod_prev[t]
    x0, xt = data.draw(st.floats(-3, 3)), data.draw(st.floats(-3, 3))
    # Prior N(sqrt(before) x0, 1 - before); likelihood of x_t given x_{t-1}: N(sqrt(1 - beta) x_{t-1}, beta).
    precision = 1 / (1 - before) + (1 - beta) / beta
    mean = (math.sqrt(before) * x0 / (1 - before) + math.sqrt(1 - beta) * xt / beta) / precision
    of_x0, of_xt = schedule.posterior_mean_coefficients
    assert of_x0[t] * x0 + of_xt[t] * xt == pytest.approx(mean, rel=1e-9, abs=1e-12)
    assert schedule.posterior_variance[t] == pytest.approx(1 / precision, rel=1e-9)


@pytest.mark.parametrize("count", [1, 2, 50, 1000])
def test_log_variance_range(count):
    schedule = respaced(count)
    low, high = schedule.log_variance_range
    assert np.isfinite(low).all() and np.isfinite(high).all()
    np.testing.assert_allclose(high, np.log(schedule.betas))
    np.testing.assert_allclose(low[1:], np.log(schedule.posterior_variance[1:]))
    assert schedule.posterior_variance[0] == 0
    if count > 1:
        assert low[0] == low[1]
        assert (low[1:] < high[1:]).all()


def test_first_step_posterior_is_x0():
    of_x0, of_xt = respaced(50).posterior_mean_coefficients
    assert of_x0[0] == pytest.approx(1, abs=1e-12) and of_xt[0] == 0
