"""Logits to gates: the distribution and gradient in training, the strict threshold at inference."""

from __future__ import annotations

import pytest
import torch

from dydit.models.config import Routers
from dydit.models.dit.config import DiTConfig
from dydit.models.routers import GumbelSigmoid, Masked, Recording, Static, TokenRouter, WidthRouter

CONFIG = DiTConfig(hidden_size=64, depth=3, num_heads=4, patch_size=2, input_size=8, num_classes=7)
ALL_ROUTED = CONFIG.model_copy(update={"routers": Routers.ALL_ROUTED})


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def gumbel(seed: int = 0, **settings) -> GumbelSigmoid:
    return GumbelSigmoid(torch.Generator().manual_seed(seed), **settings)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_masked_threshold_is_strict(dtype):
    tiny = torch.finfo(dtype).tiny if dtype is not torch.float64 else 1e-30
    logits = torch.tensor([-1.0, -tiny, -0.0, 0.0, tiny, 1.0, torch.inf, -torch.inf], dtype=dtype)
    gates = Masked().gate(logits)
    assert gates.dtype == dtype
    assert gates.tolist() == [0, 0, 0, 0, 1, 1, 1, 0]
    # Where the sigmoid of a half-precision logit rounds to 0.5, the gate would close: the logit decides.
    if dtype is torch.float16:
        assert torch.sigmoid(logits)[4] == 0.5


def test_width_router_layouts():
    t_emb = torch.randn(5, 64)
    first, every = WidthRouter(CONFIG, CONFIG.num_heads), WidthRouter(ALL_ROUTED, ALL_ROUTED.num_heads)
    assert first.router.weight.shape == (3, 64) and every.router.weight.shape == (4, 64)
    logits = first(t_emb)
    assert logits.shape == (5, 4)
    assert torch.isposinf(logits[:, 0]).all()
    assert torch.allclose(logits[:, 1:], t_emb @ first.router.weight.T + first.router.bias, atol=1e-6)
    assert torch.isfinite(every(t_emb)).all() and every(t_emb).shape == (5, 4)
    with torch.no_grad():
        for router in (first, every):
            router.router.bias.fill_(-100)
    assert Masked().gate(first(t_emb)).tolist() == [[1, 0, 0, 0]] * 5
    assert not Masked().gate(every(t_emb)).any(), "an older release has no unit that is always on"


def test_token_router_is_a_two_layer_perceptron():
    router = TokenRouter(CONFIG).double()
    x = torch.randn(2, 16, 64, dtype=torch.float64)
    first, _, last = router.mlp_head
    assert first.weight.shape == (4, 64) and last.weight.shape == (1, 4)
    expected = torch.clamp(x @ first.weight.T + first.bias, min=0) @ last.weight[0] + last.bias
    assert router(x).shape == (2, 16)
    assert torch.allclose(router(x), expected, atol=1e-12)


@pytest.mark.parametrize("temperature", [5.0, 0.5])
def test_gumbel_gate_is_on_with_the_sigmoids_probability(temperature):
    """P[logit + Logistic(0, 1) > 0] = sigmoid(logit), whatever the temperature; five standard errors."""
    n = 40_000
    for logit in (-3.0, -0.7, 0.0, 0.4, 2.5):
        gates = gumbel(temperature=temperature).gate(torch.full((n,), logit))
        assert set(gates.unique().tolist()) <= {0.0, 1.0}, "hard: exactly 0 or exactly 1"
        p = torch.sigmoid(torch.tensor(logit)).item()
        assert abs(gates.mean().item() - p) < 5 * (p * (1 - p) / n) ** 0.5


def test_gumbel_gradient_is_the_sigmoids():
    logits = torch.linspace(-8, 8, 200, requires_grad=True)
    gates = gumbel(seed=3).gate(logits)
    weight = torch.arange(200.0)
    (gates * weight).sum().backward()
    uniform = torch.rand(200, generator=torch.Generator().manual_seed(3))
    noise = torch.log(uniform) - torch.log1p(-uniform)
    soft = torch.sigmoid((logits.detach() + noise) / 5)
    assert torch.allclose(logits.grad, weight * soft * (1 - soft) / 5, rtol=1e-3, atol=1e-6)
    assert torch.equal(gates.detach(), (logits.detach() + noise > 0).float())
    assert 0 < gates.detach().mean() < 1


def test_gumbel_always_on_unit_stays_on_without_a_gradient():
    router = WidthRouter(CONFIG, CONFIG.num_heads)
    t_emb = torch.randn(2000, 64, requires_grad=True)
    gates = gumbel().gate(router(t_emb))
    assert (gates[:, 0] == 1).all()
    gates[:, 0].sum().backward()
    assert torch.equal(t_emb.grad, torch.zeros_like(t_emb)), "and no NaN from an infinite logit"


def test_gumbel_repeats_with_its_generator_and_keeps_dtype():
    logits = torch.zeros(100, dtype=torch.bfloat16)
    first, second = gumbel(1), gumbel(1)
    a, b, c = first.gate(logits), second.gate(logits), second.gate(logits)
    assert torch.equal(a, b) and not torch.equal(b, c)
    assert a.dtype == torch.bfloat16 and set(a.tolist()) == {0.0, 1.0}


def test_static_ignores_routers():
    router, tokens = WidthRouter(CONFIG, CONFIG.num_heads), TokenRouter(CONFIG)
    gating = Static()
    for group in range(2):
        assert gating.units(0, group, router, torch.zeros(1, 64)) is None
    assert gating.tokens(0, tokens, torch.zeros(1, 16, 64)) is None


def test_recording_keeps_what_the_inner_gating_decided():
    heads, groups, tokens = (
        WidthRouter(CONFIG, CONFIG.num_heads),
        WidthRouter(CONFIG, CONFIG.num_heads),
        TokenRouter(CONFIG),
    )
    torch.nn.init.zeros_(tokens.mlp_head[2].bias)
    torch.nn.init.normal_(tokens.mlp_head[2].weight)
    recording = Recording(Masked(), CONFIG)
    kept = []
    for block in range(3):
        t_emb, x = torch.randn(2, 64), torch.randn(2, 16, 64)
        kept.append(
            (
                recording.units(block, 0, heads, t_emb),
                recording.units(block, 1, groups, t_emb),
                recording.tokens(block, tokens, x),
            )
        )
        assert torch.equal(kept[-1][0], Masked().units(block, 0, heads, t_emb))
        assert torch.equal(kept[-1][1], Masked().units(block, 1, groups, t_emb))
    decisions = recording.decisions()
    assert decisions.units.shape == (2, 24) and decisions.tokens.shape == (3, 2, 16)
    for block, (h, g, t) in enumerate(kept):
        assert torch.equal(decisions.units[:, 8 * block : 8 * block + 4], h)
        assert torch.equal(decisions.units[:, 8 * block + 4 : 8 * block + 8], g)
        assert torch.equal(decisions.tokens[block], t)
    for part in CONFIG.units.parts[:2]:
        assert 0 < decisions.units[:, part.units].mean() < 1
    assert 0 < decisions.tokens.mean() < 1


def test_recording_counts_what_was_not_gated_as_on():
    recording = Recording(Static(), CONFIG)
    recording.units(0, 0, None, torch.zeros(5, 64))
    decisions = recording.decisions()
    assert decisions.units.shape == (5, 24) and decisions.tokens.shape == (3, 5, 16)
    assert (decisions.units == 1).all() and (decisions.tokens == 1).all()


def test_gradients_flow_through_recorded_decisions():
    recording = Recording(gumbel(), CONFIG)
    routers = [WidthRouter(CONFIG, CONFIG.num_heads) for _ in range(3)]
    for block, router in enumerate(routers):
        recording.units(block, 0, router, torch.randn(4, 64))
    recording.decisions().units.sum().backward()
    assert all(router.router.weight.grad.abs().sum() > 0 for router in routers)
