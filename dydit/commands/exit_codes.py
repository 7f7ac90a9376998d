"""Exit codes, and how an error becomes one line on standard error.

0: success; 1: a check failed; 2: bad usage, bad input, or something is missing on this machine; 130: interrupted; 141:
the reader of standard output went away; 143: terminated. Any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from typing import Any, TextIO, cast

import click

from dydit.commands.group import Settings
from dydit.errors import DyditError, one_line
from dydit.extras import EXTRAS, as_installed, install_command

OK, CHECK_FAILED, BAD_INPUT, INTERRUPTED, PIPE_CLOSED, TERMINATED = 0, 1, 2, 130, 141, 143
HOW_TO_RESUME = {
    **dict.fromkeys(("sample", "decode", "calibrate", "build", "prepare"), "run the same command again to resume"),
    "quickstart": "run the same command again to resume after the last finished stage",
    "train": "run the same command with --resume to continue from the last saved state",
}
"""What to do after a command was interrupted. The other commands leave nothing behind."""
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc", "bad allocation")


class Terminated(BaseException):
    """The process was asked to end (SIGTERM)."""


def run_command(group: click.Group, arguments: Sequence[str]) -> int:
    """Run one of the group's commands and return its exit code."""
    settings = Settings(debug=os.environ.get("DYDIT_DEBUG", "0") not in ("", "0"))
    with _standard_streams() as output, _terminable():
        try:
            code = _invoke(group, list(arguments), settings)
            output.flush()
        except BaseException as error:
            if error is output.failure:
                return _unwritten(error, settings)
            return _explain(error, settings, next((each for each in arguments if each in group.commands), ""))
        return code


def _explain(error: BaseException, settings: Settings, command: str) -> int:
    """Print what happened, in one line, and return the exit code. Raises `error` again if it is a bug."""
    if isinstance(error, KeyboardInterrupt | Terminated):
        what, code = (
            ("interrupted", INTERRUPTED) if isinstance(error, KeyboardInterrupt) else ("terminated", TERMINATED)
        )
        if text := " ".join(str(error).split()):  # whoever was interrupted says more
            return _fail(text, settings, code)
        advice = HOW_TO_RESUME.get(command, "nothing was written")
        return _fail(f"{what}; {advice}" if command else what, settings, code)
    if isinstance(error, click.UsageError):
        where = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
        return _fail(" ".join(error.format_message().split()).rstrip(".") + where, settings)
    if isinstance(error, DyditError | click.ClickException):
        return _fail(one_line(error), settings)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _is_of_memory(error)):
        return _fail(f"not enough memory ({one_line(error)[:200]}); use a smaller batch size or fewer steps", settings)
    if isinstance(error, OSError):
        what = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else one_line(error)
        return _fail(what, settings)
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        if package in EXTRAS:
            return _fail(f"{package} is not installed: {install_command([EXTRAS[package]])}", settings)
    raise error


def _unwritten(error: OSError, settings: Settings) -> int:
    """Return the exit code when standard output cannot be written. Silent if its reader went away (`... | head`)."""
    # Python would try to write the rest of the buffer when it ends, and complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):
        return PIPE_CLOSED
    return _fail(f"standard output: {error.strerror}", settings)


def _is_of_memory(error: RuntimeError) -> bool:
    """Whether PyTorch or a C++ library ran out of memory."""
    return any(words in str(error).lower() for words in _NO_MEMORY)


def _invoke(group: click.Group, arguments: list[str], settings: Settings) -> int:
    # click's own `main` turns KeyboardInterrupt and a stray EOFError into the same exception.
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


class _Stream:
    """A standard stream. `failure` is the error of the last write that failed; `suppress`: do not raise it."""

    def __init__(self, stream: TextIO, suppress: bool):
        self._stream, self._suppress = stream, suppress
        self.failure: OSError | None = None

    def write(self, text: str) -> int:
        """Write `text`."""
        with self._watched():
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Write what is buffered."""
        with self._watched():
            self._stream.flush()

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.failure = error
            if not self._suppress:
                raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _standard_streams() -> Iterator[_Stream]:
    """Make the standard streams writable, whatever the caller did with them; yields standard output.

    A closed stream (`>&-`) becomes /dev/null. Otherwise the next file that is opened would get its number, and what a
    library prints would end up in a result. Writes to standard error never fail, because progress that nobody sees must
    not end a run. Characters that the terminal's encoding lacks are escaped.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w") as nowhere:
        for stream in before:
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        output, errors = _Stream(sys.stdout or nowhere, False), _Stream(sys.stderr or nowhere, True)
        sys.stdout, sys.stderr = cast(TextIO, output), cast(TextIO, errors)
        try:
            yield output
        finally:
            sys.stdout, sys.stderr = before


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM unwind the command as Ctrl-C does, so that half-written files are removed.

    A handler that a caller in this process has set stays.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def terminate(*_: object) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
