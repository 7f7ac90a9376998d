"""Guidance and the sampler's update in PyTorch: from what the model predicts to the latents after the step."""

from __future__ import annotations

import torch
from torch import Tensor


def sampler_step(
    x: Tensor,
    history: Tensor,
    output: Tensor,
    noise: Tensor,
    coefficients: Tensor,
    cfg_scale: float | Tensor,
    guided_channels: int,
) -> tuple[Tensor, Tensor]:
    """The latents after a step and the history for the next one, each [B, C, S, S], of the dtype of `x`.

        x_prev       = c_x * x + c_out * out + c_history * history + c_noise * exp(slope * v + offset) * noise
        next_history = d_x * x + d_out * out

    `x`, `history`, `noise` [B, C, S, S]. `output` [B or 2B, C or 2C, H, W]: what the model predicts and, of a model
    that learns its variance, `v` in the second half of the channels (else v = 0). With 2B rows, those with the label
    come first and then those of the null class; the first `guided_channels` of out are then
    `null + cfg_scale * (label - null)`, and everything else is the label's. `coefficients` [8]: a row of
    `dydit.diffusion.coefficients`.
    """
    batch, channels = x.shape[:2]
    out, variance = output[:batch, :channels], output[:batch, channels:]
    if output.shape[0] > batch:
        null = output[batch:, :guided_channels]
        guided = null + cfg_scale * (out[:, :guided_channels] - null)
        out = torch.cat([guided, out[:, guided_channels:]], 1)
    of_x, of_out, of_history, of_noise, slope, offset, next_of_x, next_of_out = coefficients.unbind()
    deviation = torch.exp(slope * variance + offset) if variance.shape[1] else torch.exp(offset)
    x_prev = of_x * x + of_out * out + of_history * history + of_noise * deviation * noise
    return x_prev, next_of_x * x + next_of_out * out
