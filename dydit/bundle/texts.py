"""The texts of a run, encoded by a language model: what a model that texts condition takes in place of class labels.

Text i is label i. The negative text, which stands for "no text" in guidance, is the label after the last one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dydit.errors import ConfigError
from dydit.models.config import ModelConfig, TextSpec


@dataclass(frozen=True, eq=False)
class Texts:
    """`embeddings` f32 [T, L, channels], `mask` bool [T, L] (False: padding). `negative`: whether the last is negative.

    `prompts`: the texts themselves, without the negative one, if they are known.
    """

    embeddings: np.ndarray
    mask: np.ndarray
    negative: bool
    prompts: tuple[str, ...] | None = None

    @property
    def count(self) -> int:
        """The number of texts, without the negative one."""
        return len(self.embeddings) - self.negative

    @property
    def tokens(self) -> int:
        """L, the tokens of every text, with padding."""
        return int(self.embeddings.shape[1])

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the embeddings and masks."""
        digest = hashlib.sha256(repr((self.embeddings.shape, self.negative)).encode())
        digest.update(self.embeddings.tobytes() + self.mask.tobytes())
        return digest.hexdigest()


def make_texts(
    model: ModelConfig,
    embeddings: np.ndarray,
    mask: np.ndarray | None = None,
    negative_embeddings: np.ndarray | None = None,
    negative_mask: np.ndarray | None = None,
    prompts: Sequence[str] | None = None,
) -> Texts:
    """Texts for a model: embeddings [T, L, channels], mask [T, L] (by default all tokens), negative ones [1, L', ...].

    Shorter ones of the two are padded. Raises `ConfigError`, in one line, for what does not fit the model.
    """
    spec = model.text
    if spec is None:
        raise ConfigError("this model takes class labels, not texts; remove the texts")
    parts = [_checked(spec, embeddings, mask, "prompt_embeds")]
    if negative_embeddings is not None:
        negative = _checked(spec, negative_embeddings, negative_mask, "negative_prompt_embeds")
        if len(negative[0]) != 1:
            raise ConfigError(f"negative_prompt_embeds has {len(negative[0])} texts; expected one, for all images")
        parts.append(negative)
    elif negative_mask is not None:
        raise ConfigError("negative_prompt_attention_mask is given without negative_prompt_embeds")
    tokens = max(each.shape[1] for each, _ in parts)
    joined = [np.pad(each, ((0, 0), (0, tokens - each.shape[1]), (0, 0))) for each, _ in parts]
    masks = [np.pad(each, ((0, 0), (0, tokens - each.shape[1]))) for _, each in parts]
    known = None if prompts is None else tuple(prompts)
    if known is not None and len(known) != len(embeddings):
        raise ConfigError(f"there are {len(known)} prompts for {len(embeddings)} embeddings")
    return Texts(np.concatenate(joined), np.concatenate(masks), len(parts) > 1, known)


def synthetic_texts(model: ModelConfig, count: int, seed: int = 0) -> Texts:
    """Random embeddings of texts of different lengths, and of a negative text of one token: to time and to compare."""
    spec = model.text
    assert spec is not None
    rng = np.random.default_rng(seed)
    embeddings = rng.standard_normal((count + 1, spec.tokens, spec.channels), np.float32) * np.float32(0.3)
    lengths = np.append(rng.integers(max(1, spec.tokens // 8), spec.tokens, count, endpoint=True), 1)
    return Texts(embeddings, np.arange(spec.tokens) < lengths[:, None], negative=True)


def _checked(
    spec: TextSpec, embeddings: np.ndarray, mask: np.ndarray | None, name: str
) -> tuple[np.ndarray, np.ndarray]:
    if embeddings.ndim == 2:
        embeddings = embeddings[None]
    if embeddings.ndim != 3 or embeddings.shape[2] != spec.channels or 0 in embeddings.shape:
        raise ConfigError(
            f"{name} has shape {list(embeddings.shape)}; expected [texts, tokens, {spec.channels}], the output of the "
            "language model that the model was trained with"
        )
    embeddings = embeddings.astype(np.float32)
    if not np.isfinite(embeddings).all():
        raise ConfigError(f"{name} holds NaN or infinite values; encode the texts again")
    if mask is None:
        return embeddings, np.ones(embeddings.shape[:2], bool)
    mask = np.asarray(mask).reshape(-1, np.shape(mask)[-1]) if np.ndim(mask) else np.asarray(mask)
    if mask.shape != embeddings.shape[:2] or not np.isin(mask, (0, 1)).all():
        raise ConfigError(
            f"the attention mask of {name} has shape {list(mask.shape)}; expected {list(embeddings.shape[:2])}, 0 and 1"
        )
    return embeddings, mask.astype(bool)
