"""`dydit convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dydit.commands.group import Command
from dydit.commands.options import PATH, checkpoint_options, space_option
from dydit.commands.output import say
from dydit.commands.progress import show_progress
from dydit.commands.suggestions import next_line
from dydit.extras import CHECKPOINTS, require

LARGE = 1 << 30
"""Bytes of a checkpoint from which on a conversion takes long enough to show progress."""


@click.command(cls=Command)
@click.argument("checkpoint", type=PATH)
@click.option("--out", type=PATH, required=True, help="The .safetensors file to write. Must not exist.")
@space_option
@checkpoint_options
def command(checkpoint: Path, out: Path, space: str | None, reading: dict[str, Any]) -> None:
    """Convert a checkpoint to dydit's own format: a safetensors file that contains the model's configuration.

    CHECKPOINT is a state dict of a DiT, a DyDiT or a U-ViT, a training file or folder that contains one, a diffusers
    DiT folder, or a file written by dydit. No code in it is run. The new file also states how the model was trained, if
    CHECKPOINT or the options do. A file that does not state it is read as a model as it was published: a DiT predicts
    epsilon over linear betas, a U-ViT epsilon on the VP-SDE. A file with only the weights of a SiT cannot be told from
    a DiT: give --prediction velocity.
    """
    require("dydit convert", CHECKPOINTS)
    from dydit.checkpoints.checkpoint import convert
    from dydit.models.config import Space
    from dydit.models.registry import architecture_of

    with show_progress("convert") as progress:
        if checkpoint.is_file() and checkpoint.stat().st_size >= LARGE:
            progress(0, 1)
        converted = convert(checkpoint, out, space=Space(space) if space else None, **reading)
    config = converted.config
    kind = "dynamic" if config.dynamic else "static"
    weights = f" ({converted.metadata['weights']} weights)" if "weights" in converted.metadata else ""
    say(
        f"{out}: {kind} {architecture_of(config).title} ({config.summary}), "
        f"read as {converted.metadata['source']}{weights}",
        *([] if config.process is None else [f"The model {config.process.words}"]),
        *converted.notes,
        next_line("inspect", out),
        next_line("export", out, "--out", "BUNDLE"),
    )
