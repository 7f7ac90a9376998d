"""The losses of DiT, SiT and DyDiT: functions of tensors, and of those of the other processes where a mean is squared.

Shapes: x0, x_t, noise [B, C, S, S]; t [B], the model's own times (`dydit.diffusion.process`); a model's output
[B, C, S, S], or [B, 2C, S, S], whose second half is the raw variance v where that is learned. All in fp32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dydit.diffusion.process import TRAIN_STEPS, Prediction, Process
from dydit.diffusion.schedule import Schedule
from dydit.training.draws import QUARTERS
from dydit.training.processes import over_processes


@dataclass(frozen=True)
class PosteriorTensors:
    """Constants of the posterior q(x_{t-1} | x_t, x_0) of a discrete process, each fp32 [1000]."""

    x0_of_x: Tensor  # x_0 = x0_of_x * x_t - x0_of_eps * eps
    x0_of_eps: Tensor
    mean_of_x0: Tensor  # posterior mean
    mean_of_xt: Tensor
    log_variance_low: Tensor  # the posterior's log variance, its first entry replaced by the second
    log_variance_high: Tensor  # log beta

    @classmethod
    def of(cls, process: Process, device: torch.device | str) -> PosteriorTensors:
        """The constants of a process on a device."""
        schedule = Schedule.training(process)
        a = schedule.alphas_cumprod
        mean_of_x0, mean_of_xt = schedule.posterior_mean_coefficients
        low, high = schedule.log_variance_range
        return cls(
            x0_of_x=_fp32(np.sqrt(1 / a), device),
            x0_of_eps=_fp32(np.sqrt(1 / a - 1), device),
            mean_of_x0=_fp32(mean_of_x0, device),
            mean_of_xt=_fp32(mean_of_xt, device),
            log_variance_low=_fp32(low, device),
            log_variance_high=_fp32(high, device),
        )


@dataclass(frozen=True)
class ProcessTensors:
    """The forward process as tensors.

    `table`: alpha and sigma at 0..999, each fp32 [1000]; None where time is continuous. `posterior`: None without a
    variational term, which the prediction of epsilon in discrete time has.
    """

    process: Process
    table: tuple[Tensor, Tensor] | None
    posterior: PosteriorTensors | None

    @classmethod
    def of(cls, process: Process, device: torch.device | str = "cpu") -> ProcessTensors:
        """The tensors of a process on a device."""
        if not process.discrete:
            return cls(process, None, None)
        alpha, sigma = process.alpha_sigma(np.arange(TRAIN_STEPS))
        has_term = process.prediction is Prediction.EPSILON
        return cls(
            process=process,
            table=(_fp32(alpha, device), _fp32(sigma, device)),
            posterior=PosteriorTensors.of(process, device) if has_term else None,
        )

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma of x_t = alpha x_0 + sigma eps at times t [B], each fp32 [B, 1, 1, 1]."""
        if self.table is not None:
            return _at(self.table[0], t), _at(self.table[1], t)
        alpha, sigma = _continuous(self.process, t)
        return _per_image(alpha), _per_image(sigma)


def _continuous(process: Process, t: Tensor) -> tuple[Tensor, Tensor]:
    """`Process.alpha_sigma` of continuous times on a device, each fp32 [B], without waiting for the device."""
    if process.flow:
        return t.float(), 1 - t.float()
    first, last = process.beta_range
    s = t.to(torch.float32 if t.device.type == "mps" else torch.float64) / (TRAIN_STEPS - 1)
    log_squared = -(first * s + (last - first) * s.square() / 2)
    return (log_squared / 2).exp().float(), (-torch.expm1(log_squared)).sqrt().float()


def _fp32(array: np.ndarray, device: torch.device | str) -> Tensor:
    return torch.tensor(array, dtype=torch.float32, device=device)


def _per_image(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _at(table: Tensor, t: Tensor) -> Tensor:
    return _per_image(table[t])


def add_noise(process: ProcessTensors, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """x_t = alpha x_0 + sigma eps (Ho et al. 2020, eq. 4; Ma et al. 2024)."""
    alpha, sigma = process.alpha_sigma(t)
    return alpha * x0 + sigma * noise


def regression_target(process: ProcessTensors, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """What the first C channels of the output are to be, [B, C, S, S]; see `Prediction`."""
    prediction = process.process.prediction
    if prediction is Prediction.EPSILON:
        return noise
    if prediction is Prediction.X0:
        return x0
    if prediction is Prediction.VELOCITY:
        return x0 - noise
    alpha, sigma = process.alpha_sigma(t)
    return alpha * noise - sigma * x0


def diffusion_loss(
    process: ProcessTensors, output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """(mean squared error on the target, variational term in bits per dimension), each [B]; the loss is their sum.

    The variational term trains the variance only: the mean is detached (Nichol & Dhariwal 2021, section 3.1). At
    T = 1000 it enters with weight 1, as in DiT. It is 0 where the model does not learn the variance, and for processes
    without the term: the second half of their output is not trained, as in SiT.
    """
    output, channels = output.float(), x0.shape[1]
    predicted = output[:, :channels]
    mse = (regression_target(process, x0, t, noise) - predicted).square().flatten(1).mean(1)
    if process.posterior is None or output.shape[1] == channels:
        return mse, torch.zeros_like(mse)
    return mse, variational_term(process.posterior, predicted.detach(), output[:, channels:], x0, x_t, t)


def variational_term(posterior: PosteriorTensors, eps: Tensor, v: Tensor, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), at t = 0 the decoder's -log p(x_0 | x_1); bits per dimension.

    eps, v, x0, x_t [B, C, S, S]; returns [B].
    """
    of_x0, of_xt = _at(posterior.mean_of_x0, t), _at(posterior.mean_of_xt, t)
    low, high = _at(posterior.log_variance_low, t), _at(posterior.log_variance_high, t)
    predicted = _at(posterior.x0_of_x, t) * x_t - _at(posterior.x0_of_eps, t) * eps
    true_mean, mean = of_x0 * x0 + of_xt * x_t, of_x0 * predicted + of_xt * x_t
    share = (v + 1) / 2
    log_variance = share * high + (1 - share) * low
    kl = normal_kl(true_mean, low, mean, log_variance).flatten(1).mean(1)
    nll = -discretized_normal_log_likelihood(x0, mean, log_variance / 2).flatten(1).mean(1)
    return torch.where(t == 0, nll, kl) / math.log(2)


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N1 || N2) in nats, elementwise."""
    difference = log_variance2 - log_variance1
    return 0.5 * (difference - 1 + torch.exp(-difference) + (mean1 - mean2).square() * torch.exp(-log_variance2))


def discretized_normal_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log P of the 8-bit value x in [-1, 1] under a normal, elementwise: bins of 2/255, the outer two unbounded.

    Ho et al. 2020, eq. 13; the normal distribution function is exact here (the reference uses a tanh approximation).
    """
    inverse = torch.exp(-log_std)
    above = torch.special.ndtr((x - mean + 1 / 255) * inverse)
    below = torch.special.ndtr((x - mean - 1 / 255) * inverse)
    probability = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return torch.log(probability.clamp(min=1e-12))


def flops_loss(ratio: Tensor, target: float, weight: float) -> Tensor:
    """`weight * (mean over the batch of F_dyn/F_static - target)^2`, a scalar (DyDiT, section 3.4).

    ratio [b], of this process' images; the mean is that of all processes.
    """
    return weight * (over_processes(ratio.mean()) - target).square()


def token_loss(tokens: Tensor, target: float, weight: float, first: int = 0) -> Tensor:
    """`weight * mean over blocks and quarters of (share of tokens - target)^2`, a scalar; tokens [L, b, N].

    Not in the paper, which trains far longer. In a short run, the fastest way to meet the FLOPs loss is to turn the MLP
    of whole blocks off for every token. This loss aims at a share of tokens for each block and quarter of the times
    (batch element i belongs to quarter i mod 4), so a router can only choose among tokens, within and between images.
    `first`: the position of the first image in the batch of all processes; the shares are those of that batch.
    """
    quarters = (torch.arange(tokens.shape[1], device=tokens.device) + first) % QUARTERS
    member = torch.nn.functional.one_hot(quarters, QUARTERS).to(tokens.dtype)  # [b, 4]
    shares = over_processes(tokens.mean(-1) @ member * (QUARTERS / tokens.shape[1]))  # [L, 4]
    return weight * (shares - target).square().mean()


def detail_loss(tokens: Tensor, detail: Tensor, target: float, spread: float, weight: float) -> Tensor:
    """`weight * mean over images of (share of tokens - target * (1 + spread * detail))^2`, a scalar.

    tokens [L, b, N], detail [b] from `relative_detail`. Not in the paper either. An image with more detail should get
    more tokens; in a short run the routers learn where tokens matter, but not which images need more of them.
    """
    wanted = target * (1 + spread * detail)
    return weight * (tokens.mean((0, 2)) - wanted).square().mean()


def relative_detail(x0: Tensor) -> Tensor:
    """How much detail each image of a batch has, [b]: total variation, in standard deviations from the batch's mean.

    x0 [b, C, S, S], images or latents; mean and deviation are those of the images of all processes. 0 for all where
    they are equal.
    """
    variation = sum(x0.diff(dim=axis).abs().mean((1, 2, 3)) for axis in (2, 3))
    assert isinstance(variation, Tensor)
    centred = variation - over_processes(variation.mean())
    return centred / over_processes(centred.square().mean()).sqrt().clamp(min=1e-12)
