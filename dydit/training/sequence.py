"""Sequences of runs, each of which starts from the weights of the one before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dydit.errors import ConfigError, OutputError
from dydit.files import user_path
from dydit.training.recipe import Recipe
from dydit.training.start import with_one_process
from dydit.training.teacher import teacher_config
from dydit.training.trainer import Progress, TrainResult, train
from dydit.training.training_folder import check_folder, has_run, stored_recipe


def train_sequence(
    recipes: Sequence[Recipe], out: Path, resume: bool = False, progress: Progress | None = None
) -> list[TrainResult]:
    """Run recipes one after another, each in `out/<stage>`, each starting from the weights of the one before.

    A single recipe runs in `out` itself. With `resume`, finished runs are kept. All runs have the process of the first.
    """
    out = user_path(out)
    folders = [out] if len(recipes) == 1 else [out / recipe.stage.value for recipe in recipes]
    if resume and not any(map(has_run, folders)):
        raise OutputError(f"{out} holds no run to resume; remove --resume to start one there")
    if len(recipes) == 1:
        return [train(recipes[0], out, resume, progress)]
    recipes = with_one_process(recipes)
    _check_sequence(recipes, folders, resume)
    results: list[TrainResult] = []
    for recipe, folder in zip(recipes, folders, strict=True):
        if results:
            recipe = recipe.model_copy(update={"init": str(results[-1].model), "init_weights": None})
        results.append(train(recipe, folder, resume, progress))
    return results


def _check_sequence(recipes: Sequence[Recipe], folders: Sequence[Path], resume: bool) -> None:
    """Check before the first run starts that no run will be refused because of its folder or its teacher."""
    longer = None
    for number, (recipe, folder) in enumerate(zip(recipes, folders, strict=True)):
        teacher_config(recipe)
        check_folder(folder, recipe, resume, any_init=number > 0)
        if longer is not None and has_run(folder):
            raise ConfigError(
                f"{folder} started from the weights of {longer}, which therefore cannot be made longer; choose another "
                "folder for a longer sequence"
            )
        if has_run(folder) and stored_recipe(folder).get("iterations") != recipe.iterations:
            longer = folder
