"""The rows of coefficients, applied by `sampler_step`, are the textbook steps of the samplers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dydit.diffusion.coefficients import COEFFICIENTS, HISTORY, NOISE, sampling_run
from dydit.diffusion.process import TRAIN_STEPS, NoiseSchedule, Prediction, Process
from dydit.diffusion.sampler_step import sampler_step
from dydit.diffusion.samplers import Sampler, SamplerConfig
from dydit.diffusion.schedule import Schedule
from dydit.errors import ConfigError

LAW = settings(max_examples=25, deadline=None)
COUNTS = [2, 7, 50, 250, 1000]
OF_DIT = (Sampler.DDPM, Sampler.DDIM, Sampler.DPM_SOLVER)
SLOPE, OFFSET, NEXT_OF_X = (COEFFICIENTS.index(name) for name in ("log_std_slope", "log_std_offset", "history_of_x"))
PROCESSES = [
    *(Process(schedule=each) for each in NoiseSchedule if each is not NoiseSchedule.FLOW),
    *(Process(schedule="scaled-linear", prediction=each) for each in (Prediction.X0, Prediction.V)),
    Process(schedule="vp-sde", prediction="x0"),
    Process(schedule="flow", prediction="velocity"),
]


def table_of(count: int, sampler: Sampler, learned: bool = True, process: Process | None = None, **options):
    """The rows of a run, [S, 8] float64."""
    config = SamplerConfig(sampler=sampler, steps=count, **options)
    return sampling_run(process or Process(), config, learned).coefficients


def schedule_of(count: int) -> Schedule:
    """The process at the steps that DDPM and DDIM visit."""
    return Schedule.visiting(Process(), SamplerConfig(steps=count).times(Process())[::-1])


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


def full_step(
    row: np.ndarray, x: np.ndarray, out: np.ndarray, v: np.ndarray | float, noise: np.ndarray, history: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`sampler_step` on arrays of any one shape: x_prev and next_history."""
    shape, each = x.shape, (x, history, out, np.broadcast_to(v, x.shape), noise)
    x, history, out, variance, noise = (torch.tensor(one).reshape(-1, 1, 1, 1) for one in each)
    state = sampler_step(x, history, torch.cat([out, variance], 1), noise, torch.tensor(row), 1.0, 0)
    return tuple(one.numpy().reshape(shape) for one in state)


def apply_step(row: np.ndarray, x: np.ndarray, eps: np.ndarray, v: np.ndarray | float, noise: np.ndarray) -> np.ndarray:
    """x_prev of a step whose history does not count: that of a single-step sampler, or the first of a run."""
    assert row[HISTORY] == 0
    return full_step(row, x, eps, v, noise, np.full(x.shape, 1e6))[0]


def arrays(seed: int, shape: tuple[int, ...] = (2, 3)) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape) for _ in range(3)] + [rng.uniform(-1, 1, shape)]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("learned", [True, False])
def test_ddpm_is_the_textbook_step(count, learned):
    book = Textbook(count)
    table = table_of(count, Sampler.DDPM, learned)
    assert table.shape == (count, len(COEFFICIENTS)) and table.dtype == np.float64
    x, eps, noise, v = arrays(count)
    for t in {0, 1, count // 2, count - 1}:
        expected = book.ddpm(t, x, eps, v, noise, learned)
        actual = apply_step(table[count - 1 - t], x, eps, v if learned else 0.0, noise)
        np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("count", COUNTS)
def test_ddim_is_the_textbook_step(count):
    book = Textbook(count)
    table = table_of(count, Sampler.DDIM)
    x, eps, noise, v = arrays(count)
    for t in {0, 1, count // 2, count - 1}:
        actual = apply_step(table[count - 1 - t], x, eps, v, noise)
        # x is divided by sqrt(alpha-bar), 160 at the noisy end, and the parts cancel: 1e-12 of what is subtracted.
        np.testing.assert_allclose(actual, book.ddim(t, x, eps), rtol=1e-12, atol=2e-12)
    assert not table[:, NOISE].any(), "no noise: eta is 0"


@LAW
@given(st.integers(1, 60), st.integers(0, 2**32 - 1))
def test_ddim_with_a_perfect_model_recovers_x0(count, seed):
    """A model that answers with the very noise in x_t leads back to x_0, whatever the number of steps."""
    schedule = schedule_of(count)
    x0, eps, noise, v = arrays(seed)
    a = schedule.alphas_cumprod
    x = math.sqrt(a[-1]) * x0 + math.sqrt(1 - a[-1]) * eps
    for step, row in enumerate(table_of(count, Sampler.DDIM)):
        known = (x - math.sqrt(a[count - 1 - step]) * x0) / math.sqrt(1 - a[count - 1 - step])
        np.testing.assert_allclose(known, eps, atol=1e-9)
        x = apply_step(row, x, known, v, noise)
    np.testing.assert_allclose(x, x0, atol=1e-10)


def test_ddpm_with_a_perfect_model_ends_at_x0():
    schedule = schedule_of(50)
    rng = np.random.default_rng(3)
    x0, x = rng.normal(size=(2, 8))
    for step, row in enumerate(table_of(50, Sampler.DDPM)):
        a = schedule.alphas_cumprod[49 - step]
        x = apply_step(row, x, (x - math.sqrt(a) * x0) / math.sqrt(1 - a), 0.3, rng.normal(size=8))
    np.testing.assert_allclose(x, x0, atol=1e-12)


def test_ddpm_keeps_the_marginal_variance():
    """Standard normal data: the best model is eps = sqrt(1-a) x, and every marginal stays standard normal."""
    schedule = schedule_of(250)
    variance = 1.0
    for step, row in enumerate(table_of(250, Sampler.DDPM)):
        t = 249 - step
        optimal = math.sqrt(1 - schedule.alphas_cumprod[t])
        # v = +1 is the upper bound beta, the right variance for standard normal data (Ho et al. 2020, section 3.2).
        deviation = row[NOISE] * math.exp(row[SLOPE] + row[OFFSET])
        variance = (row[0] + row[1] * optimal) ** 2 * variance + deviation**2
        assert variance == pytest.approx(1, abs=1e-9) if t else variance < 1


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("count", [1, 2, 250])
def test_last_step_adds_no_noise_and_all_others_do(count, learned):
    table = table_of(count, Sampler.DDPM, learned)
    assert table[-1, NOISE] == 0
    assert (table[:-1, NOISE] == 1).all()
    x, eps, noise, v = arrays(0)
    quiet = apply_step(table[-1], x, eps, v, noise)
    np.testing.assert_array_equal(quiet, apply_step(table[-1], x, eps, v, 100 * noise))


@pytest.mark.parametrize("sampler", OF_DIT)
@pytest.mark.parametrize("learned", [True, False])
def test_one_step_run_is_the_prediction_of_x0(sampler, learned):
    """At timestep 0; DPM-Solver++ starts from pure noise."""
    (row,) = table_of(1, sampler, learned)
    assert np.isfinite(row).all()
    x, eps, noise, v = arrays(5)
    a = math.prod(1 - beta for beta in Process().training_betas()) if sampler is Sampler.DPM_SOLVER else 1 - 1e-4
    expected = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
    np.testing.assert_allclose(apply_step(row, x, eps, v, noise), expected, rtol=1e-10)


def test_coefficients_are_finite_in_float32():
    """The graph takes them in fp32; nothing may overflow or vanish there."""
    for sampler, process in itertools.product(Sampler, PROCESSES):
        for count in (1, 2, 250, 999, 1000):
            try:
                table = table_of(count, sampler, process=process)
            except ConfigError:
                continue  # no sampler of this process
            single = table.astype(np.float32)
            assert np.isfinite(single).all()
            np.testing.assert_allclose(single, table, rtol=1e-7)


def test_learned_range_spans_both_bounds():
    schedule = schedule_of(250)
    low, high = (values[::-1] for values in schedule.log_variance_range)
    rows = table_of(250, Sampler.DDPM)
    np.testing.assert_allclose(2 * (rows[:, OFFSET] - rows[:, SLOPE]), low, rtol=1e-12)
    np.testing.assert_allclose(2 * (rows[:, OFFSET] + rows[:, SLOPE]), high, rtol=1e-12)


def output_of(process: Process, t: float, x: np.ndarray, x0: np.ndarray) -> np.ndarray:
    """What a model of this process answers, at time t, if it takes x_0 for the image in x."""
    (alpha,), (sigma,) = process.alpha_sigma(np.array([t]))
    eps = (x - alpha * x0) / sigma
    answers = {
        Prediction.EPSILON: eps,
        Prediction.X0: x0,
        Prediction.V: alpha * eps - sigma * x0,
        Prediction.VELOCITY: x0 - eps,
    }
    return answers[process.prediction]


def run_of(process: Process, sampler: Sampler, steps: int, estimate, x: np.ndarray, **options):
    """A run of a model that takes `estimate(t, x)` for the image: a list of (t, x, x_0, history, x_prev, after)."""
    run = sampling_run(process, SamplerConfig(sampler=sampler, steps=steps, **options), False)
    times = SamplerConfig(sampler=sampler, steps=steps, **options).times(process)
    seen, history = [], np.zeros_like(x)
    for t, row in zip(times, run.coefficients, strict=True):
        x0 = estimate(t, x)
        after = full_step(row, x, output_of(process, t, x, x0), 0.0, np.zeros_like(x), history)
        seen.append((t, x, x0, history, *after))
        x, history = after
    return seen


def levels_of(process: Process, times: list[float]) -> list[tuple[float, float]]:
    """(alpha, sigma) at the times of the steps and at the end."""
    return [*zip(*process.alpha_sigma(np.array(times)), strict=True), (1.0, 0.0)]


@pytest.mark.parametrize("process", PROCESSES, ids=lambda each: f"{each.schedule}-{each.prediction}")
@pytest.mark.parametrize("steps", [1, 2, 3, 9])
def test_dpm_solver_is_the_textbook_step(process, steps):
    """DPM-Solver++(2M) of Lu et al. 2022, algorithm 2, of first order in the first step and in the last."""
    seen = run_of(process, Sampler.DPM_SOLVER, steps, lambda t, x: np.tanh(x + t), arrays(steps)[0])
    levels = levels_of(process, [each[0] for each in seen])
    half_log_snr = [math.log(alpha / sigma) if alpha and sigma else math.inf * (alpha - 0.5) for alpha, sigma in levels]
    for step, (_, x, x0, history, x_prev, after) in enumerate(seen):
        (_, sigma), (alpha_after, sigma_after) = levels[step : step + 2]
        estimate = x0
        if 0 < step < steps - 1:
            ratio = (half_log_snr[step] - half_log_snr[step - 1]) / (half_log_snr[step + 1] - half_log_snr[step])
            estimate = (1 + 1 / (2 * ratio)) * x0 - 1 / (2 * ratio) * history
        h = half_log_snr[step + 1] - half_log_snr[step]
        expected = sigma_after / sigma * x - alpha_after * (math.exp(-h) - 1) * estimate
        np.testing.assert_allclose(x_prev, expected, rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(after, x0, rtol=1e-9, atol=1e-10)
        assert step == 0 or np.array_equal(history, seen[step - 1][5]), "the estimate of the step before"


@pytest.mark.parametrize(
    ("process", "eta"),
    [pair for pair in itertools.product(PROCESSES, (0.0, 0.5, 1.0)) if not (pair[0].flow and pair[1])],
    ids=lambda each: f"{each.schedule}-{each.prediction}" if isinstance(each, Process) else None,
)
def test_ddim_of_every_process_is_the_textbook_step(process, eta):
    """Song et al. 2021, eq. 12 and 16; for a flow it is called Euler's method and has no eta."""
    sampler, options = (Sampler.EULER, {}) if process.flow else (Sampler.DDIM, {"eta": eta})
    rows = table_of(7, sampler, process=process, **options)
    seen = run_of(process, sampler, 7, lambda t, x: np.tanh(x + t), arrays(1)[0], **options)
    levels = levels_of(process, [each[0] for each in seen])
    for step, (_, x, x0, _, x_prev, after) in enumerate(seen):
        (alpha, sigma), (alpha_after, sigma_after) = levels[step : step + 2]
        eps, std = (x - alpha * x0) / sigma, 0.0
        if eta:
            std = eta * math.sqrt(sigma_after**2 / sigma**2) * math.sqrt(1 - alpha**2 / alpha_after**2)
        expected = alpha_after * x0 + math.sqrt(sigma_after**2 - std**2) * eps
        np.testing.assert_allclose(x_prev, expected, rtol=1e-9, atol=1e-10)
        deviation = rows[step, NOISE] * math.exp(rows[step, OFFSET])
        assert deviation == pytest.approx(std, rel=1e-9, abs=1e-12)
        assert not after.any() and not rows[step, HISTORY]


def test_eta_of_one_is_ddpm_with_the_variance_of_the_posterior():
    ddpm, ddim = table_of(40, Sampler.DDPM, learned=False), table_of(40, Sampler.DDIM, eta=1)
    np.testing.assert_allclose(ddim[:, :3], ddpm[:, :3], rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(ddim[:, NOISE], ddpm[:, NOISE] * np.exp(ddpm[:, OFFSET]), rtol=1e-8)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda each: f"{each.schedule}-{each.prediction}")
def test_deterministic_samplers_with_a_perfect_model_recover_x0(process):
    x0, eps, _, _ = arrays(2)
    for sampler, steps in itertools.product(
        (Sampler.EULER if process.flow else Sampler.DDIM, Sampler.DPM_SOLVER), (1, 6)
    ):
        first = SamplerConfig(sampler=sampler, steps=steps).times(process)[:1]
        alpha, sigma = process.alpha_sigma(first)
        *_, (*_, x_prev, _) = run_of(process, sampler, steps, lambda t, x: x0, alpha * x0 + sigma * eps)
        np.testing.assert_allclose(x_prev, x0, atol=1e-9)


def test_the_order_of_a_sampler_is_how_its_error_falls_with_the_number_of_steps():
    """On normal data with deviation 2, for which the best estimate of x_0 and the exact solution are known."""
    process, x = Process(schedule="vp-sde"), np.linspace(-2, 2, 5)

    def estimate(t: float, x: np.ndarray) -> np.ndarray:
        alpha, sigma = process.alpha_sigma(np.array([t]))
        return 4 * alpha * x / (4 * alpha**2 + sigma**2)

    def error(sampler: Sampler, steps: int) -> float:
        alpha, sigma = process.alpha_sigma(np.array([999.0]))
        exact = 2 * x / np.sqrt(4 * alpha**2 + sigma**2)
        return np.abs(run_of(process, sampler, steps, estimate, x)[-1][4] - exact).max()

    for sampler, least, most in ((Sampler.DDIM, 1.9, 2.1), (Sampler.DPM_SOLVER, 3.9, 5.0)):
        for steps in (20, 40, 80):
            assert least < error(sampler, steps) / error(sampler, 2 * steps) < most, (sampler, steps)
    assert error(Sampler.DPM_SOLVER, 80) < error(Sampler.DDIM, 80) / 8


def test_euler_maruyama_of_a_flow_is_sits_step():
    """dx = (v + w score) dt + sqrt(2 w) dW with w = sigma; the last step, of 0.04, has the drift alone."""
    process, steps = Process(schedule="flow", prediction="velocity"), 25
    x, velocity, noise, v = arrays(4)
    rows = table_of(steps, Sampler.EULER_MARUYAMA, process=process)
    times, dt = np.linspace(0, 0.96, steps), 0.96 / (steps - 1)
    for step, (t, row) in enumerate(zip(times, rows, strict=True)):
        score = (t * velocity - x) / (1 - t)
        drift = velocity + (1 - t) * score
        expected = x + 0.04 * drift if step == steps - 1 else x + dt * drift + math.sqrt(2 * (1 - t) * dt) * noise
        np.testing.assert_allclose(apply_step(row, x, velocity, v, noise), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("prediction", [Prediction.EPSILON, Prediction.X0])
def test_euler_maruyama_in_continuous_time_is_the_reverse_sde(prediction):
    """Song et al. 2021, eq. 6, from s = 1 to 0.001 and then to 0 without noise."""
    process, steps = Process(schedule="vp-sde", prediction=prediction), 25
    x, x0, noise, v = arrays(4)
    rows = table_of(steps, Sampler.EULER_MARUYAMA, process=process)
    ends = [*np.linspace(1, 1e-3, steps), 0.0]
    for step, (row, s, after) in enumerate(zip(rows, ends, ends[1:], strict=False)):
        a = math.exp(-0.1 * s - 19.9 * s**2 / 2)
        beta, score = 0.1 + 19.9 * s, -(x - math.sqrt(a) * x0) / (1 - a)
        mean = x - (-beta / 2 * x - beta * score) * (s - after)
        expected = mean + (step < steps - 1) * math.sqrt(beta * (s - after)) * noise
        actual = apply_step(row, x, output_of(process, 999 * s, x, x0), v, noise)
        np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sampler", list(Sampler))
def test_samplers_without_history_neither_read_nor_leave_one(sampler):
    for process in PROCESSES:
        try:
            rows = table_of(6, sampler, process=process)
        except ConfigError:
            continue
        if sampler is Sampler.DPM_SOLVER:
            assert (rows[2 if process.flow else 1 : -1, HISTORY] < 0).all()
            assert not rows[[0, -1], HISTORY].any()
            conversion = process.conversion(SamplerConfig(sampler=sampler, steps=6).times(process))
            np.testing.assert_array_equal(rows[:, NEXT_OF_X:], np.stack(conversion.x0, 1))
        else:
            assert not rows[:, HISTORY].any() and not rows[:, NEXT_OF_X:].any()


def test_a_time_that_is_visited_twice_takes_a_step_of_first_order():
    rows = table_of(1000, Sampler.DPM_SOLVER)
    times = SamplerConfig(sampler=Sampler.DPM_SOLVER, steps=1000).times(Process())
    (twice,) = np.flatnonzero(np.diff(times) == 0)
    assert np.isfinite(rows).all()
    assert not rows[[0, twice, twice + 1, -1], HISTORY].any() and np.count_nonzero(rows[:, HISTORY]) == 996
    assert rows[twice, :3] == pytest.approx([1, 0, 0], abs=1e-12), "nothing changes between equal times"
