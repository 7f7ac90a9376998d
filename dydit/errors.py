"""The one family of exceptions that `dydit` raises on purpose.

The command line turns a `DyditError` into one line on standard error and exit code 2. Anything else that escapes is a
bug and keeps its traceback. A message says what happened, what was expected, and what to do.
"""

from __future__ import annotations


class DyditError(Exception):
    """Base class: bad input or a missing prerequisite, explained in one line."""


class ConfigError(DyditError):
    """A setting has a value outside its allowed set or range."""


class CheckpointError(DyditError):
    """A checkpoint cannot be read, or does not describe a model that we know."""


class BundleError(DyditError):
    """A bundle is missing, damaged, tampered with, or does not fit the request."""


class BackendError(DyditError):
    """A backend is not installed here, or cannot run what it is asked to run."""


class CalibrationError(DyditError):
    """There is nothing to calibrate on, or a calibration is of something else."""


class TrainingError(DyditError):
    """A training run cannot go on: what it computes is not finite, or does not get better."""


class UnavailableError(BackendError):
    """What is asked for needs something that this machine lacks, so it is left out where others can go on."""


class DeviationError(BackendError):
    """What is to be measured does not compute what its reference computes."""


class OutputError(DyditError):
    """A result cannot be written where it was asked to go."""


def one_line(error: BaseException) -> str:
    """The text of `error` on a single line, with runs of white space folded."""
    return " ".join(str(error).split()) or type(error).__name__
