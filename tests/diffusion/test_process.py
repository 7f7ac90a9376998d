"""Noise schedules against their definitions, and x_0 and epsilon from what each kind of model answers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from dydit.diffusion.process import TRAIN_STEPS, NoiseSchedule, Prediction, Process
from dydit.errors import ConfigError
from dydit.models.config import parse_config

DISCRETE = [NoiseSchedule.LINEAR, NoiseSchedule.SCALED_LINEAR, NoiseSchedule.COSINE]
PAIRS = [
    (schedule, prediction)
    for schedule, prediction in itertools.product(NoiseSchedule, Prediction)
    if (schedule is NoiseSchedule.FLOW) == (prediction is Prediction.VELOCITY)
]


def process_of(schedule: NoiseSchedule, betas: tuple[float, float] | None = None) -> Process:
    prediction = Prediction.VELOCITY if schedule is NoiseSchedule.FLOW else Prediction.EPSILON
    return Process(schedule=schedule, prediction=prediction, betas=betas)


def product_of(betas: list[float]) -> list[float]:
    """alpha-bar after each of the betas, one factor at a time."""
    kept, product = [], 1.0
    for beta in betas:
        product *= 1 - beta
        kept.append(product)
    return kept


def cosine_betas() -> list[float]:
    """Nichol & Dhariwal 2021, eq. 17, with betas of at most 0.999."""

    def remaining(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    return [min(1 - remaining((t + 1) / 1000) / remaining(t / 1000), 0.999) for t in range(1000)]


EXPECTED_BETAS = {
    NoiseSchedule.LINEAR: [1e-4 + t * (0.02 - 1e-4) / 999 for t in range(1000)],
    NoiseSchedule.SCALED_LINEAR: [
        (math.sqrt(0.00085) + t * (math.sqrt(0.012) - math.sqrt(0.00085)) / 999) ** 2 for t in range(1000)
    ],
    NoiseSchedule.COSINE: cosine_betas(),
}


@pytest.mark.parametrize("schedule", DISCRETE)
def test_betas_closed_form(schedule):
    betas = process_of(schedule).training_betas()
    assert betas.shape == (1000,) and betas.dtype == np.float64
    # For the cosine schedule, 1 minus a number close to 1: 1e-15 of 1 in a beta of 4e-5.
    np.testing.assert_allclose(betas, EXPECTED_BETAS[schedule], rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("schedule", DISCRETE)
def test_alpha_and_sigma_of_a_discrete_schedule_are_those_of_the_product_of_its_betas(schedule):
    times = np.array([0, 1, 333, 500, 998, 999], np.float64)
    alpha, sigma = process_of(schedule).alpha_sigma(times)
    product = np.array(product_of(EXPECTED_BETAS[schedule]))[times.astype(int)]
    np.testing.assert_allclose(alpha, np.sqrt(product), rtol=1e-11)
    np.testing.assert_allclose(sigma, np.sqrt(1 - product), rtol=1e-11)


def test_betas_of_its_own_replace_the_usual_ones():
    linear = process_of(NoiseSchedule.LINEAR, (0.001, 0.01)).training_betas()
    np.testing.assert_allclose(linear, np.linspace(0.001, 0.01, 1000))
    scaled = process_of(NoiseSchedule.SCALED_LINEAR, (0.0001, 0.04)).training_betas()
    np.testing.assert_allclose(scaled, np.linspace(0.01, 0.2, 1000) ** 2)
    (squared,) = process_of(NoiseSchedule.VP_SDE, (1, 3)).alphas_cumprod(np.array([999.0]))
    assert squared == pytest.approx(math.exp(-2))


def test_vp_sde_is_the_integral_of_its_linear_beta():
    """alpha^2 = exp(-integral of beta from 0 to s), by the trapezoidal rule, which is exact for a line."""
    alpha, sigma = process_of(NoiseSchedule.VP_SDE).alpha_sigma(np.array([0.0, 1, 123.4, 500, 999]))
    for s, ours, noise in zip(np.array([0.0, 1, 123.4, 500, 999]) / 999, alpha, sigma, strict=True):
        integral = s * (0.1 + (0.1 + s * 19.9)) / 2
        assert ours == pytest.approx(math.exp(-integral / 2), rel=1e-12)
        assert noise == pytest.approx(math.sqrt(-math.expm1(-integral)), rel=1e-9)


def test_vp_sde_is_what_ddpms_betas_are_in_continuous_time():
    """The linear betas are beta(s) / 1000 (Song et al. 2021, appendix C)."""
    times = np.arange(0, 1000, 37, dtype=np.float64)
    ours, ddpm = (process_of(each).alphas_cumprod(times) for each in (NoiseSchedule.VP_SDE, NoiseSchedule.LINEAR))
    np.testing.assert_allclose(ours, ddpm, rtol=0.08)


def test_a_flow_goes_along_a_straight_line_from_noise_to_the_image():
    alpha, sigma = process_of(NoiseSchedule.FLOW).alpha_sigma(np.array([0, 0.25, 1]))
    assert alpha.tolist() == [0, 0.25, 1] and sigma.tolist() == [1, 0.75, 0]


@pytest.mark.parametrize("schedule", list(NoiseSchedule))
def test_time_runs_from_pure_noise_to_the_image(schedule):
    process = process_of(schedule)
    times = np.linspace(0, 1, 41)[:-1] if process.flow else np.arange(999.0, -1, -27)
    alpha, sigma = process.alpha_sigma(times)
    assert alpha[0] < 0.07 and sigma[0] > 0.997
    assert (np.diff(alpha) > 0).all() and (np.diff(sigma) < 0).all()
    if not process.flow:
        np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-14)


@pytest.mark.parametrize(("schedule", "prediction"), PAIRS)
def test_x0_and_epsilon_are_recovered_from_the_latents_and_the_answer(schedule, prediction):
    process = Process(schedule=schedule, prediction=prediction)
    rng = np.random.default_rng(0)
    times = rng.uniform(0, 1, 12) if process.flow else np.sort(rng.integers(0, TRAIN_STEPS, 12)).astype(np.float64)
    alpha, sigma = process.alpha_sigma(times)
    x0, eps = rng.normal(size=(2, 12))
    x = alpha * x0 + sigma * eps
    answer = {
        Prediction.EPSILON: eps,
        Prediction.X0: x0,
        Prediction.V: alpha * eps - sigma * x0,
        Prediction.VELOCITY: x0 - eps,
    }[prediction]
    conversion = process.conversion(times)
    for (of_x, of_out), wanted in ((conversion.x0, x0), (conversion.eps, eps)):
        assert of_x.shape == of_out.shape == (12,)
        np.testing.assert_allclose(of_x * x + of_out * answer, wanted, rtol=1e-9, atol=1e-10)


def test_the_prediction_itself_is_taken_as_it_is():
    times = np.array([10.0, 500])
    for prediction, name in ((Prediction.EPSILON, "eps"), (Prediction.X0, "x0")):
        of_x, of_out = getattr(Process(prediction=prediction).conversion(times), name)
        assert of_x.tolist() == [0, 0] and of_out.tolist() == [1, 1]


def test_velocity_is_the_derivative_of_the_latents():
    process, x0, eps, t, step = process_of(NoiseSchedule.FLOW), 1.7, -0.4, 0.3, 1e-6
    (alpha, after), (sigma, sigma_after) = process.alpha_sigma(np.array([t, t + step]))
    velocity = ((after * x0 + sigma_after * eps) - (alpha * x0 + sigma * eps)) / step
    assert velocity == pytest.approx(x0 - eps, rel=1e-8)


@pytest.mark.parametrize(
    ("schedule", "prediction"), sorted(set(itertools.product(NoiseSchedule, Prediction)) - set(PAIRS))
)
def test_predictions_that_a_schedule_does_not_have_are_refused(schedule, prediction):
    words = f"schedule {schedule} cannot be combined with prediction {prediction}: a flow predicts the velocity"
    with pytest.raises(ConfigError, match=words):
        parse_config(Process, {"schedule": schedule, "prediction": prediction})


@pytest.mark.parametrize(
    ("schedule", "betas", "words"),
    [
        ("cosine", (0.1, 0.2), "schedule cosine has no betas to set"),
        ("linear", (0.02, 0.0001), "betas 0.02 to 0.0001 do not ascend, above 0 and below 1"),
        ("linear", (0.0, 0.02), "betas 0 to 0.02 do not ascend"),
        ("scaled-linear", (0.1, 1.0), "betas 0.1 to 1 do not ascend"),
        ("vp-sde", (-0.1, 20), "betas -0.1 to 20 do not ascend, above 0"),
        ("linear", (0.1, math.nan), r"betas\.1 must be a finite number"),
        ("linear", (0.1,), "betas"),
        ("warm", None, "schedule must be 'linear', 'scaled-linear', 'cosine', 'vp-sde' or 'flow'"),
    ],
)
def test_bad_schedules_are_refused(schedule, betas, words):
    with pytest.raises(ConfigError, match=words):
        parse_config(Process, {"schedule": schedule, "betas": betas})


def test_betas_of_a_flow_are_refused():
    with pytest.raises(ConfigError, match="schedule flow has no betas to set"):
        parse_config(Process, {"schedule": "flow", "prediction": "velocity", "betas": (0.1, 0.2)})


def test_a_process_in_words():
    assert Process().words == "predicts epsilon; linear betas from 0.0001 to 0.02"
    assert Process(schedule="cosine", prediction="v").words == "predicts v; cosine betas"
    assert Process(schedule="vp-sde").words == "predicts epsilon; VP-SDE with beta from 0.1 to 20"
    own = Process(schedule="scaled-linear", prediction="x0", betas=(0.001, 0.01))
    assert own.words == "predicts x0; scaled-linear betas from 0.001 to 0.01"
    assert process_of(NoiseSchedule.FLOW).words == "predicts velocity; flow matching on the linear path"


def test_the_default_is_dits():
    assert Process() == Process(schedule="linear", prediction="epsilon", betas=None)
    assert Process().beta_range == (1e-4, 0.02)
