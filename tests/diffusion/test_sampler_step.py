"""Guidance and the update of one element at a time, worked out in Python's own numbers, and `sampler_step`."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dydit.diffusion.sampler_step import sampler_step

COEFFICIENTS = (1.01, -0.2, 1.0, 0.6, -1.1)
SCALE, GUIDED = 3.5, 2


def expected(x, output, noise, guided_channels):
    """The formula for each element. This is the only place that repeats it: everything else calls `sampler_step`."""
    batch, channels, height, width = x.shape
    of_x, of_eps, of_noise, slope, offset = COEFFICIENTS
    after = np.empty_like(x)
    for image, channel, row, column in np.ndindex(batch, channels, height, width):
        eps = output[image, channel, row, column]
        if len(output) == 2 * batch and channel < guided_channels:
            null = output[batch + image, channel, row, column]
            eps = null + SCALE * (eps - null)
        v = output[image, channels + channel, row, column] if output.shape[1] == 2 * channels else 0.0
        place = (image, channel, row, column)
        after[place] = of_x * x[place] + of_eps * eps + of_noise * math.exp(slope * v + offset) * noise[place]
    return after


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("rows", [2, 4])
@pytest.mark.parametrize("guided_channels", [0, GUIDED, 3])
def test_the_step_is_the_formula(rows, learned, guided_channels):
    rng = np.random.default_rng(0)
    x, noise = rng.normal(size=(2, 2, 3, 4, 4))
    output = rng.normal(size=(rows, 6 if learned else 3, 4, 4))
    tensors = (torch.from_numpy(each) for each in (x, output, noise))
    actual = sampler_step(*tensors, torch.tensor(COEFFICIENTS, dtype=torch.float64), SCALE, guided_channels)
    np.testing.assert_allclose(actual.numpy(), expected(x, output, noise, guided_channels), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_coefficients_of_double_precision_leave_the_type_and_the_bits_of_the_latents(dtype):
    """The reference passes float64, a graph's twin float32: the products are the same."""
    generator = torch.Generator().manual_seed(0)
    x, output, noise = (torch.randn(2, channels, 4, 4, generator=generator, dtype=dtype) for channels in (3, 6, 3))
    row = torch.tensor(COEFFICIENTS, dtype=torch.float64)
    double, own = (sampler_step(x, output, noise, each, SCALE, GUIDED) for each in (row, row.to(dtype)))
    assert double.dtype == dtype and torch.equal(double, own)
