"""Logits to gates: the distribution and gradient in training, the strict threshold at inference."""

from __future__ import annotations

import pytest
import torch

from dydit.models.config import Routers
from dydit.models.dit.config import DiTConfig
from dydit.models.routers import Masked, Recording, Static, TokenRouter, WidthRouter
from tests.fixtures.training import gumbel

CONFIG = DiTConfig(hidden_size=64, depth=3, num_heads=4, patch_size=2, input_size=8, num_classes=7)
ALL_ROUTED = CONFIG.model_copy(update={"routers": Routers.ALL_ROUTED})


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


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
    recording = gumbel(CONFIG, 4)
    routers = [WidthRouter(CONFIG, CONFIG.num_heads) for _ in range(3)]
    for block, router in enumerate(routers):
        recording.units(block, 0, router, torch.randn(4, 64))
    recording.decisions().units.sum().backward()
    assert all(router.router.weight.grad.abs().sum() > 0 for router in routers)
