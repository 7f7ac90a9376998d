"""The texts of a pipeline's call, as diffusers' PixArtAlphaPipeline takes them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import numpy as np

from dydit.bundle.texts import Texts, make_texts
from dydit.errors import ConfigError
from dydit.models.config import TEXTS_NEEDED, ModelConfig
from dydit.runtime.arguments import short, whole_number
from dydit.runtime.prompts import TextEncoder


class TextArguments(TypedDict, total=False):
    """`prompt`, `negative_prompt`: texts, for a pipeline with a text encoder; the negative one is "" by default.

    In place of them, what the language model gives, as arrays of NumPy or PyTorch: `prompt_embeds` [T, L, channels],
    `prompt_attention_mask` [T, L] (by default all tokens), and the same for one negative text, which guidance needs.
    `num_images_per_prompt`: images of each text, one after another, by default 1.
    """

    prompt: str | Sequence[str] | None
    negative_prompt: str | None
    prompt_embeds: Any
    prompt_attention_mask: Any
    negative_prompt_embeds: Any
    negative_prompt_attention_mask: Any
    num_images_per_prompt: int


def texts_of_call(
    model: ModelConfig, arguments: TextArguments, encoder: Callable[[], TextEncoder]
) -> tuple[Texts, list[int]]:
    """The texts, and the number of the text of each image. `encoder` is called if there are prompts.

    Raises `ConfigError`, naming the argument, for what does not fit.
    """
    repeats = whole_number(arguments.get("num_images_per_prompt", 1), "num_images_per_prompt", 1, 1 << 16)
    arrays = {name: _array(value, name) for name, value in arguments.items() if "prompt_" in name and name in _ARRAYS}
    given = {name: array for name, array in arrays.items() if array is not None}
    prompt, negative = arguments.get("prompt"), arguments.get("negative_prompt")
    if prompt is not None and given:
        raise ConfigError(f"prompt and {next(iter(given))} are both given; give one of them")
    if prompt is not None:
        texts = _encoded(model, prompt, "" if negative is None else negative, encoder())
    elif "prompt_embeds" not in given:
        raise ConfigError(TEXTS_NEEDED)
    elif negative is not None:
        raise ConfigError("negative_prompt goes with prompt; give negative_prompt_embeds")
    else:
        texts = make_texts(model, *(given.get(name) for name in _ARRAYS))  # type: ignore[arg-type]
    return texts, [number for number in range(texts.count) for _ in range(repeats)]


_ARRAYS = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")


def _encoded(model: ModelConfig, prompt: Any, negative: Any, encoder: TextEncoder) -> Texts:
    prompts = [prompt] if isinstance(prompt, str) else list(prompt) if isinstance(prompt, list | tuple) else [prompt]
    for each in (*prompts, negative):
        if not isinstance(each, str):
            raise ConfigError(f"prompts must be text, not {short(each)}")
    encoded = encoder.encode(model, prompts, negative)
    if encoded.cut:
        assert model.text is not None
        warnings.warn(
            f"prompt {encoded.cut[0]} is longer than {model.text.tokens} tokens; its end has no effect", stacklevel=4
        )
    return encoded.texts


def _array(value: Any, name: str) -> np.ndarray | None:
    if value is None or isinstance(value, np.ndarray):
        return value
    if hasattr(value, "detach"):  # a tensor of PyTorch, of any float type and device
        value = value.detach().cpu()
        array: np.ndarray = (value.float() if value.is_floating_point() else value).numpy()
        return array
    raise ConfigError(f"{name} must be an array of NumPy or PyTorch, not {short(value)}")
