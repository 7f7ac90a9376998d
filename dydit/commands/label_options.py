"""The option `--labels`, for models that classes condition."""

from __future__ import annotations

import re
from collections.abc import Callable

import click

from dydit.commands.options import Command

MOST_LABELS = 1_000_000
Label = int | str
"""A class number, or a name that the model has for a class."""


def parse_labels(text: str) -> tuple[int, ...]:
    """Class numbers in the order written: `207,360`, `0-9`, or both."""
    labels: list[int] = []
    for part in text.split(","):
        numbers = _numbers(part, text)
        if numbers is None:
            raise click.BadParameter(f"{part!r} in {text!r} is not a class number; write labels as 207,360 or 0-9")
        labels.extend(_added(numbers, len(labels), text))
    return tuple(labels)


def parse_named_labels(text: str) -> tuple[Label, ...]:
    """Class numbers as `parse_labels` reads them, and names: `cat,dog`. What reads as a number is no name."""
    labels: list[Label] = []
    for part in text.split(","):
        numbers = _numbers(part, text)
        if numbers is None and not re.search(r"[^\W\d_]", part):
            raise click.BadParameter(
                f"{part!r} in {text!r} is neither a class number nor a name; write labels as 207,360 or 0-9 or cat,dog"
            )
        labels.extend([part.strip()] if numbers is None else _added(numbers, len(labels), text))
    return tuple(labels)


def _numbers(part: str, text: str) -> range | None:
    """The numbers of `7` or `0-9`; None for anything else."""
    match = re.fullmatch(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?", part, re.ASCII)
    if not match:
        return None
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first:
        raise click.BadParameter(f"the range {part.strip()} is reversed; write {last}-{first}")
    return range(first, last + 1)


def _added(numbers: range, before: int, text: str) -> range:
    if before + len(numbers) > MOST_LABELS:
        raise click.BadParameter(
            f"{text!r} has more than {MOST_LABELS:,} labels; list fewer, and repeat them with --num"
        )
    return numbers


def labels_option(help: str, default: str | None = None, names: bool = False) -> Callable[[Command], Command]:
    """`--labels`, which may be repeated; the command gets the labels of all of them as one tuple.

    `names`: whether classes may be given by their names, too.
    """

    def joined(_: click.Context, __: click.Parameter, values: tuple[tuple[Label, ...], ...]) -> tuple[Label, ...]:
        return tuple(label for labels in values for label in labels)

    return click.option(
        "--labels",
        type=parse_named_labels if names else parse_labels,
        multiple=True,
        default=[default] if default else None,
        callback=joined,
        metavar="LABELS",
        help=help,
    )
