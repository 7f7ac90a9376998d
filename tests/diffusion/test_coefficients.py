"""The rows of coefficients, applied by `sampler_step`, are DDPM's and DDIM's textbook steps."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dydit.diffusion.coefficients import COEFFICIENTS, step_coefficients
from dydit.diffusion.sampler_step import sampler_step
from dydit.diffusion.schedule import TRAIN_STEPS, Sampler, Schedule

LAW = settings(max_examples=25, deadline=None)
COUNTS = [2, 7, 50, 250, 1000]


class Textbook:
    """A respaced process worked out from the training betas alone, step by step, in scalars."""

    def __init__(self, count: int):
        product, kept = 1.0, []
        wanted = {round(i * 999 / (count - 1)) for i in range(count)}
        for t in range(TRAIN_STEPS):
            product *= 1 - (1e-4 + t * (0.02 - 1e-4) / 999)
            if t in wanted:
                kept.append(product)
        self.a = kept  # alpha-bar of each visited step, ascending

    def before(self, t: int) -> float:
        return self.a[t - 1] if t else 1.0

    def beta(self, t: int) -> float:
        return 1 - self.a[t] / self.before(t)

    def x0(self, t: int, x: np.ndarray, eps: np.ndarray) -> np.ndarray:
        return (x - math.sqrt(1 - self.a[t]) * eps) / math.sqrt(self.a[t])

    def variance(self, t: int) -> float:
        return self.beta(t) * (1 - self.before(t)) / (1 - self.a[t])

    def ddpm(self, t, x, eps, v, noise, learned=True):
        a, before, beta, x0 = self.a[t], self.before(t), self.beta(t), self.x0(t, x, eps)
        mean = math.sqrt(before) * beta / (1 - a) * x0 + math.sqrt(1 - beta) * (1 - before) / (1 - a) * x
        low, high = math.log(self.variance(max(t, 1))), math.log(beta)
        share = (v + 1) / 2
        log_variance = share * high + (1 - share) * low if learned else low
        return mean + (t > 0) * np.exp(log_variance / 2) * noise

    def ddim(self, t, x, eps):
        return math.sqrt(self.before(t)) * self.x0(t, x, eps) + math.sqrt(1 - self.before(t)) * eps


def apply_step(row: np.ndarray, x: np.ndarray, eps: np.ndarray, v: np.ndarray | float, noise: np.ndarray) -> np.ndarray:
    """`sampler_step` on arrays of any one shape."""
    shape, variance = x.shape, np.broadcast_to(v, x.shape)
    x, eps, variance, noise = (torch.tensor(each).reshape(-1, 1, 1, 1) for each in (x, eps, variance, noise))
    return sampler_step(x, torch.cat([eps, variance], 1), noise, torch.tensor(row), 1.0, 0).numpy().reshape(shape)


def arrays(seed: int, shape: tuple[int, ...] = (2, 3)) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape) for _ in range(3)] + [rng.uniform(-1, 1, shape)]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("learned", [True, False])
def test_ddpm_is_the_textbook_step(count, learned):
    book = Textbook(count)
    table = step_coefficients(Schedule.respaced(count), Sampler.DDPM, learned)
    assert table.shape == (count, len(COEFFICIENTS)) and table.dtype == np.float64
    x, eps, noise, v = arrays(count)
    for t in {0, 1, count // 2, count - 1}:
        expected = book.ddpm(t, x, eps, v, noise, learned)
        actual = apply_step(table[count - 1 - t], x, eps, v if learned else 0.0, noise)
        np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("count", COUNTS)
def test_ddim_is_the_textbook_step(count):
    book = Textbook(count)
    table = step_coefficients(Schedule.respaced(count), Sampler.DDIM)
    x, eps, noise, v = arrays(count)
    for t in {0, 1, count // 2, count - 1}:
        actual = apply_step(table[count - 1 - t], x, eps, v, noise)
        # x is divided by sqrt(alpha-bar), 160 at the noisy end, and the parts cancel: 1e-12 of what is subtracted.
        np.testing.assert_allclose(actual, book.ddim(t, x, eps), rtol=1e-12, atol=2e-12)
    assert not table[:, 2].any(), "no noise: eta is 0"


@LAW
@given(st.integers(1, 60), st.integers(0, 2**32 - 1))
def test_ddim_with_a_perfect_model_recovers_x0(count, seed):
    """A model that answers with the very noise in x_t leads back to x_0, whatever the number of steps."""
    schedule = Schedule.respaced(count)
    x0, eps, noise, v = arrays(seed)
    a = schedule.alphas_cumprod
    x = math.sqrt(a[-1]) * x0 + math.sqrt(1 - a[-1]) * eps
    for step, row in enumerate(step_coefficients(schedule, Sampler.DDIM)):
        known = (x - math.sqrt(a[count - 1 - step]) * x0) / math.sqrt(1 - a[count - 1 - step])
        np.testing.assert_allclose(known, eps, atol=1e-9)
        x = apply_step(row, x, known, v, noise)
    np.testing.assert_allclose(x, x0, atol=1e-10)


def test_ddpm_with_a_perfect_model_ends_at_x0():
    schedule = Schedule.respaced(50)
    rng = np.random.default_rng(3)
    x0, x = rng.normal(size=(2, 8))
    for step, row in enumerate(step_coefficients(schedule, Sampler.DDPM)):
        a = schedule.alphas_cumprod[49 - step]
        x = apply_step(row, x, (x - math.sqrt(a) * x0) / math.sqrt(1 - a), 0.3, rng.normal(size=8))
    np.testing.assert_allclose(x, x0, atol=1e-12)


def test_ddpm_keeps_the_marginal_variance():
    """Standard normal data: the best model is eps = sqrt(1-a) x, and every marginal stays standard normal."""
    schedule = Schedule.respaced(250)
    variance = 1.0
    for step, row in enumerate(step_coefficients(schedule, Sampler.DDPM)):
        t = 249 - step
        optimal = math.sqrt(1 - schedule.alphas_cumprod[t])
        # v = +1 is the upper bound beta, the right variance for standard normal data (Ho et al. 2020, section 3.2).
        deviation = row[2] * math.exp(row[3] + row[4])
        variance = (row[0] + row[1] * optimal) ** 2 * variance + deviation**2
        assert variance == pytest.approx(1, abs=1e-9) if t else variance < 1


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("count", [1, 2, 250])
def test_last_step_adds_no_noise_and_all_others_do(count, learned):
    table = step_coefficients(Schedule.respaced(count), Sampler.DDPM, learned)
    assert table[-1, 2] == 0
    assert (table[:-1, 2] == 1).all()
    x, eps, noise, v = arrays(0)
    quiet = apply_step(table[-1], x, eps, v, noise)
    np.testing.assert_array_equal(quiet, apply_step(table[-1], x, eps, v, 100 * noise))


@pytest.mark.parametrize("sampler", list(Sampler))
@pytest.mark.parametrize("learned", [True, False])
def test_one_step_run_is_the_prediction_of_x0(sampler, learned):
    (row,) = step_coefficients(Schedule.respaced(1), sampler, learned)
    assert np.isfinite(row).all()
    x, eps, noise, v = arrays(5)
    expected = (x - math.sqrt(1e-4) * eps) / math.sqrt(1 - 1e-4)
    np.testing.assert_allclose(apply_step(row, x, eps, v, noise), expected, rtol=1e-10)


def test_coefficients_are_finite_in_float32():
    """The graph takes them in fp32; nothing may overflow or vanish there."""
    for sampler in Sampler:
        for count in (1, 2, 250, 1000):
            table = step_coefficients(Schedule.respaced(count), sampler)
            single = table.astype(np.float32)
            assert np.isfinite(single).all()
            np.testing.assert_allclose(single, table, rtol=1e-7)


def test_learned_range_spans_both_bounds():
    schedule = Schedule.respaced(250)
    low, high = (values[::-1] for values in schedule.log_variance_range)
    rows = step_coefficients(schedule, Sampler.DDPM)
    np.testing.assert_allclose(2 * (rows[:, 4] - rows[:, 3]), low, rtol=1e-12)
    np.testing.assert_allclose(2 * (rows[:, 4] + rows[:, 3]), high, rtol=1e-12)
