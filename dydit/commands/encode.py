"""`dydit encode`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dydit.commands.group import Command
from dydit.commands.options import PATH, checkpoint_options, json_option
from dydit.commands.output import print_json, say
from dydit.commands.suggestions import next_line
from dydit.commands.text_options import prompt_options
from dydit.errors import ConfigError
from dydit.extras import CHECKPOINTS, TEXTS, require
from dydit.words import counted

if TYPE_CHECKING:
    from dydit.models.config import ModelConfig
    from dydit.runtime.prompts import Encoded


@click.command(cls=Command)
@click.argument("model", type=PATH)
@prompt_options(required=True)
@click.option("--out", type=PATH, required=True, help="File for the encoded texts (.npz). Must not exist.")
@checkpoint_options
@json_option
def command(
    model: Path,
    prompt: Sequence[str],
    prompts: Path | None,
    negative_prompt: str,
    text_encoder: str,
    out: Path,
    reading: dict[str, Any],
    as_json: bool,
) -> None:
    """Encode prompts for MODEL, a bundle or a checkpoint that texts condition.

    The file holds what the language model gives for each prompt and for the negative prompt. `dydit sample`,
    calibrate, parity and bench take it as --texts.
    """
    require("dydit encode", TEXTS)
    from dydit.files import atomic_file, require_absent
    from dydit.runtime.text_files import write_texts

    require_absent(out)
    encoded = encode(config_of(model, reading), prompt, prompts, negative_prompt, text_encoder)
    with atomic_file(out) as file:
        write_texts(file, encoded.texts)
    if as_json:
        print_json({"out": str(out), "texts": encoded.texts.count, "tokens": encoded.texts.tokens, "cut": encoded.cut})
        return
    say(
        f"{out}: {counted(encoded.texts.count, 'text')} of {encoded.texts.tokens} tokens, and the negative one",
        *cut_lines(encoded),
        next_line("sample", "BUNDLE", "--texts", out, "--out", "SAMPLES"),
    )


def encode(
    model: ModelConfig, prompt: Sequence[str], prompts: Path | None, negative: str, text_encoder: str
) -> Encoded:
    """The prompts of a command line, encoded for a model."""
    from dydit.runtime.prompts import TextEncoder

    if model.text is None:
        raise ConfigError("this model takes class labels, not texts; remove the prompts")
    every = [*prompt, *(_lines(prompts) if prompts else [])]
    if not every:
        raise ConfigError("there are no prompts; give --prompt TEXT, or --prompts FILE with one in each line")
    return TextEncoder(text_encoder).encode(model, every, negative)


def cut_lines(encoded: Encoded) -> list[str]:
    """What is said about prompts that are too long."""
    if not encoded.cut:
        return []
    first = ", ".join(map(str, encoded.cut[:5]))
    return [f"longer than {encoded.texts.tokens} tokens, so the end has no effect: prompt {first}"]


def config_of(path: Path, reading: dict[str, Any]) -> ModelConfig:
    """The configuration of a bundle or a checkpoint."""
    from dydit.bundle.bundle import Bundle
    from dydit.bundle.manifest import MANIFEST

    if (path / MANIFEST).is_file():
        return Bundle.open(path, verify=False).manifest.model
    require("reading a checkpoint", CHECKPOINTS)
    from dydit.checkpoints.checkpoint import load_checkpoint

    return load_checkpoint(path, **reading).config


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} cannot be read as text: {error}; give a UTF-8 file with one prompt in each line"
        ) from error
    return [line.strip() for line in text.splitlines() if line.strip()]
