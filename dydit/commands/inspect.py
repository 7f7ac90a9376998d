"""`dydit inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dydit.commands.group import Command
from dydit.commands.options import PATH, TRAINING, checkpoint_options, json_option
from dydit.commands.output import print_json, say_files
from dydit.extras import CHECKPOINTS, require


@click.command(cls=Command)
@click.argument("path", metavar="CHECKPOINT|BUNDLE", type=PATH)
@click.option("--out", type=PATH, help="Also draw the masks and the plan as PNG files in this folder. Must not exist.")
@checkpoint_options
@json_option
def command(path: Path, out: Path | None, reading: dict[str, Any], as_json: bool) -> None:
    """Show what a checkpoint or a bundle contains: sizes, cost, masks over time, and the possible plans."""
    is_bundle = (path / "manifest.json").exists()
    if is_bundle and (given := next((name for name in TRAINING if reading[name] is not None), None)):
        raise click.UsageError(f"--{given} cannot change a bundle; give it to `dydit export`")
    require("dydit inspect", [*(() if is_bundle else CHECKPOINTS), *(["matplotlib"] if out else [])])
    from dydit.files import new_folder, require_absent
    from dydit.inspection.inspect import inspect

    if out is not None:
        require_absent(out)
    inspection = inspect(path, **reading)
    if out is not None:
        with new_folder(out) as folder:
            inspection.write_pictures(folder)
    if as_json:
        print_json(inspection.to_json())
        return
    click.echo(inspection.text())
    if out is not None:
        say_files(out)
