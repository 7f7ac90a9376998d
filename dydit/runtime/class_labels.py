"""The class labels of a call: numbers, or names of classes where the bundle has them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

from dydit.errors import ConfigError
from dydit.models.config import ModelConfig
from dydit.runtime.arguments import plain, short, whole_number
from dydit.runtime.request import check_label

ARGUMENT = "class_labels"
_SUGGESTIONS = 3


def labels_of(given: Any, model: ModelConfig) -> list[int]:
    """A label, or a sequence, array or range of them, as a list of numbers that `model` takes.

    Names are those of `names_of`. Raises `ConfigError` for anything else, and if there is no label.
    """
    values = plain(given)
    if isinstance(values, bytes | bytearray | Mapping | Set):
        raise ConfigError(f"{ARGUMENT} must be a label or a list of labels, such as 20 or [2, 0], not {short(given)}")
    listed = [values] if isinstance(values, str) or not isinstance(values, Iterable) else list(values)
    if not listed:
        raise ConfigError(f"{ARGUMENT} is empty; give at least one label")
    known = names_of(model) if any(isinstance(each, str) for each in listed) else {}
    labels = [number_of(each, known, ARGUMENT) if isinstance(each, str) else _number(each) for each in listed]
    for label in labels:
        check_label(label, model, f"{ARGUMENT}: ")
    return labels


def names_of(model: ModelConfig) -> dict[str, list[int]]:
    """Every name of a class, and the classes that have it. Commas separate the names of a class, as in diffusers."""
    names: dict[str, list[int]] = {}
    for label, text in enumerate(model.class_names or ()):
        for name in dict.fromkeys(part.strip() for part in text.split(",")):
            if name:
                names.setdefault(name, []).append(label)
    return names


def _number(value: Any) -> int:
    return whole_number(value, ARGUMENT, 0, (1 << 63) - 1)


def number_of(name: str, known: Mapping[str, Sequence[int]], where: str) -> int:
    """The class that has a name, of the `known` ones (`names_of`).

    `where`: what was given, at the start of errors. Raises `ConfigError` if no class has it, or several have.
    """
    if not known:
        raise ConfigError(f"{where} must be integers, not {short(name)}: this bundle has no names of classes")
    labels = known.get(name.strip(), [])
    if len(labels) == 1:
        return labels[0]
    if labels:
        raise ConfigError(
            f"{where}: {short(name)} is a name of the classes {', '.join(map(str, labels))}; give a number"
        )
    folded = {each.casefold(): each for each in known}
    near = [folded[each] for each in difflib.get_close_matches(name.casefold(), folded, _SUGGESTIONS)]
    lists = "the pipeline's `labels` lists the names" if where == ARGUMENT else "`dydit inspect --json` lists the names"
    hint = f"did you mean {' or '.join(map(short, near))}?" if near else lists
    raise ConfigError(f"{where}: no class has the name {short(name)}; {hint}")
