"""Guidance and the sampler's update in PyTorch: from what the model predicts to the latents after the step."""

from __future__ import annotations

import torch
from torch import Tensor


def sampler_step(
    x: Tensor, output: Tensor, noise: Tensor, coefficients: Tensor, cfg_scale: float | Tensor, guided_channels: int
) -> Tensor:
    """The latents after a step, [B, C, H, W], of the dtype of `x`.

        x_prev = c_x * x + c_eps * eps + c_noise * exp(slope * v + offset) * noise

    `x`, `noise` [B, C, H, W]. `output` [B or 2B, C or 2C, H, W]: the prediction of epsilon and, of a model that learns
    its variance, `v` in the second half of the channels (else v = 0). With 2B rows, those with the label come first and
    then those of the null class; the first `guided_channels` of eps are then `null + cfg_scale * (label - null)`, and
    everything else is the label's. `coefficients` [5]: a row of `dydit.diffusion.coefficients.step_coefficients`.
    """
    batch, channels = x.shape[:2]
    eps, variance = output[:batch, :channels], output[:batch, channels:]
    if output.shape[0] > batch:
        null = output[batch:, :guided_channels]
        guided = null + cfg_scale * (eps[:, :guided_channels] - null)
        eps = torch.cat([guided, eps[:, guided_channels:]], 1)
    of_x, of_eps, of_noise, slope, offset = coefficients.unbind()
    deviation = torch.exp(slope * variance + offset) if variance.shape[1] else torch.exp(offset)
    return of_x * x + of_eps * eps + of_noise * deviation * noise
