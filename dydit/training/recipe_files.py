"""Recipe files: TOML files with the settings of one training run, or of a sequence of runs.

    description = "What this trains, in one line."
    extends = "digits"              # a recipe of dydit, or a file, relative to this one
    learning_rate = 5e-4            # any setting of `Recipe`, for all runs

    [model]                         # any field of the model's configuration, for all runs
    preset = "S/2"                  # the published sizes of an architecture, which other fields change
    input_size = 64

    [dynamic]                       # a run, with settings of its own: static, dynamic, settle
    iterations = 4000

The runs of a sequence come in the order static, dynamic, settle, and each later one starts from the weights of the one
before it. An empty table is a run with the settings for all runs. A file that extends another one has its runs as well,
and what it sets for all runs holds for these, too: a setting that is read later replaces an earlier one. Fields of the
model that a file does not state are decided by what the run starts from, and by the data
(`dydit.training.completion`).

The recipes of dydit are in `dydit/recipes/`. No PyTorch here.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from dydit.diffusion.process import NoiseSchedule, Prediction
from dydit.errors import ConfigError, one_line
from dydit.files import user_path
from dydit.models.config import ModelConfig
from dydit.models.registry import DEFAULT, architecture, architectures
from dydit.training.completion import complete_runs
from dydit.training.recipe import Recipe, Stage

FOLDER = Path(__file__).parents[1] / "recipes"
SUFFIX = ".toml"
TEXTS = ("data", "init", "teacher")
"""Settings whose values are text, whatever they look like."""


@dataclass(frozen=True)
class RecipeFile:
    """One file. `common`: settings for all runs; `runs`: settings of one run, by stage."""

    path: Path
    description: str
    extends: str | None
    common: dict[str, Any]
    runs: dict[Stage, dict[str, Any]]


@dataclass(frozen=True)
class Draft:
    """The runs of a recipe as its files and overrides state them, before the start and the data complete them.

    `values`: for each run, settings of `Recipe` that may be incomplete, in particular those of its model. `where`: the
    user's file, for errors; "" for a recipe of dydit.
    """

    name: str
    where: str
    values: tuple[dict[str, Any], ...] = field(repr=False)


def shipped_recipes() -> tuple[str, ...]:
    """The names of the recipes that come with dydit."""
    return tuple(sorted(path.name.removesuffix(SUFFIX) for path in FOLDER.glob(f"*{SUFFIX}")))


def descriptions() -> dict[str, str]:
    """The description of each recipe that comes with dydit."""
    return {name: read_file(FOLDER / f"{name}{SUFFIX}").description for name in shipped_recipes()}


def recipe_text(name: str) -> str:
    """The file of a recipe, to be copied and changed. Raises `ConfigError` for an unknown name."""
    path, _ = _addressed(name)
    return _text_of(path)


def find_recipes(name: str, overrides: Sequence[str] = (), data_needed: bool = True) -> tuple[Recipe, ...]:
    """The runs of a recipe, with `key=value` overrides applied, completed by the start and the data.

    `name`: of a recipe of dydit, with `-static`, `-dynamic` or `-settle` one of its runs; or the path of a file.
    `data_needed`: whether a recipe without data is refused. Raises `ConfigError` for an unknown recipe or key (naming
    those that exist), for a value outside its range, and where model and data contradict each other.
    """
    draft = read_draft(name, overrides)
    return complete_runs(draft.values, draft.name, draft.where, data_needed)


def read_draft(name: str, overrides: Sequence[str] = ()) -> Draft:
    """The runs of a recipe with overrides applied. `model.depth=12` sets a nested setting.

    In a sequence, `static.key`, `dynamic.key` and `settle.key` set that of one run, and a bare key that of all runs.
    """
    path, stage = _addressed(name)
    files = _with_extended(path)
    stages = [each for each in Stage if any(each in file.runs for file in files)]
    if not stages:
        raise ConfigError(f"{path}: the recipe has no run; add a table [static], [dynamic] or [settle]")
    if stage is not None and stage not in stages:
        raise ConfigError(f"recipe {name}: {_listed(path)} has no {stage} run; it has {', '.join(stages)}")
    base, single = path.name.removesuffix(SUFFIX), [stage] if stage is not None else stages
    runs = {each: {"name": f"{base}-{each}", "stage": each.value, **_merged(files, each)} for each in single}
    for word in overrides:
        _override(runs, word, name)
    for run in runs.values():
        _complete_process(run.get("model"))
    return Draft(base, str(path) if _is_path(name) else "", tuple(runs.values()))


def _merged(files: Iterable[RecipeFile], stage: Stage) -> dict[str, Any]:
    """The settings of one run; those of later files, and of the run itself, replace earlier ones."""
    values: dict[str, Any] = {"model": {}}
    for file in files:
        for settings in (file.common, file.runs.get(stage, {})):
            model = _with_preset(settings.get("model", {}), values["model"], str(file.path))
            values |= {**_copied(settings), "model": {**values["model"], **model}}
    return values


def _copied(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copied(value) if isinstance(value, Mapping) else value for key, value in values.items()}


def _with_preset(model: Mapping[str, Any], before: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields that a [model] table states, with those of its preset. The stage of a run decides its routers."""
    stated = _copied(model)
    preset = stated.pop("preset", None)
    if preset is None:
        return stated
    try:
        known = architecture(str(stated.get("architecture", before.get("architecture", DEFAULT))))
        config = known.preset(str(preset))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    chosen = config.model_fields_set - {"routers"}
    fields = {key: value for key, value in config.model_dump(mode="json").items() if key in chosen}
    return {**fields, "architecture": known.name, **stated}


# Files


def read_file(path: Path) -> RecipeFile:
    """Read one file. Raises `ConfigError`, which names the file and the key, for what is no recipe."""
    try:
        values = tomllib.loads(_text_of(path))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: is not a TOML file ({one_line(error)})") from error
    settings = {name: info for name, info in Recipe.model_fields.items() if name not in ("name", "stage")}
    description, extends = (values.pop(name, None) for name in ("description", "extends"))
    for name, value in (("description", description), ("extends", extends)):
        if value is not None and (not isinstance(value, str) or not value.strip()):
            raise ConfigError(f"{path}: {name} must be text")
    runs = {}
    for stage in Stage:
        if stage in values:
            runs[stage] = _table(values.pop(stage), path, stage.value, settings)
    common = _table(values, path, "", settings, ("description", "extends", *Stage))
    return RecipeFile(path, description or "", extends, common, runs)


def _table(
    values: Any, path: Path, table: str, settings: Mapping[str, Any], others: Sequence[str] = ()
) -> dict[str, Any]:
    """The settings of a table, whose keys are known."""
    prefix = f"[{table}]: " if table else ""
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: {table} must be a table of settings, [{table}]")
    for key in values:
        if key not in settings:
            raise ConfigError(f"{path}: {prefix}unknown setting {key!r}; known: {', '.join([*others, *settings])}")
    model = values.get("model", {})
    if not isinstance(model, dict):
        raise ConfigError(f"{path}: {prefix}model must be a table of fields, [{table}{'.' if table else ''}model]")
    known = _fields_of_models(model.get("architecture"))
    for key in model:
        if key not in known:
            raise ConfigError(f"{path}: {prefix}unknown field model.{key}; known: {', '.join(known)}")
    return values


def _fields_of_models(named: Any) -> dict[str, Any]:
    """The fields of an architecture's configuration, or of all architectures, and `preset`."""
    kinds = [architecture(named)] if isinstance(named, str) else architectures()
    fields: dict[str, Any] = {"preset": None}
    for each in kinds:
        config = each.config
        fields |= {name: field for name, field in config.model_fields.items() if name not in config.OF_A_RUN}
    return fields


def _with_extended(path: Path) -> list[RecipeFile]:
    """A file and those that it extends, the last of which comes first. Raises `ConfigError` for a cycle."""
    files: list[RecipeFile] = []
    while True:
        if any(path.resolve() == file.path.resolve() for file in files):
            chain = " extends ".join([*(str(file.path) for file in files), str(path)])
            raise ConfigError(f"recipes extend each other: {chain}; remove one `extends`")
        files.append(read_file(path))
        extends = files[-1].extends
        if extends is None:
            return files[::-1]
        base = path.parent
        path = base / user_path(Path(extends)) if _is_path(extends) else FOLDER / f"{extends}{SUFFIX}"
        if not path.is_file():
            known = "" if _is_path(extends) else f"; known: {', '.join(shipped_recipes())}, or the path of a file"
            raise ConfigError(f"{files[-1].path}: extends {extends!r}, which does not exist{known}")


def _addressed(name: str) -> tuple[Path, Stage | None]:
    """The file of a recipe, and the one run of it that a name like `digits-dynamic` stands for."""
    if _is_path(name):
        return user_path(Path(name)), None
    known = shipped_recipes()
    if name in known:
        return FOLDER / f"{name}{SUFFIX}", None
    base, _, last = name.rpartition("-")
    if base in known and last in tuple(Stage):
        return FOLDER / f"{base}{SUFFIX}", Stage(last)
    raise ConfigError(
        f"unknown recipe {name!r}; known: {', '.join(known)}, with -static, -dynamic or -settle one run of them, or "
        f"the path of a file (with a / or {SUFFIX} at the end)"
    )


def _is_path(name: str) -> bool:
    return "/" in name or name.endswith(SUFFIX)


def _listed(path: Path) -> str:
    return path.name.removesuffix(SUFFIX)


def _text_of(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not a TOML file (it is not UTF-8 text)") from error
    except OSError as error:
        raise ConfigError(f"recipe {path} cannot be read: {error.strerror or error}") from error


# Overrides


def _override(runs: Mapping[Stage, dict[str, Any]], word: str, name: str) -> None:
    """Apply `key=value` to one run or to all."""
    key, equals, text = word.partition("=")
    if not equals:
        raise ConfigError(f"{word!r} does not have the form key=value")
    chosen = list(runs.values())
    first, _, rest = key.partition(".")
    if first in tuple(Stage):
        if first not in runs:
            raise ConfigError(f"{word!r}: recipe {name} has no {first} run; it has {', '.join(runs)}")
        chosen, key = [runs[Stage(first)]], rest
    for run in chosen:
        if key == "model.preset":
            model = run["model"] if isinstance(run["model"], dict) else {}
            run["model"] = {**model, **_with_preset({"preset": text}, model, repr(word))}
        else:
            _set(run, key.split("."), text if key in TEXTS and text != "null" else _value(text), Recipe, word)


def _set(values: dict[str, Any], path: list[str], value: Any, kind: type[BaseModel] | None, word: str) -> None:
    """Set a value at a path of keys. `kind`: the configuration; None for a model of an unknown architecture."""
    known = kind.model_fields if kind is not None else _fields_of_models(None)
    if path[0] not in known:
        raise ConfigError(f"{word!r}: unknown setting {path[0]!r}; known: {', '.join(known)}")
    if len(path) == 1:
        values[path[0]] = value
        return
    annotation = getattr(known[path[0]], "annotation", None)
    kinds = (each for each in (annotation, *get_args(annotation)) if isinstance(each, type))
    nested: type[BaseModel] | None = next((each for each in kinds if issubclass(each, BaseModel)), None)
    if nested is None:
        raise ConfigError(f"{word!r}: {path[0]} has no settings of its own")
    if not isinstance(values.get(path[0]), dict):
        values[path[0]] = {}
    if nested is ModelConfig:
        named = values[path[0]].get("architecture")
        nested = None if named is None else architecture(str(named)).config
    _set(values[path[0]], path[1:], value, nested, word)


def _complete_process(model: Any) -> None:
    """A flow predicts the velocity, and nothing else does, so that either of the two may be left out."""
    process = model.get("process") if isinstance(model, dict) else None
    if isinstance(process, dict):
        if process.get("schedule") == NoiseSchedule.FLOW:
            process.setdefault("prediction", Prediction.VELOCITY.value)
        if process.get("prediction") == Prediction.VELOCITY:
            process.setdefault("schedule", NoiseSchedule.FLOW.value)


def _value(text: str) -> Any:
    """The value of JSON text (numbers, true, null), else the text itself, which pydantic validates."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
