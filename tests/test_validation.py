"""What pydantic finds wrong reaches people in plain words, whatever the configuration and the value."""

from __future__ import annotations

import importlib
import math
import pkgutil
import re
from typing import Any

import pytest
from pydantic import BaseModel, Field, ValidationError, model_serializer

import dydit
from dydit.errors import ConfigError
from dydit.models.config import parse_config
from dydit.models.dit.config import DiTConfig
from dydit.validation import SettingsError, Strict, first_problem, problems_of

JUNK: tuple[Any, ...] = (
    "x",
    "",
    -1,
    0,
    1.5,
    10**400,
    math.nan,
    math.inf,
    None,
    True,
    b"x",
    [],
    {},
    [1],
    {"x": 1},
    object(),
)
PYDANTICS = re.compile(
    r"Input|should|Value error|Assertion|Field required|Extra inputs|\bvalid (int|num|str|tup|dic)|unable to"
)


def every_kind(kind: type[BaseModel] = Strict) -> list[type[BaseModel]]:
    for module in pkgutil.walk_packages(dydit.__path__, "dydit."):
        if module.name not in ("dydit.__main__", "dydit.runtime.device.cuda"):
            importlib.import_module(module.name)
    return [kind, *(each for sub in kind.__subclasses__() for each in every_kind(sub))]


def test_no_words_of_pydantics_for_any_field_of_any_configuration() -> None:
    kinds = every_kind()
    assert len(kinds) > 30
    shown = 0
    for kind in kinds:
        for name, value in [*((name, junk) for name in kind.model_fields for junk in JUNK), ("no such\nfield", 1)]:
            try:
                kind.model_validate({name: value})
            except ValidationError as error:
                for problem in problems_of(error):
                    text = problem.text()
                    assert not PYDANTICS.search(text), f"{kind.__name__}({name}={value!r}): {text}"
                    assert kind.__name__ not in text and "\n" not in text
                    shown += 1
    assert shown > 1000


class Child(BaseModel):
    count: int = Field(ge=1, le=9)


class Example(BaseModel):
    model_config = {"extra": "forbid"}
    child: Child | None = None
    items: tuple[int, ...] = Field(default=(1,), min_length=1)
    ratio: float = Field(default=1, gt=0.5, allow_inf_nan=False)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"ratio": 0}, "ratio must be greater than 0.5, not 0"),
        ({"ratio": math.nan}, "ratio must be a finite number, not nan"),
        ({"ratio": "half"}, "ratio must be a number, not 'half'"),
        ({"items": ()}, "items must have at least 1 entry"),
        ({"items": (1, 2.5)}, "items.1 must be a whole number, not 2.5"),
        ({"items": ("x",)}, "items.0 must be a whole number, not 'x'"),
        ({"items": 7}, "items must be a list, not 7"),
        ({"child": {"count": 10}}, "child.count must be at most 9, not 10"),
        ({"child": {}}, "child.count is missing"),
        ({"rato": 1}, "rato is not a known setting"),
        ({"ratio": "x" * 99}, f"ratio must be a number, not '{'x' * 36}..."),
    ],
)
def test_words(values: dict[str, Any], text: str) -> None:
    with pytest.raises(SettingsError) as raised:
        parse_config(Example, values)
    assert str(raised.value) == text and isinstance(raised.value, ConfigError)
    assert first_problem(raised.value.__cause__) == text


def test_all_faults_are_named_and_so_is_the_file() -> None:
    with pytest.raises(
        ConfigError, match=r"^model\.json: items must have at least 1 entry; ratio must be [a-z ]*0\.5, not 0$"
    ):
        parse_config(Example, {"items": (), "ratio": 0}, "model.json")


def test_a_rule_of_several_fields_has_its_own_words() -> None:
    sizes = {"hidden_size": 64, "depth": 1, "num_heads": 5, "patch_size": 2, "input_size": 8}
    with pytest.raises(ConfigError, match=r"^hidden_size 64 is not a multiple of num_heads 5$"):
        parse_config(DiTConfig, sizes)


class Interrupted(Strict):
    """A configuration during whose writing an interrupt arrives."""

    @model_serializer
    def _written(self) -> dict[str, Any]:
        raise KeyboardInterrupt


def test_an_interrupt_while_a_configuration_is_written_stays_one() -> None:
    class Holder(Strict):
        inner: Interrupted

    for each in (Interrupted(), Holder(inner=Interrupted())):
        for write in (each.model_dump, each.model_dump_json):
            with pytest.raises(KeyboardInterrupt):
                write()


def test_other_errors_of_writing_stay_what_they_are() -> None:
    class Faulty(Strict):
        @model_serializer
        def _written(self) -> dict[str, Any]:
            raise RuntimeError("broken")

    with pytest.raises(Exception, match="broken"):
        Faulty().model_dump()
