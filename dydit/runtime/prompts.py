"""Prompts to texts, by the language model that a text-conditioned model was trained with: a T5 encoder.

It is computed as diffusers' PixArtAlphaPipeline does: prompts in lower case and without blanks around them, cut or
padded to the tokens of the model. diffusers also removes HTML and web addresses, if two more packages are installed.
"""

from __future__ import annotations

from collections.abc import Sequence
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


@dataclass(frozen=True)
class Encoded:
    """`texts`, and the numbers of the prompts that were longer than the model's tokens and lost their end."""

    texts: Texts
    cut: tuple[int, ...]


class TextEncoder:
    """A T5 encoder and its tokenizer, loaded once.

    `source`: a folder with both, the folder of a diffusers pipeline (`text_encoder/` and `tokenizer/`), or the name of
    a repository of the Hugging Face Hub. Weights are read from safetensors files only. Raises `ConfigError` if they
    cannot be read, `BackendError` if packages are missing.
    """

    def __init__(self, source: Path | str, device: str = "cpu"):
        require("encoding prompts", TEXTS)
        from transformers import AutoTokenizer, T5EncoderModel

        model, tokenizer = _parts(source)
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer)
            encoder: Any = T5EncoderModel.from_pretrained(model, use_safetensors=True)
        except (OSError, ValueError, ImportError) as error:
            raise ConfigError(
                f"{source} cannot be read as a T5 encoder with its tokenizer: {one_line(error)}; give the folder of a "
                "diffusers pipeline, or a folder with config.json, model.safetensors and the tokenizer"
            ) from error
        self._encoder = encoder.eval().to(device)

    def encode(self, model: ModelConfig, prompts: Sequence[str], negative: str | None = "") -> Encoded:
        """The prompts as texts for a model. `negative`: the negative prompt; None: guidance is not possible."""
        if not prompts:
            raise ConfigError("there are no prompts; give at least one")
        if len(prompts) > MAX_PROMPTS:
            raise ConfigError(f"there are {len(prompts):,} prompts; give at most {MAX_PROMPTS:,} at once")
        assert model.text is not None
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

    def _encode(self, prompts: Sequence[str], tokens: int) -> tuple[np.ndarray, np.ndarray]:
        import torch

        inputs = self._tokenizer(
            [prepared(each) for each in prompts],
            padding="max_length",
            max_length=tokens,
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(self._encoder.device)
        with torch.inference_mode():
            out = self._encoder(inputs.input_ids, attention_mask=inputs.attention_mask)[0]
        return out.float().cpu().numpy(), inputs.attention_mask.cpu().numpy()


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
