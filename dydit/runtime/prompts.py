"""Prompts and captions to texts, by the language model that a text-conditioned model was trained with.

That is a T5 encoder, CLIP's text model, or any other that `transformers` loads as a model with a tokenizer. A text is
what the last layer gives for each token. It is computed as diffusers' PixArtAlphaPipeline does: prompts in lower case
and without blanks around them, cut or padded to the tokens of the model. diffusers also removes HTML and web addresses,
if two more packages are installed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dydit.bundle.texts import Texts, make_texts
from dydit.errors import ConfigError, one_line
from dydit.extras import TEXTS, require
from dydit.files import user_path
from dydit.models.config import ModelConfig

MAX_PROMPTS = 10_000
AT_ONCE = 8
_TEXT_MODELS = {
    **{"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"},
    **{"clip": "CLIPTextModel", "clip_text_model": "CLIPTextModel", "siglip": "SiglipTextModel"},
}
"""Classes that load the text encoder alone, by the `model_type` of its configuration."""


@dataclass(frozen=True)
class Encoded:
    """`texts`, and the numbers of the prompts that were longer than the model's tokens and lost their end."""

    texts: Texts
    cut: tuple[int, ...]


class TextEncoder:
    """A language model and its tokenizer, loaded once.

    `source`: a folder with both, the folder of a diffusers pipeline (`text_encoder/` and `tokenizer/`), or the name of
    a repository of the Hugging Face Hub. Weights are read from safetensors files only, and no code of a repository is
    run. Raises `ConfigError` if they cannot be read, `BackendError` if packages are missing.
    """

    def __init__(self, source: Path | str, device: str = "cpu"):
        require("encoding prompts", TEXTS)
        from transformers import AutoTokenizer

        self.source = str(source)
        model, tokenizer = _parts(source)
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer)
            encoder: Any = _language_model(model)
        except (OSError, ValueError, ImportError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"{source} cannot be read as a text encoder with its tokenizer: {one_line(error)}; give the folder of "
                "a diffusers pipeline, or a folder with config.json, model.safetensors and the tokenizer"
            ) from error
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token  # the mask tells padding from an end
        self._encoder = encoder.eval().to(device)

    @property
    def channels(self) -> int:
        """Channels of what the language model gives for a token."""
        config = self._encoder.config
        return int(getattr(config, "hidden_size", None) or config.d_model)

    def require_tokens(self, tokens: int) -> None:
        """Raise `ConfigError` if the language model cannot read as many tokens."""
        most = getattr(self._encoder.config, "max_position_embeddings", None)
        if most is not None and tokens > (most := min(most, self._tokenizer.model_max_length)):
            raise ConfigError(f"{self.source} reads at most {most} tokens, not {tokens}")

    def embed(
        self,
        captions: Sequence[str],
        tokens: int,
        at_once: int = AT_ONCE,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> tuple[list[np.ndarray], int]:
        """What the language model gives for each caption, float32 [its tokens, channels], and how many were cut.

        They are cut to `tokens`. Captions of similar length are computed together, `at_once` of them, with as little
        padding as there can be.
        """
        lengths = [len(ids) for ids in self._tokenizer([prepared(each) for each in captions], verbose=False).input_ids]
        order = sorted(range(len(captions)), key=lambda at: (lengths[at], at))
        rows: dict[int, np.ndarray] = {}
        for first in range(0, len(order), at_once):
            progress(first, len(order))
            group = order[first : first + at_once]
            embeddings, masks = self._encode([captions[at] for at in group], tokens, padding="longest")
            rows |= {at: embeddings[row][masks[row] > 0] for row, at in enumerate(group)}
        progress(len(order), len(order))
        return [rows[at] for at in range(len(captions))], sum(length > tokens for length in lengths)

    def encode(self, model: ModelConfig, prompts: Sequence[str], negative: str | None = "") -> Encoded:
        """The prompts as texts for a model. `negative`: the negative prompt; None: guidance is not possible."""
        if not prompts:
            raise ConfigError("there are no prompts; give at least one")
        if len(prompts) > MAX_PROMPTS:
            raise ConfigError(f"there are {len(prompts):,} prompts; give at most {MAX_PROMPTS:,} at once")
        assert model.text is not None
        self.require_tokens(model.text.tokens)
        every = [*prompts, *([] if negative is None else [negative])]
        pieces = [self._encode(every[at : at + AT_ONCE], model.text.tokens) for at in range(0, len(every), AT_ONCE)]
        embeddings, masks = (np.concatenate(each) for each in zip(*pieces, strict=True))
        last = len(prompts)
        texts = make_texts(
            model,
            embeddings[:last],
            masks[:last],
            None if negative is None else embeddings[last:],
            None if negative is None else masks[last:],
            prompts,
        )
        lengths = [len(self._tokenizer(prepared(each)).input_ids) for each in prompts]
        return Encoded(texts, tuple(number for number, each in enumerate(lengths) if each > model.text.tokens))

    def _encode(
        self, prompts: Sequence[str], tokens: int, padding: str = "max_length"
    ) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings float32 [n, L, channels] and masks int64 [n, L]. `padding`: as the tokenizer names it."""
        import torch

        inputs = self._tokenizer(
            [prepared(each) for each in prompts],
            padding=padding,
            padding_side="right",
            max_length=tokens,
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(self._encoder.device)
        with torch.inference_mode():
            out = self._encoder(inputs.input_ids, attention_mask=inputs.attention_mask)[0]
        return out.float().cpu().numpy(), inputs.attention_mask.cpu().numpy()


def _language_model(name: str) -> Any:
    """The part of a model of `transformers` that reads text: its encoder, where it has a decoder or images as well."""
    import transformers

    settings: dict[str, Any] = {"use_safetensors": True}
    kind = transformers.AutoConfig.from_pretrained(name).model_type
    if (text_only := _TEXT_MODELS.get(kind)) is not None:
        return getattr(transformers, text_only).from_pretrained(name, **settings)
    model = transformers.AutoModel.from_pretrained(name, **settings)
    return model.get_encoder() if model.config.is_encoder_decoder else model


def _parts(source: Path | str) -> tuple[str, str]:
    """Where the model and the tokenizer are: folders, or twice the name of a repository."""
    folder = user_path(source)
    if (folder / "text_encoder").is_dir():
        return str(folder / "text_encoder"), str(folder / "tokenizer")
    name = str(folder) if folder.exists() else str(source)
    return name, name


def prepared(prompt: str) -> str:
    """A prompt as the language model reads it."""
    return prompt.lower().strip()
