"""What commands print: closing lines for a person, JSON for a program."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from dydit.commands.group import Settings


def say(*lines: str) -> None:
    """Print closing lines for a person: where the result is, what to do next. Nothing with `--quiet`."""
    if not click.get_current_context().ensure_object(Settings).quiet:
        for line in lines:
            click.echo(line)


def say_files(folder: Path) -> None:
    """Print which files a command wrote to `folder`. Nothing with `--quiet`."""
    say(f"Wrote {', '.join(sorted(file.name for file in folder.iterdir())) or 'nothing'} to {folder}")


def warn(line: str) -> None:
    """Print a warning on standard error, with `--quiet`, too."""
    click.echo(f"Warning: {line}", err=True)


def print_json(value: Any) -> None:
    """Print `value` as JSON on standard output."""
    click.echo(json.dumps(value, indent=2, allow_nan=False))
