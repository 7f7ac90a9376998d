"""Models that texts condition are trained: static, then dynamic, exported and compared with the checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from dydit.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from dydit.data.dataset import EncodedCaptions, Examples
from dydit.diffusion.samplers import SamplerConfig
from dydit.errors import ConfigError
from dydit.models.config import ModelConfig, Routers, Space, TextSpec
from dydit.models.routers import Static
from dydit.models.synthetic import synthetic_model
from dydit.models.text import TextRows
from dydit.parity.reference import Images, Reference
from dydit.runtime.pipeline import DyDiTPipeline
from dydit.training.recipe import Recipe
from dydit.training.state import read_log
from dydit.training.trainer import starting_model, train

TOKENS, CHANNELS = 5, 16
BRIGHT, DARK = np.eye(2, CHANNELS, dtype=np.float32) * 3


class Captioned:
    """Bright and dark latents, whose captions alone tell which: of one to four tokens, and the empty one of one."""

    shape, space, classes, class_names = (4, 8, 8), Space.LATENTS, 1, None
    text: TextSpec | None = TextSpec(TOKENS, CHANNELS)

    def __len__(self) -> int:
        return 40

    def batch(self, indices: np.ndarray, generators: Sequence[np.random.Generator]) -> Examples:
        count = len(indices)
        sign = np.where(indices % 2, 1, -1).astype(np.float32)
        images = np.broadcast_to(sign[:, None, None, None], (count, *self.shape))
        images = images + np.stack([each.normal(size=self.shape) for each in generators]).astype(np.float32) * 0.1
        mask = np.arange(TOKENS) < 1 + indices[:, None] % 4
        embeddings = np.where(indices[:, None] % 2, BRIGHT, DARK)[:, None] * mask[..., None]
        return Examples(images, np.zeros(count, np.int64), EncodedCaptions(embeddings.astype(np.float32), mask))

    def no_caption(self) -> EncodedCaptions:
        return EncodedCaptions(np.ones((1, 1, CHANNELS), np.float32), np.ones((1, 1), bool))


@pytest.fixture(autouse=True)
def captioned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setitem(__import__("dydit.data.opened", fromlist=["_"]).SMALL_SETS, "captioned", Captioned)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make(small_recipe: Callable[..., Recipe], pixart_config: ModelConfig) -> Callable[..., Recipe]:
    def make(**changes: object) -> Recipe:
        model = pixart_config.model_copy(
            update={"routers": Routers.NONE if "stage" not in changes else Routers.FIRST_ON}
        )
        values = {"model": model, "data": "captioned", "learning_rate": 3e-3, "log_every": 10, "save_every": 20}
        return small_recipe(**{**values, **changes})

    return make


def test_a_new_model_predicts_nothing_and_a_dynamic_one_starts_from_the_static_function(
    tmp_path: Path, make: Callable[..., Recipe]
) -> None:
    texts = TextRows(torch.randn(3, TOKENS, CHANNELS), torch.arange(TOKENS) < torch.tensor([[1], [3], [5]]))
    x, t = torch.randn(3, 4, 8, 8), torch.tensor([0, 400, 999])
    new = starting_model(make())
    with torch.no_grad():
        assert not new(x, t, texts).any()
    static = make().model
    save_checkpoint(tmp_path / "static.safetensors", synthetic_model(static), static)
    recipe = make(stage="dynamic", init=str(tmp_path / "static.safetensors"), width_bias=30.0)
    start, before = starting_model(recipe).eval(), load_checkpoint(tmp_path / "static.safetensors").model()
    with torch.no_grad():
        expected = before(x, t, texts, Static())
        torch.testing.assert_close(start(x, t, texts), expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.01
    name = "blocks.0.attn.qkv.weight"
    assert not start.state_dict()[name].equal(before.state_dict()[name]), "heads were not ordered by importance"


def test_captions_are_learned_and_the_trained_model_is_exported(
    tmp_path: Path, make: Callable[..., Recipe], make_bundle: Callable[..., object]
) -> None:
    static = train(make(iterations=60), tmp_path / "static")
    log = read_log(static.model.parent)
    assert log[-1]["mse"] < 0.8 * log[0]["mse"] and log[-1]["probe_mse"] < log[0]["probe_mse"]
    routers = {"width_bias": 1.0, "token_bias": 1.0, "router_learning_rate": 10.0, "flops_weight": 20.0}
    dynamic = make(
        stage="dynamic",
        init=str(static.model),
        **{
            "iterations": 80,
            "lambda_target": 0.5,
            "token_weight": 20.0,
            "token_target": 0.5,
            "token_spread": 0.1,
            **routers,
        },
    )
    result = train(dynamic, tmp_path / "dynamic")
    log = read_log(result.model.parent)
    assert abs(log[-1]["ratio"] - 0.5) < 0.15 and 0.05 < log[-1]["probe_tokens"] < 0.99
    checkpoint = load_checkpoint(result.model)
    assert checkpoint.config == dynamic.model
    examples = Captioned().batch(np.arange(2), [np.random.default_rng(each) for each in range(2)])
    assert examples.captions is not None
    texts = TextRows.of(examples.captions.embeddings, examples.captions.mask)
    bundle = make_bundle(checkpoint, steps=3)
    with DyDiTPipeline.from_bundle(bundle.path, threads=1) as pipe:  # type: ignore[attr-defined]
        latents = pipe(
            prompt_embeds=examples.captions.embeddings,
            prompt_attention_mask=examples.captions.mask,
            guidance_scale=1,
            seed=3,
            output_type="latent",
        ).latents
    model = checkpoint.model()
    model.config = model.config.with_texts(2, negative=False)
    sampling = SamplerConfig(sampler=model.config.usual_run.sampler, steps=3)
    reference = Reference(model, sampling, model.config.guided_channels, texts)
    expected = reference.run(Images((0, 1), seed=3, cfg_scale=1)).latents[-1]
    assert np.abs(latents - expected).max() < 1e-3 * np.abs(expected).max()
    assert expected[1].mean() - expected[0].mean() > 0.2, "the captions say nothing"


def test_captions_that_do_not_fit_are_refused(
    tmp_path: Path, make: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    for text, words in (
        (None, "has no encoded captions"),
        (TextSpec(TOKENS, 8), "captions of 8 channels, but the model takes 16"),
        (TextSpec(99, CHANNELS), "captions of up to 99 tokens, but the model takes 12"),
    ):
        monkeypatch.setattr(Captioned, "text", text)
        with pytest.raises(ConfigError, match=words):
            train(make(), tmp_path / "run")
        assert not (tmp_path / "run").exists()
