"""Token routers that decide on all tokens of an image together: in training, masked, sliced and as a graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dydit.models.config import ModelConfig, Routers, TokenScope, parse_config
from dydit.models.dit.config import DiTConfig
from dydit.models.routers import Masked, Recording, TokenRouter
from dydit.models.synthetic import synthetic_model
from dydit.models.uvit.config import UViTConfig
from tests.fixtures.training import gumbel

LAYER = {"token_scope": TokenScope.LAYER}
UVIT = UViTConfig(hidden_size=64, depth=3, num_heads=4, patch_size=2, input_size=8, in_channels=4, num_classes=7)


@pytest.fixture(params=["dit", "uvit"])
def config(request: pytest.FixtureRequest, small_config: ModelConfig) -> ModelConfig:
    config = small_config if request.param == "dit" else UVIT
    return config.model_copy(update=LAYER)


def test_one_decision_is_that_of_the_mean_logit(config: ModelConfig) -> None:
    torch.manual_seed(0)
    whole, single = TokenRouter(config), TokenRouter(config.model_copy(update={"token_scope": TokenScope.TOKEN}))
    single.load_state_dict(whole.state_dict())
    x, extra = torch.randn(3, config.tokens, config.hidden_size), config.extra_tokens
    mean = single(x)[:, extra:].mean(1, keepdim=True)
    torch.testing.assert_close(whole(x)[:, extra:], mean.expand(-1, config.tokens - extra))
    assert whole(x).shape == single(x).shape and whole(x)[:, :extra].isinf().all()


@pytest.mark.parametrize("noisy", [True, False])
def test_all_tokens_of_an_image_go_together(config: ModelConfig, noisy: bool) -> None:
    model = synthetic_model(config)
    recording = gumbel(config, 64, seed=1) if noisy else Recording(Masked(), config)
    x = torch.randn(64, config.in_channels, config.input_size, config.input_size)
    y = model(x, torch.arange(64) * 15, torch.arange(64) % 7, recording)
    tokens = recording.decisions().tokens  # [L, B, N]
    extra = config.extra_tokens
    patches = tokens[:, :, extra:].detach()
    assert patches.eq(patches[:, :, :1]).all() and 0.05 < float(patches.mean()) < 0.95
    assert tokens[:, :, :extra].eq(1).all()
    if noisy:
        y.square().mean().backward()
        gradients = [each.grad for router in model.token_routers() for each in router.parameters()]
        assert all(each is not None and each.isfinite().all() for each in gradients)
        assert any(each is not None and each.any() for each in gradients)


@pytest.mark.parametrize("routing", ["dynamic", "dense", "capacity"])
def test_every_form_decides_the_same(
    config: ModelConfig, routing: str, run: Any, make_checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    path, bundle = make_checkpoint(config, flops_ratio=0.6).path, tmp_path / "bundle"
    assert run("export", path, "--steps", 4, "--max-subnets", 2, "--routing", routing, "--out", bundle).code == 0
    scale = () if config.null_class is not None else ("--cfg-scale", 1)
    held = run("parity", bundle, "--against", path, "--out", tmp_path / "parity", *scale)
    assert held.code == 0, held


def test_parity_sees_another_scope(
    small_config: ModelConfig, run: Any, make_checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    """The checks above can fail: a bundle whose tokens go one by one is not that model."""
    from dydit.checkpoints.checkpoint import load_checkpoint, save_checkpoint

    path, other = make_checkpoint(small_config, flops_ratio=0.6).path, tmp_path / "layer.safetensors"
    config = small_config.model_copy(update=LAYER)
    save_checkpoint(other, load_checkpoint(path).state, config)
    assert run("export", path, "--steps", 4, "--max-subnets", 2, "--out", tmp_path / "bundle").code == 0
    assert run("parity", tmp_path / "bundle", "--against", other, "--out", tmp_path / "parity").code == 1


def test_files_without_the_field_are_read_and_written_as_before(small_config: ModelConfig) -> None:
    assert "token_scope" not in small_config.model_dump_json()
    whole = small_config.model_copy(update=LAYER)
    assert parse_config(DiTConfig, whole.model_dump(mode="json")) == whole != small_config
    static = whole.model_copy(update={"routers": Routers.NONE})
    assert static.sizes == whole.without_routers().sizes == small_config.without_routers().sizes
