from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats

from dydit.diffusion.coefficients import sampling_run
from dydit.diffusion.process import NoiseSchedule, Prediction, Process
from dydit.diffusion.samplers import SamplerConfig
from dydit.diffusion.schedule import Schedule
from dydit.training.losses import (
    ProcessTensors,
    add_noise,
    detail_loss,
    diffusion_loss,
    discretized_normal_log_likelihood,
    normal_kl,
    regression_target,
    relative_detail,
    token_loss,
)

pytestmark = pytest.mark.numerics

PROCESS = ProcessTensors.of(Process())


def draws(seed: int = 0, batch: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, 1, 4, 4)
    x0 = torch.rand(shape, generator=generator) * 2 - 1
    x0[:, :, 0, :2] = torch.tensor([-1.0, 1.0])  # the outer bins too
    noise = torch.randn(shape, generator=generator)
    t = torch.tensor([0, 1, 2, 250, 700, 999])[:batch]
    output = torch.randn((batch, 2, 4, 4), generator=generator) * 0.5
    return {"output": output, "x0": x0, "x_t": add_noise(PROCESS, x0, t, noise), "t": t, "noise": noise}


def test_noise_is_added_as_the_schedule_says() -> None:
    d = draws()
    a = Schedule.training(Process()).alphas_cumprod[d["t"].numpy()][:, None, None, None]
    expected = np.sqrt(a) * d["x0"].numpy() + np.sqrt(1 - a) * d["noise"].numpy()
    np.testing.assert_allclose(d["x_t"].numpy(), expected, rtol=1e-5, atol=1e-6)


def test_the_two_terms_agree_with_an_independent_computation_in_float64() -> None:
    d = draws()
    mse, vb = diffusion_loss(PROCESS, **d)
    schedule = Schedule.training(Process())
    coefficients = sampling_run(Process(), SamplerConfig(steps=1000), learn_sigma=True).coefficients[::-1]
    of_x0, of_xt = schedule.posterior_mean_coefficients
    arrays = {key: value.double().numpy() for key, value in d.items()}
    for i, t in enumerate(d["t"].tolist()):
        eps, v = arrays["output"][i]
        c, x0, x_t = coefficients[t], arrays["x0"][i, 0], arrays["x_t"][i, 0]
        assert float(mse[i]) == pytest.approx(((eps - arrays["noise"][i, 0]) ** 2).mean(), rel=1e-5)
        mean, deviation = c[0] * x_t + c[1] * eps, np.exp(c[4] * v + c[5])  # as the sampler steps
        if t == 0:
            edges = np.where(x0 > 0.999, np.inf, x0 + 1 / 255), np.where(x0 < -0.999, -np.inf, x0 - 1 / 255)
            probability = stats.norm.cdf(edges[0], mean, deviation) - stats.norm.cdf(edges[1], mean, deviation)
            expected = -np.log2(np.maximum(probability, 1e-12)).mean()
        else:
            true = of_x0[t] * x0 + of_xt[t] * x_t
            variance = schedule.posterior_variance[t]
            kl = np.log(deviation) - np.log(variance) / 2 + (variance + (true - mean) ** 2) / (2 * deviation**2) - 0.5
            expected = kl.mean() / math.log(2)
        assert float(vb[i]) == pytest.approx(expected, rel=2e-3, abs=1e-6), t


def integral(s: np.ndarray) -> np.ndarray:
    """The integral of the beta of the VP-SDE from 0 to s, by the midpoint rule, [B]."""
    midpoints = (np.arange(1000)[:, None] + 0.5) / 1000 * s
    return np.asarray((0.1 + (20 - 0.1) * midpoints).mean(0) * s)


CLOSED_FORMS: dict[NoiseSchedule, Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]] = {
    NoiseSchedule.LINEAR: lambda t: of_betas(np.linspace(1e-4, 0.02, 1000), t),
    NoiseSchedule.SCALED_LINEAR: lambda t: of_betas(np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, t),
    NoiseSchedule.COSINE: lambda t: of_betas(cosine_betas(), t),
    NoiseSchedule.VP_SDE: lambda t: (np.exp(-integral(t / 999) / 2), np.sqrt(1 - np.exp(-integral(t / 999)))),
    NoiseSchedule.FLOW: lambda t: (t, 1 - t),
}
"""alpha and sigma at the model's own times [B], each [B]."""


def of_betas(betas: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    remaining = np.array([np.prod(1 - betas[: int(each) + 1]) for each in t])
    return np.sqrt(remaining), np.sqrt(1 - remaining)


def cosine_betas() -> np.ndarray:
    f = [math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(1001)]
    return np.array([min(1 - f[i + 1] / f[i], 0.999) for i in range(1000)])


EVERY_PROCESS = [
    Process(schedule=schedule, prediction=prediction)
    for schedule in NoiseSchedule
    for prediction in Prediction
    if (schedule is NoiseSchedule.FLOW) == (prediction is Prediction.VELOCITY)
]
of_every_process = pytest.mark.parametrize(
    "process", EVERY_PROCESS, ids=[f"{process.schedule}-{process.prediction}" for process in EVERY_PROCESS]
)


def drawn(process: Process) -> dict[str, torch.Tensor]:
    """Images, times, noise and their mixture, without the output of a model."""
    d = draws()
    t = d["t"] if process.discrete else torch.tensor([0.001, 0.2, 0.4, 0.6, 0.9, 0.999]) * (1 if process.flow else 999)
    return {
        "x0": d["x0"],
        "t": t,
        "noise": d["noise"],
        "x_t": add_noise(ProcessTensors.of(process), d["x0"], t, d["noise"]),
    }


@of_every_process
def test_noisy_images_and_targets_are_those_of_the_closed_forms(process: Process) -> None:
    d = drawn(process)
    x0, noise = d["x0"].double().numpy(), d["noise"].double().numpy()
    alpha, sigma = (each[:, None, None, None] for each in CLOSED_FORMS[process.schedule](d["t"].double().numpy()))
    np.testing.assert_allclose(d["x_t"], alpha * x0 + sigma * noise, rtol=1e-5, atol=1e-6)
    expected = {
        Prediction.EPSILON: noise,
        Prediction.X0: x0,
        Prediction.V: alpha * noise - sigma * x0,
        Prediction.VELOCITY: x0 - noise,
    }[process.prediction]
    target = regression_target(ProcessTensors.of(process), d["x0"], d["t"], d["noise"])
    assert target.dtype == d["x_t"].dtype == torch.float32
    np.testing.assert_allclose(target, expected, rtol=1e-5, atol=1e-6)


@of_every_process
def test_from_the_target_sampling_finds_the_image_and_the_noise(process: Process) -> None:
    d = drawn(process)
    target = regression_target(ProcessTensors.of(process), d["x0"], d["t"], d["noise"]).double().numpy()
    conversion = process.conversion(d["t"].double().numpy())
    for (of_x, of_out), name in ((conversion.x0, "x0"), (conversion.eps, "noise")):
        found = of_x[:, None, None, None] * d["x_t"].double().numpy() + of_out[:, None, None, None] * target
        # From x_t in fp32, an image in much noise or noise in a clear image is found up to that rounding.
        rounding = 3e-7 * np.abs(of_x).clip(1)[:, None, None, None]
        assert (np.abs(found - d[name].double().numpy()) < 5 * rounding).all()


@of_every_process
def test_a_model_that_returns_the_target_has_no_error(process: Process) -> None:
    """Only the prediction of epsilon in discrete time has a variational term; other second halves are not trained."""
    d = drawn(process)
    target = regression_target(ProcessTensors.of(process), d["x0"], d["t"], d["noise"])
    for second in (None, torch.full_like(target, 3.0, requires_grad=True)):
        output = target if second is None else torch.cat([target, second], 1)
        mse, vb = diffusion_loss(ProcessTensors.of(process), output, **d)
        assert (mse == 0).all()
        if second is not None and process.discrete and process.prediction is Prediction.EPSILON:
            vb.sum().backward()
            assert (second.grad != 0).any()
        else:
            assert (vb == 0).all() and not vb.requires_grad
    mse, _ = diffusion_loss(ProcessTensors.of(process), target + 0.5, **d)
    torch.testing.assert_close(mse, torch.full_like(mse, 0.25))


def test_the_variational_term_trains_the_variance_only() -> None:
    d = draws()
    d["output"].requires_grad_(True)
    _, vb = diffusion_loss(PROCESS, **d)
    vb.sum().backward()
    gradient = d["output"].grad
    assert gradient is not None
    assert (gradient[:, 0] == 0).all() and (gradient[:, 1] != 0).float().mean() > 0.5


def test_a_model_without_learned_variance_has_no_variational_term() -> None:
    d = draws()
    d["output"] = d["output"][:, :1]
    mse, vb = diffusion_loss(PROCESS, **d)
    assert (mse > 0).all() and (vb == 0).all()


def test_perfect_noise_and_the_smallest_variance_leave_only_the_posterior() -> None:
    d = draws()
    d["output"] = torch.cat([d["noise"], -torch.ones_like(d["noise"])], 1)
    mse, vb = diffusion_loss(PROCESS, **d)
    assert (mse == 0).all()
    assert (vb[1:].abs() < 1e-3).all()  # KL of equal normals, up to fp32


def test_kl_is_zero_for_equal_normals_and_positive_else() -> None:
    one, zero = torch.ones(()), torch.zeros(())
    assert float(normal_kl(one, zero, one, zero)) == 0
    assert float(normal_kl(one, zero, zero, zero)) == pytest.approx(0.5)
    assert float(normal_kl(zero, zero, zero, one)) > 0


def test_the_likelihood_of_all_256_values_sums_to_one() -> None:
    values = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for mean, log_std in ((0.3, -1.0), (-0.98, -3.0), (2.0, 0.0)):
        log = discretized_normal_log_likelihood(values, torch.tensor(mean), torch.tensor(log_std, dtype=torch.float64))
        assert float(log.exp().sum()) == pytest.approx(1, abs=1e-6)


def test_the_token_loss_holds_each_block_and_quarter_to_its_share() -> None:
    tokens = torch.zeros(2, 8, 10)  # 2 blocks; batch element i is of quarter i mod 4
    tokens[0, :, :5] = 1  # half of the tokens at every timestep
    tokens[1, 0::4] = tokens[1, 1::4] = 1  # the same mean, but all or nothing by quarter
    assert float(token_loss(tokens[:1], 0.5, 3.0)) == 0
    assert float(token_loss(tokens[1:], 0.5, 3.0)) == pytest.approx(3 * 0.25)
    assert float(token_loss(tokens, 0.5, 3.0)) == pytest.approx(3 * 0.125)
    # Elements 3 .. 6 of a batch are of quarters 3, 0, 1 and 2.
    assert float(token_loss(tokens[1:, 3:7], 0.5, 3.0, first=3)) == pytest.approx(3 * 0.25)


def test_detail_is_the_total_variation_in_standard_deviations() -> None:
    flat, stripes = torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4)
    stripes[..., ::2] = 1
    checks = stripes.roll(1, -1).clone()
    checks[..., ::2, :] = 1 - checks[..., ::2, :]
    detail = relative_detail(torch.cat([flat, stripes, checks]))
    torch.testing.assert_close(detail, torch.tensor([-1.0, 0.0, 1.0]) * 1.5**0.5)  # variations 0, 1 and 2
    assert not relative_detail(torch.cat([stripes, stripes])).any(), "equal images have equal detail"


def test_the_detail_loss_asks_for_more_tokens_where_there_is_more_detail() -> None:
    detail = torch.tensor([-1.0, 1.0, 0.0, 0.0])
    tokens = torch.zeros(2, 4, 10)
    for image, count in enumerate((4, 6, 5, 5)):  # of ten tokens, half and a fifth of that more or less
        tokens[:, image, :count] = 1
    assert float(detail_loss(tokens, detail, 0.5, 0.2, 3.0)) == pytest.approx(0, abs=1e-12)
    assert float(detail_loss(tokens, -detail, 0.5, 0.2, 3.0)) == pytest.approx(3 * 2 * 0.2**2 / 4)
    tokens.requires_grad_()
    detail_loss(tokens, 2 * detail, 0.5, 0.2, 3.0).backward()
    assert tokens.grad[:, 0].mean() > 0 > tokens.grad[:, 1].mean(), "down for the plain image, up for the detailed one"
