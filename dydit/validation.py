"""The base of all configurations, and its errors in plain words: which field, what it must be, what was given."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import PydanticSerializationError

from dydit.errors import ConfigError

LONGEST_VALUE = 40
_REQUIREMENTS: Mapping[str, str] = {
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "multiple_of": "must be a multiple of {multiple_of}",
    "finite_number": "must be a finite number",
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float", "int_parsing_size"), "must be a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "must be a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "must be true or false"),
    **dict.fromkeys(("string_type", "string_sub_type"), "must be text"),
    **dict.fromkeys(("enum", "literal_error"), "must be {expected}"),
    **dict.fromkeys(("list_type", "tuple_type"), "must be a list"),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type", "dataclass_type"), "must be an object"),
    **dict.fromkeys(("path_type", "is_instance_of"), "has the wrong type"),
    "none_required": "must be null",
    "string_pattern_mismatch": "must match the pattern {pattern}",
    "string_too_short": "must have at least {min_length} characters",
    "string_too_long": "must have at most {max_length} characters",
    "too_short": "must have at least {min_length} entries",
    "too_long": "must have at most {max_length} entries",
}
_WITHOUT_VALUE: Mapping[str, str] = {"missing": "is missing", "extra_forbidden": "is not a known setting"}


class Strict(BaseModel):
    """Base of all our configurations: immutable, and unknown keys are refused.

    An interrupt while a configuration is written out stays an interrupt. pydantic would turn one that arrives in a
    serializer of ours into an error of serialization.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    def model_dump(self, **settings: Any) -> dict[str, Any]:
        """As pydantic's."""
        with _interrupts_as_such():
            return super().model_dump(**settings)

    def model_dump_json(self, **settings: Any) -> str:
        """As pydantic's."""
        with _interrupts_as_such():
            return super().model_dump_json(**settings)


@contextlib.contextmanager
def _interrupts_as_such() -> Iterator[None]:
    try:
        yield
    except PydanticSerializationError as error:
        # Its cause is kept when objects are written, but only its name when JSON is.
        if isinstance(error.__cause__, KeyboardInterrupt) or KeyboardInterrupt.__name__ in str(error):
            raise KeyboardInterrupt from error
        raise


@dataclass(frozen=True)
class Problem:
    """One problem. `path`: of the field (empty: of the whole configuration); `words`: what is wrong with it.

    `words` continue the field's name as a sentence ("must be at least 0, not -1") unless they are `whole` sentences.
    """

    path: tuple[str | int, ...]
    words: str
    whole: bool = False

    def text(self, name: str | None = None) -> str:
        """The problem as a sentence, with `name` or the path as the field's name."""
        name = name or ".".join(map(str, self.path))
        text = f"{name}{':' if self.whole else ''} {self.words}" if name else self.words
        return " ".join(text.split())  # names of fields come from a file and may hold line breaks


class SettingsError(ConfigError):
    """A configuration is not valid. `problems`: where and why, for callers that have other names for the fields."""

    def __init__(self, problems: tuple[Problem, ...], where: str = ""):
        super().__init__(f"{where}: " * bool(where) + "; ".join(problem.text() for problem in problems))
        self.problems = problems


def problems_of(error: ValidationError) -> tuple[Problem, ...]:
    """The problems that pydantic lists, in its order."""
    items = error.errors(include_url=False)
    paths = [item["loc"] for item in items]

    def follows(item: Mapping[str, Any]) -> bool:
        """Whether a problem follows from another: a list is too short without its invalid entry."""
        own = item["loc"]
        return item["type"] == "too_short" and any(path[: len(own)] == own and path != own for path in paths)

    return tuple(_problem(item) for item in items if not follows(item))


def first_problem(error: ValidationError) -> str:
    """The first problem as a sentence: in a file with one mistake, the others follow from it."""
    return problems_of(error)[0].text()


def value_text(value: Any) -> str:
    """A value as it would be written on a command line or in a file, cut if it is long."""
    text = repr(value) if isinstance(value, str) else str(value)
    text = text.removesuffix(".0") if isinstance(value, float) else text
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 3] + "..."


def _problem(item: Mapping[str, Any]) -> Problem:
    path, kind, context = tuple(item["loc"]), item["type"], item.get("ctx", {})
    if kind in ("value_error", "assertion_error"):
        return Problem(path, str(context["error"]), whole=True)  # raised by our own validator, with its own message
    if kind in _WITHOUT_VALUE:
        return Problem(path, _WITHOUT_VALUE[kind])
    context = {name: value_text(value) if isinstance(value, float) else value for name, value in context.items()}
    requirement = _REQUIREMENTS[kind].format(**context) if kind in _REQUIREMENTS else _reworded(item["msg"])
    if not path:
        requirement = f"the whole {requirement}"
    requirement = requirement.replace(" 1 entries", " 1 entry").replace(" 1 characters", " 1 character")
    given = item["input"]
    shown = "" if isinstance(given, dict | list | tuple) else f", not {value_text(given)}"
    return Problem(path, requirement + shown)


def _reworded(message: str) -> str:
    """A message of pydantic, changed to continue the field's name."""
    reworded = re.sub(r"^\w+ should ", "must ", message)
    return reworded if reworded != message else f"is not valid: {message[:1].lower()}{message[1:]}"
