"""Exit codes, and how an error becomes one line on standard error.

0; 1: a check failed; 2: bad usage, bad input, or something that is missing here; 130: interrupted. Any other exception
is a fault of this program and keeps its traceback.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

import click

from dydit.cli_options import Settings
from dydit.errors import DyditError, one_line
from dydit.extras import EXTRAS, as_installed, install_command

OK, CHECK_FAILED, BAD_INPUT, INTERRUPTED, PIPE_CLOSED = 0, 1, 2, 130, 141


def run_command(group: click.Group, arguments: Sequence[str]) -> int:
    """Run one of the group's commands; returns its exit code."""
    settings = Settings(debug=os.environ.get("DYDIT_DEBUG", "0") not in ("", "0"))
    try:
        code = _invoke(group, list(arguments), settings)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader went away (`dydit inspect ... | head`); what is left in the buffer has nowhere to go either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except KeyboardInterrupt:
        return _fail("interrupted", settings, INTERRUPTED)
    except click.UsageError as error:
        where = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
        return _fail(" ".join(error.format_message().split()).rstrip(".") + where, settings)
    except (DyditError, click.ClickException) as error:
        return _fail(one_line(error), settings)
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else one_line(error)
        return _fail(what, settings)
    except MemoryError as error:
        return _fail(f"not enough memory ({one_line(error)}); use smaller batches or fewer steps", settings)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        return _fail(f"{package} is not installed: {install_command([EXTRAS[package]])}", settings)


def _invoke(group: click.Group, arguments: list[str], settings: Settings) -> int:
    # click's own `main` would turn KeyboardInterrupt and a stray EOFError into the same exception.
    try:
        with group.make_context("dydit", arguments, obj=settings) as context:
            return int(group.invoke(context) or OK)
    except click.exceptions.Exit as request:
        return request.exit_code
    except click.exceptions.NoArgsIsHelpError as request:
        request.show()
        return BAD_INPUT


def _fail(message: str, settings: Settings, code: int = BAD_INPUT) -> int:
    if settings.debug:
        traceback.print_exc()
    print(f"dydit: error: {as_installed(message)}", file=sys.stderr)
    return code
