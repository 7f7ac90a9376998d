"""`dydit parity`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dydit.commands.exit_codes import CHECK_FAILED, OK
from dydit.commands.group import Command
from dydit.commands.label_options import labels_option
from dydit.commands.options import (
    PATH,
    backend_options,
    cfg_scale_option,
    checkpoint_options,
    json_option,
    parse_options,
    sampling_options,
    seed_option,
)
from dydit.commands.output import print_json, say, say_files
from dydit.commands.progress import show_progress
from dydit.commands.suggestions import backend_words, next_line
from dydit.commands.text_options import texts_option
from dydit.extras import CHECKPOINTS, GRAPHS, backend_modules, require
from dydit.reports.text import aligned

if TYPE_CHECKING:
    from dydit.reports.parity_report import ParityReport


@click.command(cls=Command)
@click.argument("bundle", type=PATH)
@click.option(
    "--against",
    type=PATH,
    required=True,
    metavar="CHECKPOINT",
    help="The checkpoint that the bundle was exported from.",
)
@click.option("--out", type=PATH, required=True, help="Folder for parity.json and parity.png. Must not exist.")
@labels_option(
    help="Class numbers, one image for each: 207,360 or 0-9. Repeatable.  [default: 0,1; for an unconditional model, "
    "two images]"
)
@texts_option("Without it, random ones are compared. --labels are their numbers.")
@seed_option
@cfg_scale_option()
@click.option(
    "--every", type=click.IntRange(min=1), default=1, metavar="N", help="Compare every n-th step, and the last one."
)
@sampling_options
@checkpoint_options
@backend_options
@json_option
def command(bundle: Path, against: Path, out: Path, reading: dict[str, Any], as_json: bool, **settings: Any) -> int:
    """Compare a bundle with its checkpoint.

    The checks are masks, weights, sliced (the subnetworks in PyTorch), step (single steps with the backend), and run (a
    whole run with the backend).

    Exits with 1 if a check exceeds its tolerance, and names the first step and block where it does.
    """
    require("dydit parity", [*CHECKPOINTS, *GRAPHS, *backend_modules(settings["backend"])])
    from dydit.parity.parity import ParityConfig, compare_files

    config = parse_options(ParityConfig, settings)
    with show_progress("parity") as progress:
        report, notes = compare_files(bundle, against, config, out, progress, **reading)
    if as_json:
        print_json(report.to_json())
    else:
        reasons = [reason for reason in report.stale_reasons if reason not in report.summary]
        click.echo("\n".join([_table(report), *notes, *reasons, report.summary]))
        say_files(out)
        picture = out / "parity.png"
        if report.ok:
            say(next_line("bench", bundle, *backend_words(settings), "--out", "BENCH"))
        elif picture.exists():
            say(f"Look at {picture}")
    return OK if report.ok else CHECK_FAILED


def _table(report: ParityReport) -> str:
    """The checks, one a line. What was skipped for one reason is one line."""
    rows: list[list[str]] = []
    for check in report.checks:
        if rows and rows[-1][0] == check.status.value == "skipped" and rows[-1][2] == check.detail:
            rows[-1][1] += f", {check.name}"
        else:
            rows.append([check.status.value, check.name, check.detail])
    return aligned(rows)
