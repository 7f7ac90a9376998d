"""The options of texts, for models that they condition."""

from __future__ import annotations

from collections.abc import Callable

import click

from dydit.commands.options import PATH, Command, all_of


def texts_option(what: str) -> Callable[[Command], Command]:
    """`--texts`. `what`: how the command uses the file, or does without it."""
    return click.option(
        "--texts",
        type=PATH,
        metavar="FILE.npz",
        help=f"Texts for a model that they condition, as `dydit encode` writes them. {what}",
    )


def prompt_options(required: bool) -> Callable[[Command], Command]:
    """`--prompt`, `--prompts`, `--negative-prompt` and `--text-encoder`. `required`: whether the last one is."""
    return all_of(
        click.option("--prompt", multiple=True, metavar="TEXT", help="A prompt. Repeatable."),
        click.option("--prompts", type=PATH, metavar="FILE", help="More prompts: a text file with one in each line."),
        click.option(
            "--negative-prompt",
            default="",
            show_default=False,
            metavar="TEXT",
            help="What guidance leads away from.  [default: an empty prompt]",
        ),
        click.option(
            "--text-encoder",
            required=required,
            metavar="FOLDER",
            help="The text encoder that the model was trained with (T5, CLIP, BERT or another one of transformers): a "
            "folder with it and its tokenizer, the folder of a diffusers pipeline, or the name of a repository of the "
            "Hugging Face Hub.",
        ),
    )
