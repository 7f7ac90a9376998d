"""Betas, respacing and the posterior, against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dydit.diffusion.schedule import TRAIN_STEPS, Schedule, linear_betas, respaced_timesteps
from dydit.errors import ConfigError

LAW = settings(max_examples=25, deadline=None)


def test_betas_closed_form():
    betas = linear_betas()
    assert betas.shape == (1000,) and betas.dtype == np.float64
    expected = [1e-4 + i * (0.02 - 1e-4) / 999 for i in range(1000)]
    np.testing.assert_allclose(betas, expected, rtol=1e-14)


def test_signal_and_noise_at_the_ends():
    training = Schedule.training()
    assert training.steps == TRAIN_STEPS
    assert training.alphas_cumprod[0] == pytest.approx(1 - 1e-4, rel=1e-14)
    # The well-known end of the linear schedule: almost pure noise.
    assert training.alphas_cumprod[-1] == pytest.approx(4.0358e-5, rel=1e-4)
    logs = math.fsum(math.log1p(-b) for b in training.betas)
    assert math.log(training.alphas_cumprod[-1]) == pytest.approx(logs, rel=1e-12)


def test_every_count_follows_the_formula():
    for count in range(2, TRAIN_STEPS + 1):
        timesteps = respaced_timesteps(count)
        # In whole numbers: |t - i*999/(count-1)| <= 1/2. A half may round either way; all else is the nearest integer.
        error = timesteps * (count - 1) - np.arange(count) * 999
        assert (2 * np.abs(error) <= count - 1).all(), count
        assert (np.diff(timesteps) > 0).all(), count
        assert (timesteps[0], timesteps[-1]) == (0, 999)
        assert timesteps.dtype == np.int64 and len(timesteps) == count


def test_known_respacings():
    assert respaced_timesteps(1).tolist() == [0]
    assert respaced_timesteps(2).tolist() == [0, 999]
    assert respaced_timesteps(4).tolist() == [0, 333, 666, 999]
    assert respaced_timesteps(1000).tolist() == list(range(1000))
    quarter = respaced_timesteps(250)
    assert quarter[:6].tolist() == [0, 4, 8, 12, 16, 20] and quarter[-4:].tolist() == [987, 991, 995, 999]
    # Rounding happens once, at the end: the 125th lands on 125 * 999/249 = 501.506, not on 125 * 4 = 500.
    assert quarter[125] == 502


@pytest.mark.parametrize("count", [-1, 0, 1001])
def test_counts_outside_the_range_are_refused(count):
    with pytest.raises(ConfigError, match=f"sampling steps {count} is outside 1..1000"):
        respaced_timesteps(count)


@LAW
@given(st.integers(1, 1000))
def test_respacing_keeps_the_marginals(count):
    full, short = Schedule.training(), Schedule.respaced(count)
    np.testing.assert_array_equal(short.timesteps, respaced_timesteps(count))
    np.testing.assert_allclose(short.alphas_cumprod, full.alphas_cumprod[short.timesteps], rtol=1e-12)
    assert ((short.betas > 0) & (short.betas < 1)).all()
    assert short.steps == count


def test_all_steps_is_the_training_process():
    np.testing.assert_allclose(Schedule.respaced(1000).betas, linear_betas(), rtol=1e-11)


@LAW
@given(st.integers(2, 1000), st.data())
def test_posterior_is_bayes_rule(count, data):
    """q(x_{t-1} | x_t, x_0) from the product of two Gaussians, with nothing but their precisions."""
    schedule = Schedule.respaced(count)
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
    schedule = Schedule.respaced(count)
    low, high = schedule.log_variance_range
    assert np.isfinite(low).all() and np.isfinite(high).all()
    np.testing.assert_allclose(high, np.log(schedule.betas))
    np.testing.assert_allclose(low[1:], np.log(schedule.posterior_variance[1:]))
    assert schedule.posterior_variance[0] == 0
    if count > 1:
        assert low[0] == low[1]
        assert (low[1:] < high[1:]).all()


def test_first_step_posterior_is_x0():
    of_x0, of_xt = Schedule.respaced(50).posterior_mean_coefficients
    assert of_x0[0] == pytest.approx(1, abs=1e-12) and of_xt[0] == 0
