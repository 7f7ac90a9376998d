"""What a run starts from: new weights, or a checkpoint, with new routers or a new class table where it needs them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch

from dydit.checkpoints.checkpoint import load_checkpoint
from dydit.errors import ConfigError
from dydit.files import user_path
from dydit.models.config import ModelConfig
from dydit.models.dynamic import DynamicModel
from dydit.models.registry import architecture_of
from dydit.training.draws import Purpose, stream
from dydit.training.recipe import Recipe, Routed, Stage, StartWeights
from dydit.words import counted


def starting_model(recipe: Recipe) -> DynamicModel:
    """The model that a run starts from.

    New weights without `init`. For a dynamic run: a static checkpoint, reordered by importance, with new routers. A
    checkpoint with routers is used as it is. A checkpoint of other classes gets a new class table (`kept_classes`).
    Routers that the recipe fixes are excluded from training. Raises `ConfigError` if the start does not fit the recipe.
    """
    generator = torch.Generator().manual_seed(int(stream(recipe.seed, Purpose.INITIAL_WEIGHTS).integers(0, 2**62)))
    known = architecture_of(recipe.model)
    model = known.masked(recipe.model)
    if recipe.init is None:
        if recipe.stage is not Stage.STATIC:
            kind = "static" if recipe.stage is Stage.DYNAMIC else "dynamic"
            raise ConfigError(f"recipe {recipe.name} starts from a {kind} model; give its checkpoint with init=PATH")
        known.initialize(model, generator)
        return model
    start = load_checkpoint(Path(recipe.init), weights=recipe.init_weights)
    kept = kept_classes(start.config, recipe.model)
    sizes, wanted = _require_fit(recipe, start.config, kept), recipe.model.sizes
    state = start.state
    if kept is not None:
        classes = torch.Generator().manual_seed(int(stream(recipe.seed, Purpose.NEW_CLASSES).integers(0, 2**62)))
        state = known.with_classes(state, start.config, kept, classes)
    if sizes == wanted:
        if recipe.random_routers and recipe.stage is Stage.DYNAMIC:
            raise ConfigError(f"random_routers adds routers to a static model, but init {recipe.init} has its own")
        model.load_state_dict(state)
    else:
        model.load_state_dict(known.ordered_by_importance(state, start.config), strict=False)
        known.initialize_routers(model, generator, recipe.token_bias, recipe.width_bias)
        if recipe.random_routers:
            known.randomize_routers(model, recipe.lambda_target, generator)
    return fix_routers(model, recipe)


def model_to_resume(recipe: Recipe) -> DynamicModel:
    """The model of a run whose weights will be loaded from a saved state."""
    return fix_routers(architecture_of(recipe.model).masked(recipe.model), recipe)


def fix_routers(model: DynamicModel, recipe: Recipe) -> DynamicModel:
    """Exclude the routers from training that the recipe fixes: open ones (`routed`), or all (`random_routers`)."""
    if not model.config.dynamic:
        return model
    for width in model.width_routers():
        if recipe.routed is Routed.TOKENS:
            width.open()
        width.requires_grad_(recipe.routed is not Routed.TOKENS and not recipe.random_routers)
    for tokens in model.token_routers():
        if recipe.routed is Routed.WIDTH:
            tokens.open()
        tokens.requires_grad_(recipe.routed is not Routed.WIDTH and not recipe.random_routers)
    return model


# The checkpoint


@lru_cache(maxsize=8)
def _config_of(path: Path, weights: StartWeights | None, size: int, changed: int) -> ModelConfig:
    return load_checkpoint(path, weights=weights).config


def start_config(init: str, weights: StartWeights | None) -> ModelConfig:
    """The configuration of an existing checkpoint. Raises `CheckpointError` if it is unusable.

    Every tensor of a checkpoint is checked when it is read, so the result is kept while the file stays the same.
    """
    path = user_path(Path(init))
    if not path.is_file():  # a folder, whose files may change
        return load_checkpoint(path, weights=weights).config
    facts = path.stat()
    return _config_of(path, weights, facts.st_size, facts.st_mtime_ns)


def with_process_of_start(recipe: Recipe) -> Recipe:
    """The recipe with the process of its `init`. A file that does not exist is refused where it is needed.

    Raises `ConfigError` if the recipe states another process, and `CheckpointError` if the checkpoint is unusable.
    """
    if recipe.init is None or not user_path(Path(recipe.init)).exists():
        return recipe
    return recipe.started_from(start_config(recipe.init, recipe.init_weights), f"init {recipe.init}")


def with_one_process(recipes: Sequence[Recipe]) -> list[Recipe]:
    """Runs of a sequence, each of which starts from the one before, with the process of the first one's `init`.

    Raises as `with_process_of_start` does.
    """
    first = with_process_of_start(recipes[0])
    return [first, *(recipe.started_from(first.model, f"the model of {first.name}") for recipe in recipes[1:])]


# Classes


def kept_classes(start: ModelConfig, wanted: ModelConfig) -> Sequence[int | None] | None:
    """For each class of the wanted model the class of the start whose row it keeps, or None if its row is new.

    None if the class table stays as it is: the models have as many classes, and do not state different names. Equal
    names stand for the same class.
    """
    ours, theirs = wanted.class_names, start.class_names
    fixed = start.classes.unconditional or wanted.classes.unconditional or start.text or wanted.text
    if fixed or start.architecture != wanted.architecture:
        return None
    if start.classes.count == wanted.classes.count and (ours is None or theirs is None or ours == theirs):
        return None
    rows = {} if theirs is None else {name: row for row, name in reversed(list(enumerate(theirs)))}
    names: Sequence[str | None] = ours if ours is not None else [None] * wanted.classes.count
    return [None if name is None else rows.get(name) for name in names]


def _require_fit(recipe: Recipe, start: ModelConfig, kept: Sequence[int | None] | None) -> ModelConfig:
    """The sizes of a start with the class table that is wanted.

    Raises `ConfigError` if they are not those of the recipe's model, or the start was trained in another way.
    """
    wanted = recipe.model.sizes
    sizes = (start if kept is None else start.with_classes(len(kept))).sizes
    if sizes not in (wanted, wanted.without_routers()):
        name, *values = sizes.difference(wanted if start.dynamic else wanted.without_routers())
        raise ConfigError(
            f"init {recipe.init} is a model of other sizes than that of the recipe: {name} {values[0]}, not {values[1]}"
        )
    if start.process is not None and start.diffusion != recipe.model.diffusion:
        raise ConfigError(
            f"init {recipe.init} was trained in another way than recipe {recipe.name} trains: {start.process.words}, "
            f"not {recipe.model.diffusion.words}; change model.process or init"
        )
    return sizes


def start_note(recipe: Recipe) -> str:
    """What changes about the classes of the checkpoint that a run starts from, as a sentence; "" if nothing does.

    Raises `ConfigError` if the start does not fit the recipe, as `starting_model` does.
    """
    if recipe.init is None or not user_path(Path(recipe.init)).exists():
        return ""
    start = start_config(recipe.init, recipe.init_weights)
    kept = kept_classes(start, recipe.model)
    if kept is None:
        return ""
    _require_fit(recipe, start, kept)
    rows = sum(row is not None for row in kept)
    same = f"{rows} rows of classes with equal names are kept" if rows else "all of its rows for classes are new"
    null = "; the row for no class is kept" if start.null_class is not None else ""
    return (
        f"the class table of {recipe.init} ({counted(start.classes.count, 'class', 'classes')}) is rebuilt for "
        f"{counted(len(kept), 'class', 'classes')}: {same}{null}"
    )
