"""The folder of a run: who may work in it, and whether the run in it is the one that is asked for.

Nothing is written before all is known to be right, so a start that is refused leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dydit.errors import CheckpointError, ConfigError, OutputError
from dydit.files import explained, sha256_of
from dydit.locks import FileLock
from dydit.training.recipe import Recipe
from dydit.training.state import MODEL, RECIPE, SUMMARY

LOCK = ".lock"


@contextlib.contextmanager
def held_folder(out: Path) -> Iterator[None]:
    """Hold `out` for the time of the block; where it was missing it is made, and goes again if it is left empty.

    Raises `OutputError` where another process trains in it, or it cannot be made.
    """
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    busy = f"another process is training in {out}; wait for it to end, or stop it, before you go on there"
    try:
        with contextlib.ExitStack() as held:
            with explained(out):
                out.mkdir(parents=True, exist_ok=True)
                held.enter_context(FileLock(out / LOCK, temporary=True).require(busy))
            yield
    finally:
        for folder in missing:  # the innermost first; one that holds something stays, and so do those above it
            with contextlib.suppress(OSError):
                folder.rmdir()


def has_run(out: Path) -> bool:
    """Whether a run was begun in `out`."""
    return (out / RECIPE).is_file()


def check_folder(out: Path, recipe: Recipe, resume: bool, any_init: bool = False) -> None:
    """See that `out` is empty, or, with `resume`, holds this recipe's run; a run may be asked to become longer.

    `any_init`: whatever it started from. Raises `OutputError` where it holds something and `resume` is false or it is
    no run, `ConfigError` where it is the run of another recipe (naming the settings that differ).
    """
    if not out.is_dir() or not any(not path.name.endswith(".part") and path.name != LOCK for path in out.iterdir()):
        return
    if not resume:
        raise OutputError(f"{out} is not empty; choose another folder, or continue the run in it with --resume")
    stored, asked = stored_recipe(out), identity(recipe)
    if any_init:
        stored = {**stored, "init": asked["init"]}
    different = differing_settings(stored, asked)
    if not different:
        return
    if stored.get("init") != asked["init"] and recipe.init is not None and not Path(recipe.init).exists():
        raise CheckpointError(
            f"init {recipe.init} is not there, so it cannot be told whether the run in {out} started from it; give the "
            "file that it started from"
        )
    if differing_settings({**stored, "iterations": recipe.iterations}, asked):
        raise ConfigError(f"{out} is a run of another recipe; it differs in {', '.join(different)}")
    before = stored.get("iterations")
    if not isinstance(before, int) or before > recipe.iterations:
        raise ConfigError(
            f"{out} is a run of {before} iterations, {recipe.iterations} asked for: a run can be made longer, not "
            "shorter; choose another folder for a shorter one"
        )


def stored_recipe(out: Path) -> dict[str, Any]:
    """The recipe of the run in `out`. Raises `OutputError` where there is none, or it is damaged."""
    if not has_run(out):
        raise OutputError(f"{out} holds no run to resume ({RECIPE} is missing); choose another folder")
    return _read_object(out / RECIPE, "start again in another folder")


def finished_summary(out: Path, recipe: Recipe) -> dict[str, Any] | None:
    """The summary of the run in `out` where it is finished and its weights are there; None where there is more to do.

    Raises `OutputError` where the summary is damaged.
    """
    if not (out / SUMMARY).is_file():
        return None
    summary = _read_object(out / SUMMARY, "remove it, and --resume writes it again")
    whole = summary.get("model_sha256")
    if summary.get("iterations") != recipe.iterations or not (out / MODEL).is_file():
        return None
    return summary if whole is None or whole == sha256_of(out / MODEL) else None


def _read_object(path: Path, advice: str) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise OutputError(f"{path} is damaged ({error}); {advice}") from error
    if not isinstance(values, dict):
        raise OutputError(f"{path} is damaged (it is no JSON object); {advice}")
    return values


def identity(recipe: Recipe) -> dict[str, Any]:
    """What makes two runs the same: the recipe, where `init` is told by its content and not by where the file lies."""
    values = recipe.model_dump(mode="json")
    if recipe.init is not None and Path(recipe.init).is_file():
        values["init"] = f"sha256:{sha256_of(Path(recipe.init))}"
    return values


def differing_settings(stored: Any, asked: Any, prefix: str = "") -> list[str]:
    """`key: stored, now asked` of every setting that differs, nested keys joined by dots."""
    if isinstance(stored, dict) and isinstance(asked, dict):
        keys = [*stored, *(key for key in asked if key not in stored)]
        return [
            line
            for key in keys
            for line in differing_settings(stored.get(key), asked.get(key), f"{prefix}.{key}" if prefix else key)
        ]
    return [] if stored == asked else [f"{prefix} ({stored} there, {asked} asked for)"]
