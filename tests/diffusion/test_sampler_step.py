"""Guidance and the update of one element at a time, worked out in Python's own numbers, and `sampler_step`."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dydit.diffusion.sampler_step import sampler_step

COEFFICIENTS = (1.01, -0.2, 0.3, 1.0, 0.6, -1.1, 1.4, -0.7)
SCALE, GUIDED = 3.5, 2


def expected(x, history, output, noise, guided_channels):
    """The formulas for each element. This is the only place that repeats it: everything else calls `sampler_step`."""
    batch, channels, height, width = x.shape
    of_x, of_out, of_history, of_noise, slope, offset, next_of_x, next_of_out = COEFFICIENTS
    after, next_history = np.empty_like(x), np.empty_like(x)
    for image, channel, row, column in np.ndindex(batch, channels, height, width):
        out = output[image, channel, row, column]
        if len(output) == 2 * batch and channel < guided_channels:
            null = output[batch + image, channel, row, column]
            out = null + SCALE * (out - null)
        v = output[image, channels + channel, row, column] if output.shape[1] == 2 * channels else 0.0
        place = (image, channel, row, column)
        drift = of_x * x[place] + of_out * out + of_history * history[place]
        after[place] = drift + of_noise * math.exp(slope * v + offset) * noise[place]
        next_history[place] = next_of_x * x[place] + next_of_out * out
    return after, next_history


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("rows", [2, 4])
@pytest.mark.parametrize("guided_channels", [0, GUIDED, 3])
def test_the_step_is_the_formula(rows, learned, guided_channels):
    rng = np.random.default_rng(0)
    x, history, noise = rng.normal(size=(3, 2, 3, 4, 4))
    output = rng.normal(size=(rows, 6 if learned else 3, 4, 4))
    tensors = (torch.from_numpy(each) for each in (x, history, output, noise))
    actual = sampler_step(*tensors, torch.tensor(COEFFICIENTS, dtype=torch.float64), SCALE, guided_channels)
    for ours, theirs in zip(actual, expected(x, history, output, noise, guided_channels), strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_coefficients_of_double_precision_leave_the_type_and_the_bits_of_the_latents(dtype):
    """The reference passes float64, a graph's twin float32: the products are the same."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, channels, 4, 4, generator=generator, dtype=dtype) for channels in (3, 3, 6, 3)]
    row = torch.tensor(COEFFICIENTS, dtype=torch.float64)
    states = [sampler_step(*tensors, each, SCALE, GUIDED) for each in (row, row.to(dtype))]
    for double, own in zip(*states, strict=True):
        assert double.dtype == dtype and torch.equal(double, own)


def test_a_coefficient_of_zero_leaves_the_bits_that_the_step_has_without_history():
    """DDPM and DDIM are such steps: what they return does not depend on the history."""
    generator = torch.Generator().manual_seed(0)
    x, history, noise = torch.randn(3, 2, 3, 4, 4, generator=generator)
    output = torch.randn(2, 6, 4, 4, generator=generator)
    row = torch.tensor([1.01, -0.2, 0, 1, 0.6, -1.1, 0, 0])
    with_it, without = (sampler_step(x, each, output, noise, row, 1.0, 0) for each in (history, torch.zeros_like(x)))
    plain = row[0] * x + row[1] * output[:, :3] + row[3] * torch.exp(row[4] * output[:, 3:] + row[5]) * noise
    assert torch.equal(with_it[0], without[0]) and torch.equal(with_it[0], plain)
    assert not with_it[1].any()
