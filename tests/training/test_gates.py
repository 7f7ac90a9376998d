from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dydit.models.config import ModelConfig
from dydit.models.dit.model import DiT
from dydit.models.macs import flops_ratio
from dydit.models.routers import Decisions, Masked, Recording, WidthRouter
from dydit.models.transformer.units import attention_macs, mlp_macs
from dydit.training.gates import GateNoise, GumbelSigmoid, achieved_ratio, noisy_gates
from dydit.training.losses import flops_loss
from tests.fixtures.training import gumbel

CPU = torch.device("cpu")


def logistic(count: int, factor: float = 1.0) -> torch.Tensor:
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(2))
    return factor * torch.logit(uniform, eps=1e-7)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**62 - 1), st.integers(1, 8), st.data())
def test_any_split_of_a_batch_has_the_noise_of_the_whole(
    small_config: ModelConfig, seed: int, batch: int, data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, batch))
    whole = GateNoise.draw(small_config, seed, batch, slice(0, batch), CPU)
    parts = [GateNoise.draw(small_config, seed, batch, rows, CPU) for rows in (slice(0, cut), slice(cut, batch))]
    assert torch.cat([part.units for part in parts]).equal(whole.units)
    assert torch.cat([part.tokens for part in parts], 1).equal(whole.tokens)
    assert whole.units.shape == (batch, small_config.units.size)
    assert whole.tokens.shape == (small_config.depth, batch, small_config.tokens)
    half = GateNoise.draw(small_config, seed, batch, slice(0, batch), CPU, 0.5)
    assert half.units.equal(whole.units / 2) and half.tokens.equal(whole.tokens / 2)


def test_each_router_has_noise_of_its_own(dynamic_config: ModelConfig, randomised: Callable[..., DiT]) -> None:
    """With routers whose logits are 0, gates are the signs of the noise."""
    model = randomised(dynamic_config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_rate." in name or "token_selection" in name:
                parameter.zero_()
    noise = GateNoise.draw(dynamic_config, 3, 4, slice(2, 4), CPU)
    gating = Recording(GumbelSigmoid(dynamic_config, noise, 5.0), dynamic_config)
    model(draws16(), torch.tensor([3, 600]), torch.tensor([1, 2]), gating)
    decisions, units = gating.decisions(), (noise.units > 0).float()
    units[:, [part.start for part in dynamic_config.units.parts]] = 1  # first-on
    torch.testing.assert_close(decisions.units, units)
    torch.testing.assert_close(decisions.tokens, (noise.tokens > 0).float())


def test_the_flops_ratio_counts_what_is_on(dynamic_config: ModelConfig) -> None:
    units, tokens = torch.zeros(3, 16), torch.zeros(2, 3, dynamic_config.tokens)
    (heads0, groups0), (heads1, _) = dynamic_config.units.nested([part.units for part in dynamic_config.units.parts])
    units[:, [heads0.start, heads1.start]] = 1
    units[2, heads1] = 1
    units[1, groups0] = 1
    tokens[0, 1, :8] = 1
    attention, mlp = attention_macs(dynamic_config), mlp_macs(dynamic_config)
    whole = 2 * (attention + mlp)
    expected = [attention * 2 / 4 / whole, (attention * 2 / 4 + mlp / 2) / whole, attention * 5 / 4 / whole]
    got = achieved_ratio(dynamic_config, Decisions(units, tokens))
    torch.testing.assert_close(got, torch.tensor(expected))
    counts = np.stack([units[:, part.units].sum(1).numpy() for part in dynamic_config.units.parts], 1)
    np.testing.assert_allclose(got, flops_ratio(dynamic_config, counts, tokens.mean(-1).T.numpy()), rtol=1e-6)
    assert float(flops_loss(got, 0.5, 2.0)) == pytest.approx(2 * (np.mean(expected) - 0.5) ** 2)


@pytest.mark.parametrize("target", [0.01, 0.999])
def test_the_flops_loss_pushes_every_router_towards_the_target(
    target: float, dynamic_config: ModelConfig, randomised: Callable[..., DiT]
) -> None:
    model = randomised(dynamic_config)
    gating = gumbel(dynamic_config, 2)
    model(draws16(), torch.tensor([3, 600]), torch.tensor([1, 2]), gating)
    ratio = achieved_ratio(dynamic_config, gating.decisions())
    assert 0.05 < float(ratio.detach().mean()) < 0.95
    flops_loss(ratio, target, 2.0).backward()
    sign = 1 if target < 0.5 else -1
    for block in model.blocks:
        for bias in (block.attn_rate.router.bias, block.mlp_rate.router.bias, block.token_selection.mlp_head[2].bias):
            assert (sign * bias.grad > 0).all()


def draws16() -> torch.Tensor:
    return torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(5))


def test_without_noise_the_gates_are_those_of_inference() -> None:
    logits = torch.tensor([-2.0, -1e-7, 0.0, 1e-7, 0.3, math.inf])
    gates = noisy_gates(logits, torch.zeros(6), 5.0)
    assert gates.round().equal(Masked().gate(logits))
    torch.testing.assert_close(gates, Masked().gate(logits))


def test_with_full_noise_the_gates_are_those_of_the_paper() -> None:
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    none, half, full = (noisy_gates(logits, logistic(1000, factor), 5.0) for factor in (0.0, 0.5, 1.0))
    uniform = torch.rand(1000, generator=torch.Generator().manual_seed(2))
    soft = torch.sigmoid((logits + torch.log(uniform) - torch.log1p(-uniform)) / 5)
    assert full.round().equal((soft > 0.5).float())
    flips = [(gates.round() != none.round()).float().mean() for gates in (none, half, full)]
    assert flips[0] == 0 and 0.05 < flips[1] < flips[2]


def test_gates_are_open_as_often_as_the_sigmoid_says() -> None:
    for logit in (-1.0, 0.5):
        gates = noisy_gates(torch.full((20_000,), logit), logistic(20_000), 5.0)
        assert float(gates.mean()) == pytest.approx(1 / (1 + math.exp(-logit)), abs=0.015)


def test_gradients_of_gates_are_the_sigmoids() -> None:
    logits = torch.tensor([-3.0, 0.0, 4.0], requires_grad=True)
    noisy_gates(logits, torch.zeros(3), 5.0).sum().backward()
    soft = torch.sigmoid(logits.detach() / 5)
    torch.testing.assert_close(logits.grad, soft * (1 - soft) / 5)


def test_a_unit_that_is_always_on_stays_on_without_a_gradient(dynamic_config: ModelConfig) -> None:
    router = WidthRouter(dynamic_config, 4)
    t_emb = torch.randn(2000, dynamic_config.hidden_size, requires_grad=True)
    noise = GateNoise.draw(dynamic_config, 0, 2000, slice(0, 2000), torch.device("cpu"))
    gates = GumbelSigmoid(dynamic_config, noise, 5.0).units(0, 0, router, t_emb)
    assert gates is not None and (gates[:, 0] == 1).all()
    gates[:, 0].sum().backward()
    assert t_emb.grad is not None and not t_emb.grad.any(), "and no NaN from an infinite logit"
