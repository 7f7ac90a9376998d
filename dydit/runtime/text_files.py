"""Files of texts that a language model has encoded, and the texts of a run."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np

from dydit.bundle.bundle import Bundle
from dydit.bundle.texts import Texts, make_texts, synthetic_texts
from dydit.errors import ConfigError
from dydit.models.config import ModelConfig
from dydit.runtime.noise_source import read_arrays

EMBEDDINGS, MASK = "prompt_embeds", "prompt_attention_mask"
"""Arrays of a file of texts: f32 or f16 [T, L, channels], and 0 or 1 [T, L]. With the prefix `negative_`, [1, ...]."""
_OTHER_NAMES = {"caption_feature": EMBEDDINGS, "attention_mask": MASK}  # features as PixArt's code writes them
PROMPTS = "prompts"


def read_texts(path: Path, model: ModelConfig) -> Texts:
    """The texts in an `.npz` file, for a model. Raises `ConfigError` in one line for what does not fit."""
    names = (EMBEDDINGS, MASK, f"negative_{EMBEDDINGS}", f"negative_{MASK}", PROMPTS, *_OTHER_NAMES)
    arrays = {_OTHER_NAMES.get(name, name): array for name, array in read_arrays(path, (), "texts", names).items()}
    if EMBEDDINGS not in arrays:
        raise ConfigError(f"{path} has no array {EMBEDDINGS!r} (embeddings [texts, tokens, channels])")
    for name, array in arrays.items():
        wanted = np.str_ if name == PROMPTS else np.number if "embeds" in name else None
        if wanted is not None and not np.issubdtype(array.dtype, wanted):
            raise ConfigError(
                f"{path}: {name} is {array.dtype.name}; expected {'text' if name == PROMPTS else 'numbers'}"
            )
    prompts = arrays.get(PROMPTS)
    try:
        return make_texts(
            model,
            arrays[EMBEDDINGS],
            arrays.get(MASK),
            arrays.get(f"negative_{EMBEDDINGS}"),
            arrays.get(f"negative_{MASK}"),
            None if prompts is None else [str(each) for each in prompts.reshape(-1)],
        )
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def write_texts(path: Path | BinaryIO, texts: Texts) -> None:
    """Write what `read_texts` reads."""
    count = texts.count
    arrays = {EMBEDDINGS: texts.embeddings[:count], MASK: texts.mask[:count].astype(np.uint8)}
    if texts.negative:
        arrays |= {f"negative_{EMBEDDINGS}": texts.embeddings[count:]}
        arrays |= {f"negative_{MASK}": texts.mask[count:].astype(np.uint8)}
    if texts.prompts is not None:
        arrays[PROMPTS] = np.array(texts.prompts, np.str_)
    np.savez(path, **arrays)  # type: ignore[arg-type]


def texts_for(model: ModelConfig, file: Path | None, count: int) -> Texts | None:
    """The texts of a run that compares or times: those of a file or, without one, `count` random ones.

    None for a model that takes class labels. Raises `ConfigError` for a file that such a model cannot use.
    """
    if file is not None:
        return read_texts(file, model)
    return None if model.text is None else synthetic_texts(model, count)


def with_texts_for(bundle: Bundle, file: Path | None, count: int) -> Bundle:
    """The bundle with the texts of `texts_for`, or as it is."""
    texts = texts_for(bundle.manifest.model, file, count)
    return bundle if texts is None else bundle.with_texts(texts)
