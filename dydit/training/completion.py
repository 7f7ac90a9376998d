"""Completes the model of a recipe: fields that it does not state are those of the start, or those of the data.

Fields that are stated, a preset's among them, are kept. The others are those of the checkpoint that the run starts
from; what that leaves open, the data decides. The classes are those of the data before those of the checkpoint, and
the routers those of the run's stage. No PyTorch here, unless a checkpoint is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dydit.data.opened import open_data
from dydit.errors import CheckpointError, ConfigError
from dydit.files import user_path
from dydit.models.config import ModelConfig, Routers, Space, TextSpec, parse_config
from dydit.models.registry import DEFAULT, architecture
from dydit.training.recipe import Recipe, Stage, StartWeights

NO_DATA = ""
"""The data of a recipe that states none, where it is not needed."""


@dataclass(frozen=True)
class DataFacts:
    """What the data decide about a model. `shape`: (C, S, S); `classes`: their number; `text`: None without texts."""

    shape: tuple[int, int, int]
    classes: int
    class_names: tuple[str, ...] | None = None
    text: TextSpec | None = None
    space: Space | None = None


def data_facts(name: str) -> DataFacts:
    """The facts about the named data. Raises `ConfigError` for an unknown name."""
    data = open_data(name)
    return DataFacts(data.shape, data.classes, data.class_names, data.text, data.space)


def complete_runs(
    runs: Sequence[Mapping[str, Any]], name: str, where: str = "", data_needed: bool = True
) -> tuple[Recipe, ...]:
    """The runs of recipe `name` with complete models, validated. `where`: its file, for errors.

    The first run's start decides for all runs: each later one starts from the one before it. Raises `ConfigError` for
    invalid settings, for a model without sizes or a run without data (unless they are not needed), and where model and
    data contradict each other; `CheckpointError` if the start cannot be read.
    """
    start = _start_of(runs[0], name)
    facts_of = cache(data_facts)  # the runs of a recipe usually have the same data
    recipes = []
    for number, run in enumerate(runs):
        values = dict(run)
        if number:
            values.pop("init_weights", None)  # of the file that the first run starts from
        if values.get("data") is None:
            if data_needed:
                raise ConfigError(f"recipe {name} trains on data of yours; give it with --data PATH")
            values["data"] = NO_DATA
        facts = facts_of(values["data"]) if isinstance(values["data"], str) and values["data"] else None
        if isinstance(values["model"], Mapping):
            values["model"] = complete_model(values["model"], values.get("stage"), start, facts)
            if facts is None and "input_size" not in values["model"]:
                raise ConfigError(
                    f"recipe {name} takes the size of images from the data; give them with --data PATH, or the size "
                    "with model.input_size=N"
                )
            model = _parsed(values["model"])
            if model is not None and model.classes.unconditional:
                values.setdefault("label_dropout", 0.0)  # there are no labels to drop
        recipe = parse_config(Recipe, values, where)
        if facts is not None:
            require_fit(recipe.model, facts, recipe.data)
        recipes.append(recipe)
    return tuple(recipes)


def _start_of(run: Mapping[str, Any], name: str) -> ModelConfig | None:
    """The configuration of the checkpoint that a run starts from; None without one, or where it is not there yet."""
    init, model = run.get("init"), run["model"]
    sized = not isinstance(model, Mapping) or "hidden_size" in model
    if isinstance(init, str) and user_path(Path(init)).exists():
        from dydit.training.start import start_config

        weights = run.get("init_weights")
        return start_config(init, StartWeights(weights) if weights in tuple(StartWeights) else None)
    if not sized and isinstance(init, str):
        raise CheckpointError(f"{init}: does not exist; recipe {name} takes the sizes of its model from init")
    if not sized:
        raise ConfigError(
            f"recipe {name} does not state the sizes of its model; give the checkpoint that it starts from with "
            "--init PATH, or a preset with model.preset=NAME; --recipe scratch trains a new model"
        )
    return None


def complete_model(
    stated: Mapping[str, Any], stage: Any, start: ModelConfig | None, data: DataFacts | None
) -> dict[str, Any]:
    """The stated fields of a model with those that the start and the data decide."""
    name = stated.get("architecture", DEFAULT if start is None else start.architecture)
    try:
        fields = architecture(str(name)).config.model_fields
    except ConfigError:
        return dict(stated)  # refused, with its reason, when it is validated
    same = start is not None and start.architecture == name
    decided: dict[str, Any] = {}
    if start is not None and same:
        decided = {
            key: value
            for key, value in start.model_dump(mode="json").items()
            if key not in ("process", "class_names")  # of `with_process_of_start`; of the classes, below
        }
    model = {**decided, "architecture": name, **stated}
    if "routers" not in stated:
        dynamic = start is not None and same and start.dynamic
        of_start = start.routers if start is not None and dynamic else Routers.FIRST_ON
        model["routers"] = (Routers.NONE if stage == Stage.STATIC else of_start).value
    if data is not None:
        _decide_by_data(model, stated, data, fields)
    if "class_names" not in stated:
        count = model.get("num_classes")
        names = data.class_names if data is not None else None
        if names is None and start is not None and same:
            names = start.class_names
        model |= {"class_names": names} if names is not None and len(names) == count else {}
    return model


def _decide_by_data(
    model: dict[str, Any], stated: Mapping[str, Any], data: DataFacts, fields: Mapping[str, Any]
) -> None:
    """Add the fields that the data decide."""
    model.setdefault("in_channels", data.shape[0])
    model.setdefault("input_size", data.shape[1])
    if data.text is not None and "caption_channels" in fields:
        model.setdefault("caption_channels", data.text.channels)
        model.setdefault("text_tokens", data.text.tokens)
    if "num_classes" in fields and "num_classes" not in stated:
        # Kinds of models that are unconditional by default have classes if another field is valid with classes only.
        conditional = model.get("num_classes", fields["num_classes"].default) != 0
        with_classes = {**model, "num_classes": data.classes}
        needs_classes = _parsed(model) is None and _parsed(with_classes) is not None
        model |= {"num_classes": data.classes} if conditional or needs_classes else {}
    parsed = _parsed(model)
    if parsed is not None and parsed.space is None and data.space is not None:
        is_other = parsed.samples_pixels != (data.space is Space.PIXELS)
        model |= {"space": data.space.value} if is_other or parsed.space_is_assumed else {}


def _parsed(model: Mapping[str, Any]) -> ModelConfig | None:
    """The model; None if it is not valid, which is explained when the recipe is validated."""
    kind: Any = ModelConfig
    try:
        parsed: ModelConfig = kind.model_validate(dict(model))
    except ValidationError:
        return None
    return parsed


def require_fit(model: ModelConfig, data: DataFacts, name: str) -> None:
    """Raise `ConfigError`, one line, if a model cannot be trained on data."""
    expected = (model.in_channels, model.input_size, model.input_size)
    if data.shape != expected:
        raise ConfigError(
            f"data {name} has images of {data.shape}, but the model takes {expected}; give data of this shape, or a "
            "model for these data"
        )
    if data.space is not None and model.space is not None and data.space is not model.space:
        raise ConfigError(f"data {name} holds {data.space.value}, but the model is one of {model.space.value}")
    if model.text is not None and data.text is None:
        raise ConfigError(f"data {name} has no texts, but the model is conditioned by texts")
    if model.text is not None and data.text is not None:
        if model.text.channels != data.text.channels or model.text.tokens < data.text.tokens:
            raise ConfigError(
                f"data {name} has texts of {data.text.tokens} tokens with {data.text.channels} channels, but the model "
                f"takes {model.text.tokens} with {model.text.channels}"
            )
        return
    if not model.classes.unconditional and data.classes > model.classes.count:
        raise ConfigError(f"data {name} has {data.classes} classes, but the model has {model.classes.count}")
