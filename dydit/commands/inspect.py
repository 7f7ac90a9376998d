"""`dydit inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dydit.commands.group import Command
from dydit.commands.options import PATH, TRAINING, checkpoint_options, json_option
from dydit.commands.output import print_json, say_files
from dydit.extras import CHECKPOINTS, require
from dydit.inspection.gpus import GPUS


@click.command(cls=Command)
@click.argument("path", metavar="CHECKPOINT|BUNDLE", type=PATH, required=False)
@click.option("--out", type=PATH, help="Also draw the masks and the plan as PNG files in this folder. Must not exist.")
@click.option(
    "--roofline",
    metavar="GPU",
    type=click.Choice(list(GPUS), case_sensitive=False),
    help=f"Also estimate bytes, FLOPs and the lowest possible time of a step on a GPU, from its datasheet: "
    f"{', '.join(GPUS)}.",
)
@click.option(
    "--preset",
    metavar="NAME",
    help="Inspect a published model without weights or routers in place of a file: DiT-XL/2, PixArt-XL/2, "
    "imagenet256-H/2 (a U-ViT), ...",
)
@checkpoint_options
@json_option
@click.pass_context
def command(
    context: click.Context,
    path: Path | None,
    out: Path | None,
    roofline: str | None,
    preset: str | None,
    reading: dict[str, Any],
    as_json: bool,
) -> None:
    """Show what a checkpoint or a bundle contains: sizes, cost, masks over time, and the possible plans."""
    if path is None and preset is None:
        raise click.UsageError("dydit inspect needs CHECKPOINT|BUNDLE, or --preset NAME", context)
    if preset is not None:
        for name, value in {"CHECKPOINT|BUNDLE": path, "--out": out}.items():
            if value is not None:
                raise click.UsageError(f"--preset NAME is a model without weights; remove {name} or --preset")
    is_bundle = path is not None and (path / "manifest.json").exists()
    if is_bundle and (given := next((name for name in TRAINING if reading[name] is not None), None)):
        raise click.UsageError(f"--{given} cannot change a bundle; give it to `dydit export`")
    needed = () if is_bundle or preset is not None else CHECKPOINTS
    require("dydit inspect", [*needed, *(["matplotlib"] if out else [])])
    from dydit.files import new_folder, require_absent
    from dydit.inspection.inspect import inspect, inspect_preset

    if out is not None:
        require_absent(out)
    if path is not None:
        inspection = inspect(path, roofline, **reading)
    else:
        assert preset is not None
        inspection = inspect_preset(preset, roofline)
    if out is not None:
        with new_folder(out) as folder:
            inspection.write_pictures(folder)
    if as_json:
        print_json(inspection.to_json())
        return
    click.echo(inspection.text())
    if out is not None:
        say_files(out)
