"""`dydit quickstart`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dydit.commands.exit_codes import CHECK_FAILED, OK
from dydit.commands.group import Command
from dydit.commands.options import PATH, cfg_scale_option, json_option, parse_options, seed_option
from dydit.commands.output import print_json, say
from dydit.commands.progress import show_progress
from dydit.commands.suggestions import next_line
from dydit.extras import CHECKPOINTS, GRAPHS, REPORTS, require


@click.command(cls=Command)
@click.option("--out", type=PATH, default=Path("quickstart"), help="Folder for all results.")
@click.option(
    "--overwrite",
    is_flag=True,
    help="Replace the results of an earlier quickstart in --out. Other files in the folder are not touched.",
)
@click.option("--steps", type=click.IntRange(1, 1000), default=250, help="Number of sampling steps.")
@click.option("--per-class", type=click.IntRange(min=1), default=4, metavar="N", help="Number of images per class.")
@cfg_scale_option(2.0)
@seed_option
@click.option("--threads", type=click.IntRange(min=0), default=0, help="Number of CPU threads. 0: one per core.")
@json_option
def command(out: Path, overwrite: bool, as_json: bool, **settings: Any) -> int:
    """Export, sample, check and time the small models that come with dydit.

    This takes about a minute on a CPU and downloads nothing.

    Exports a dynamic and a static model of handwritten digits, samples the dynamic one, compares its images with
    PyTorch's, times both models, and writes report.html. Run the same command again to resume an interrupted run.
    """
    require("dydit quickstart", [*CHECKPOINTS, *GRAPHS, "onnxruntime", *REPORTS])
    from dydit.quickstart.quickstart import QuickstartConfig, run_quickstart

    config = parse_options(QuickstartConfig, settings)
    with show_progress("quickstart") as progress:
        result = run_quickstart(out, config, overwrite, progress.stage)
    if as_json:
        print_json(result.to_json())
    else:
        click.echo(result.text())
        say(
            f"Look at {result.report} and {out / 'samples.png'}",
            next_line("inspect", out / "bundle"),
            next_line("sample", out / "bundle", "--labels", "0-9", "--out", "SAMPLES"),
        )
    return OK if result.ok else CHECK_FAILED
