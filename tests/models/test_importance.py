from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dydit.errors import ConfigError
from dydit.models.config import ModelConfig
from dydit.models.dit.model import DiT
from dydit.models.transformer.importance import channel_importance, head_importance, rank_and_permute


def inputs(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(batch, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([0, 500, 999])[:batch], torch.tensor([0, 10, 4])[:batch]


def test_the_function_stays_and_the_order_changes(static_config: ModelConfig, randomised: Callable[..., DiT]) -> None:
    model = randomised(static_config).double()
    permuted = DiT(static_config).double()
    permuted.load_state_dict(rank_and_permute(model.state_dict(), static_config))
    with torch.no_grad():
        expected, got = model(*_double(inputs())), permuted(*_double(inputs()))
    assert expected.std() > 0.01
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    moved = [name for name, value in model.state_dict().items() if not value.equal(permuted.state_dict()[name])]
    assert {name.split(".", 2)[2] for name in moved} == {
        "attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight"
    }  # fmt: skip


def _double(values: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return values[0].double(), *values[1:]


def test_the_most_important_come_first(static_config: ModelConfig, randomised: Callable[..., DiT]) -> None:
    state = rank_and_permute(randomised(static_config).state_dict(), static_config)
    for block in range(static_config.depth):
        prefix = f"blocks.{block}."
        heads = head_importance(state[prefix + "attn.qkv.weight"], state[prefix + "attn.proj.weight"], 4)
        channels = channel_importance(state[prefix + "mlp.fc1.weight"], state[prefix + "mlp.fc2.weight"])
        assert (heads.diff() < 0).all() and (channels.diff() < 0).all()


def test_a_head_that_does_nothing_goes_last(static_config: ModelConfig, randomised: Callable[..., DiT]) -> None:
    state = randomised(static_config).state_dict()
    state["blocks.1.attn.proj.weight"][:, 8:16] = 0  # head 1
    state["blocks.1.mlp.fc2.weight"][:, 5] = 0
    silenced = state["blocks.1.mlp.fc1.weight"][5].clone()
    out = rank_and_permute(state, static_config)
    assert (out["blocks.1.attn.proj.weight"][:, 24:] == 0).all()
    assert (out["blocks.1.attn.proj.weight"][:, :24] != 0).any()
    assert out["blocks.1.mlp.fc1.weight"][-1].equal(silenced)


def test_the_state_that_was_given_is_left_alone(static_config: ModelConfig, randomised: Callable[..., DiT]) -> None:
    state = randomised(static_config).state_dict()
    before = {name: value.clone() for name, value in state.items()}
    out = rank_and_permute(state, static_config)
    out["blocks.0.attn.qkv.weight"].zero_()
    assert all(value.equal(before[name]) for name, value in state.items())


def test_a_model_with_routers_is_refused(dynamic_config: ModelConfig, randomised: Callable[..., DiT]) -> None:
    with pytest.raises(ConfigError, match="already has routers"):
        rank_and_permute(randomised(dynamic_config).state_dict(), dynamic_config)
