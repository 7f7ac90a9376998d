"""`dydit doctor`."""

from __future__ import annotations

import click

from dydit.commands.exit_codes import CHECK_FAILED, OK
from dydit.commands.group import Command
from dydit.commands.options import json_option
from dydit.commands.output import print_json
from dydit.commands.progress import show_progress
from dydit.extras import as_installed


@click.command(cls=Command)
@json_option
def command(as_json: bool) -> int:
    """Test which backends work on this machine, and say why the others do not. Exits with 1 if none works."""
    from dydit.doctor.doctor import run_doctor
    from dydit.doctor.probes import Finding, run_probe

    with show_progress("doctor") as progress:

        def probe(name: str) -> Finding:
            progress.note(f"trying {name}")
            return run_probe(name)

        report = run_doctor(probe)
    if as_json:
        print_json(report.to_json())
    else:
        click.echo(as_installed(report.text()))
    return OK if report.ok else CHECK_FAILED
