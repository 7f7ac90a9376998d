"""The exceptions that `dydit` raises on purpose.

The command line turns a `DyditError` into one line on standard error and exit code 2. Anything else that escapes is a
bug and keeps its traceback. A message says what happened, what was expected, and what to do.
"""

from __future__ import annotations


class DyditError(Exception):
    """Base class: bad input or a missing prerequisite, explained in one line."""


class ConfigError(DyditError):
    """A setting has a value outside its allowed set or range."""


class UnsupportedError(ConfigError):
    """The model, or its architecture, lacks what a setting needs. Callers with alternatives do without it."""


class CheckpointError(DyditError):
    """A checkpoint cannot be read, or does not describe a supported model."""


class BundleError(DyditError):
    """A bundle is missing, damaged or changed, or does not fit the request."""


class BackendError(DyditError):
    """A backend is not installed, or cannot run what is requested."""


class CalibrationError(DyditError):
    """There is nothing to calibrate on, or a calibration belongs to something else."""


class TrainingError(DyditError):
    """A training run cannot continue: its values are not finite, or it does not improve."""


class UnavailableError(BackendError):
    """This machine lacks something that is needed. Callers with alternatives skip it."""


class DeviationError(BackendError):
    """What should be measured does not compute what its reference computes."""


class OutputError(DyditError):
    """A result cannot be written to its destination."""


def one_line(error: BaseException) -> str:
    """The text of `error` on a single line, with runs of white space folded."""
    return " ".join(str(error).split()) or type(error).__name__
