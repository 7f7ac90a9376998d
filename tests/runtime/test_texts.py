"""Texts in the pipeline: as diffusers' PixArtAlphaPipeline, from embeddings and from prompts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dydit.bundle.texts import make_texts, synthetic_texts
from dydit.checkpoints.checkpoint import load_checkpoint
from dydit.errors import ConfigError
from dydit.export.exporter import export
from dydit.export.settings import ExportConfig
from dydit.runtime.backends.base import BackendOptions
from dydit.runtime.backends.registry import open_backend
from dydit.runtime.pipeline import DyDiTPipeline
from dydit.runtime.prompts import TextEncoder
from dydit.runtime.text_conditioner import TextConditioner
from dydit.runtime.text_files import read_texts, write_texts
from tests.fixtures.packages import OPENVINO

PROMPTS = ["A red fox in the snow ", "photo of the green owl"]


def distance(found: Any, expected: Any) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.fixture(scope="module")
def theirs(text_encoder: Path) -> Any:
    """A whole pipeline of diffusers, with random weights."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'dydit[vae]'")
    from transformers import AutoTokenizer, T5EncoderModel

    torch.manual_seed(4)
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=8,
        num_layers=2,
        cross_attention_dim=24,
        caption_channels=16,
        sample_size=8,
        norm_num_groups=1,
        use_additional_conditions=False,
    )
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    pipe = diffusers.PixArtAlphaPipeline(
        tokenizer=AutoTokenizer.from_pretrained(text_encoder / "tokenizer"),
        text_encoder=T5EncoderModel.from_pretrained(text_encoder / "text_encoder").eval(),
        vae=vae,
        transformer=transformer,
        scheduler=scheduler,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def saved(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `theirs` was saved to, and beside it our bundle of it."""
    folder: Path = tmp_path_factory.mktemp("pipeline")
    theirs.save_pretrained(folder / "diffusers")
    export(load_checkpoint(folder / "diffusers"), folder / "bundle", ExportConfig())
    return folder


@pytest.mark.parametrize("backend", ["onnxruntime", "torch", OPENVINO])
@pytest.mark.parametrize("scale", [4.5, 1.0])
def test_a_saved_pipeline_gives_the_latents_of_diffusers(theirs: Any, saved: Path, backend: str, scale: float) -> None:
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    side = 8 * theirs.vae_scale_factor
    expected = theirs(
        PROMPTS,
        negative_prompt="green",
        num_images_per_prompt=2,
        latents=latents.clone(),
        guidance_scale=scale,
        height=side,
        width=side,
        output_type="latent",
        use_resolution_binning=False,
        clean_caption=False,
    ).images
    with DyDiTPipeline.from_bundle(saved / "bundle", backend, text_encoder=saved / "diffusers") as ours:
        found = ours(
            prompt=PROMPTS,
            negative_prompt="green",
            num_images_per_prompt=2,
            latents=latents,
            guidance_scale=scale,
            output_type="latent",
        ).images
    assert ours.backend.bundle.manifest.sampling.steps == 20
    assert distance(found, expected.numpy()) < 1e-3
    assert distance(found[:2], expected.numpy()[2:]) > 0.01, "prompts make a difference"


def test_embeddings_give_what_their_prompts_give(saved: Path) -> None:
    model = load_checkpoint(saved / "diffusers").config
    texts = TextEncoder(saved / "diffusers").encode(model, PROMPTS, "green").texts
    with DyDiTPipeline.from_bundle(saved / "bundle", text_encoder=saved / "diffusers") as pipe:
        settings: dict[str, Any] = {"seed": 3, "output_type": "latent", "num_inference_steps": 3}
        by_prompt = pipe(prompt=PROMPTS, negative_prompt="green", **settings).images
        arrays = {
            "prompt_embeds": torch.from_numpy(texts.embeddings[:2]),
            "prompt_attention_mask": torch.from_numpy(texts.mask[:2]).long(),
            "negative_prompt_embeds": texts.embeddings[2:],
            "negative_prompt_attention_mask": texts.mask[2:],
        }
        np.testing.assert_array_equal(pipe(**arrays, **settings).images, by_prompt)
        alone = pipe(prompt=PROMPTS[1], negative_prompt="green", image_indices=[1], **settings).images
    assert distance(alone, by_prompt[1:]) < 1e-5, "an image does not depend on the texts of others"


def test_padding_has_no_effect(pixart_bundle: Any) -> None:
    rng = np.random.default_rng(0)
    short = rng.normal(size=(2, 5, 16)).astype(np.float32)
    long = np.concatenate([short, rng.normal(size=(2, 7, 16)).astype(np.float32)], axis=1)
    negative, mask = short[:1, :1], np.arange(12) < 5
    with DyDiTPipeline.from_bundle(pixart_bundle.path) as pipe:
        one = pipe(prompt_embeds=short, negative_prompt_embeds=negative, seed=0, output_type="latent").images
        other = pipe(
            prompt_embeds=long,
            prompt_attention_mask=np.tile(mask, (2, 1)),
            negative_prompt_embeds=negative,
            seed=0,
            output_type="latent",
        ).images
    assert distance(one, other) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "this model is conditioned by texts; give a file"),
        ({"class_labels": 3}, "takes texts, not class labels"),
        ({"prompt": "a fox"}, "prompts need a language model; open the bundle with text_encoder="),
        ({"prompt": "a", "prompt_embeds": np.zeros((1, 2, 16))}, "prompt and prompt_embeds are both given"),
        (
            {"prompt_embeds": np.zeros((1, 2, 15))},
            r"prompt_embeds has shape \[1, 2, 15\]; expected \[texts, tokens, 16\]",
        ),
        ({"prompt_embeds": np.full((1, 2, 16), np.nan)}, "holds NaN or infinite values"),
        ({"prompt_embeds": [[1.0]]}, "must be an array of NumPy or PyTorch"),
        (
            {"prompt_embeds": np.zeros((1, 2, 16)), "prompt_attention_mask": np.ones((1, 3))},
            "attention mask of prompt_em",
        ),
        ({"prompt_embeds": np.zeros((1, 2, 16))}, "guidance 4.5 needs a negative text"),
        (
            {"prompt_embeds": np.zeros((2, 2, 16)), "negative_prompt_embeds": np.zeros((2, 2, 16))},
            "expected one, for all",
        ),
        ({"prompt_embeds": np.zeros((1, 2, 16)), "num_images_per_prompt": 0}, "num_images_per_prompt"),
        ({"prompt_embeds": np.zeros((1, 2, 16)), "negative_prompt": "a"}, "negative_prompt goes with prompt"),
    ],
)
def test_what_does_not_fit_is_refused(pixart_bundle: Any, arguments: dict[str, Any], words: str) -> None:
    with DyDiTPipeline.from_bundle(pixart_bundle.path) as pipe, pytest.raises(ConfigError, match=words):
        pipe(**arguments, seed=0, output_type="latent")


def test_texts_for_a_model_of_classes_and_unknown_arguments_are_refused(make_bundle: Any) -> None:
    with DyDiTPipeline.from_bundle(make_bundle().path) as pipe:
        with pytest.raises(ConfigError, match="takes class labels, not texts; remove prompt"):
            pipe(prompt="a fox")
        with pytest.raises(ConfigError, match="class_labels is missing"):
            pipe()
        with pytest.raises(TypeError, match="unexpected argument 'promt'"):
            pipe(0, promt="a fox")


def test_a_run_without_texts_is_refused(pixart_bundle: Any) -> None:
    backend = open_backend("onnxruntime", pixart_bundle, BackendOptions(threads=1))
    with backend, pytest.raises(ConfigError, match="conditioned by texts"):
        backend.text_values(np.array([0]))


def test_texts_are_computed_once_and_within_their_budget(pixart_bundle: Any) -> None:
    texts = synthetic_texts(pixart_bundle.manifest.model, 6)
    with open_backend("onnxruntime", pixart_bundle.with_texts(texts), BackendOptions(threads=1)) as backend:
        asked: list[list[int]] = []
        compute = backend._text_values

        def counted(feeds: Any) -> Any:
            asked.append(
                [int(np.flatnonzero((texts.embeddings == each).all((1, 2)))[0]) for each in feeds["embeddings"]]
            )
            return compute(feeds)

        backend._text_values = counted  # type: ignore[method-assign]
        kept = TextConditioner(backend)
        first = kept.feeds(np.array([2, 2, 6, 6]))
        assert asked == [[2, 6]] and first["text_rows"].tolist() == [0, 0, 1, 1]
        kept.feeds(np.array([6, 2]))
        kept.feeds(np.array([0, 6]))
        kept.feeds(np.array([2, 6]))
        assert asked == [[2, 6], [0, 6]]
        small = TextConditioner(backend, budget=1)
        for labels in ([0, 6], [1, 6], [0, 6]):
            small.feeds(np.array(labels))
        assert asked[2:] == [[0, 6], [1, 6], [0, 6]]


def test_files_are_read_as_they_were_written(pixart_bundle: Any, tmp_path: Path) -> None:
    model = pixart_bundle.manifest.model
    rng = np.random.default_rng(1)
    texts = make_texts(model, rng.normal(size=(3, 4, 16)), None, rng.normal(size=(1, 6, 16)), None, ["a", "b", "c"])
    write_texts(tmp_path / "t.npz", texts)
    back = read_texts(tmp_path / "t.npz", model)
    assert back.prompts == ("a", "b", "c") and back.negative and back.count == 3 and back.digest == texts.digest
    np.testing.assert_array_equal(back.mask, texts.mask)
    assert texts.mask.sum(1).tolist() == [4, 4, 4, 6]
    np.savez(tmp_path / "features.npz", caption_feature=texts.embeddings[:1], attention_mask=texts.mask[:1])
    features = read_texts(tmp_path / "features.npz", model)
    assert features.count == 1 and not features.negative
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(ConfigError, match=r"other\.npz has no array 'prompt_embeds'"):
        read_texts(tmp_path / "other.npz", model)
    np.savez(tmp_path / "words.npz", prompt_embeds=np.array(["a"]))
    with pytest.raises(ConfigError, match=r"words\.npz: prompt_embeds is .*; expected numbers"):
        read_texts(tmp_path / "words.npz", model)


def test_an_encoder_that_is_none_is_refused(tmp_path: Path, text_encoder: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read as a text encoder with its tokenizer"):
        TextEncoder(tmp_path)
    assert TextEncoder(text_encoder)


def test_bert_encodes_prompts(bert_encoder: Path, pixart_config: Any) -> None:
    from transformers import AutoModel, AutoTokenizer

    encoder, model = TextEncoder(bert_encoder), pixart_config.model_copy(update={"caption_channels": 20})
    texts = encoder.encode(model, PROMPTS, "green").texts
    inputs = AutoTokenizer.from_pretrained(bert_encoder)(["photo of the green owl"], return_tensors="pt")
    with torch.no_grad():
        wanted = AutoModel.from_pretrained(bert_encoder).eval()(**inputs).last_hidden_state[0].numpy()
    assert encoder.channels == 20 and texts.mask[1].sum() == len(wanted) == 7
    np.testing.assert_allclose(texts.embeddings[1, :7], wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="reads at most 16 tokens, not 17"):
        encoder.encode(model.model_copy(update={"text_tokens": 17}), PROMPTS)


@pytest.mark.parametrize("kind", ["clip", "bart"])
def test_the_text_part_of_a_larger_model_is_used(kind: str, text_encoder: Path, tmp_path: Path) -> None:
    from transformers import BartConfig, BartModel, CLIPConfig, CLIPModel

    torch.manual_seed(6)
    small: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    if kind == "clip":
        texts = {**small, "hidden_size": 12, "vocab_size": 13, "max_position_embeddings": 16, "eos_token_id": 1}
        images = {**small, "hidden_size": 8, "image_size": 8, "patch_size": 4}
        whole = CLIPModel(CLIPConfig(text_config=texts, vision_config=images)).eval()
        part = whole.text_model
    else:
        layers = {"encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
        sizes = {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "d_model": 12, "vocab_size": 13}
        whole = BartModel(BartConfig(**sizes, **layers, max_position_embeddings=16, pad_token_id=0)).eval()
        part = whole.get_encoder()
    shutil.copytree(text_encoder / "tokenizer", tmp_path, dirs_exist_ok=True)
    whole.save_pretrained(tmp_path)
    encoder = TextEncoder(tmp_path)
    rows, cut = encoder.embed(["a red fox", "the owl " * 9], 12)
    ids = torch.tensor([[3, 4, 6, 1]])  # a, red, fox, end
    with torch.no_grad():
        wanted = part(ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0].numpy()
    assert (encoder.channels, cut, [len(each) for each in rows]) == (12, 1, [4, 12])
    np.testing.assert_allclose(rows[0], wanted, rtol=1e-4, atol=1e-5)


def test_prompts_that_are_too_long_are_named(text_encoder: Path, pixart_config: Any) -> None:
    encoded = TextEncoder(text_encoder).encode(pixart_config, ["a fox", "a fox in the snow " * 4])
    assert encoded.cut == (1,) and encoded.texts.mask.sum(1).tolist() == [3, 12, 1]
    assert encoded.texts.prompts == ("a fox", "a fox in the snow " * 4)
