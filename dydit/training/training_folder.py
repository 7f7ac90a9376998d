"""The folder of a training run: its lock, and whether the run in it is the requested one.

Nothing is written before all checks have passed, so a run that is refused leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dydit.checkpoints.checkpoint import load_checkpoint
from dydit.errors import CheckpointError, ConfigError, OutputError
from dydit.files import explained, sha256_of, user_path
from dydit.locks import FileLock
from dydit.training.recipe import Recipe
from dydit.training.state import MODEL, RECIPE, SUMMARY

LOCK = ".lock"


@contextlib.contextmanager
def held_folder(out: Path) -> Iterator[None]:
    """Hold `out` for the time of the block. A missing folder is made, and removed again if it stays empty.

    Raises `OutputError` if another process trains in it, or it cannot be made.
    """
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    busy = f"another process is training in {out}; wait until it ends, or stop it"
    try:
        with contextlib.ExitStack() as stack:
            with explained(out):
                out.mkdir(parents=True, exist_ok=True)
                stack.enter_context(FileLock(out / LOCK, temporary=True).require(busy))
            yield
    finally:
        for folder in missing:  # the innermost first; a folder that is not empty stays, and so do those above it
            with contextlib.suppress(OSError):
                folder.rmdir()


def has_run(out: Path) -> bool:
    """Whether a run was started in `out`."""
    return (out / RECIPE).is_file()


def check_folder(out: Path, recipe: Recipe, resume: bool, any_init: bool = False) -> None:
    """Check that `out` is empty, or, with `resume`, holds this recipe's run, which may be made longer.

    `any_init`: ignore which weights it started from. Raises `OutputError` if it holds something and `resume` is false,
    or if it holds no run; `ConfigError` if it holds the run of another recipe (naming the settings that differ).
    """
    if not out.is_dir() or not any(not path.name.endswith(".part") and path.name != LOCK for path in out.iterdir()):
        return
    if not resume:
        raise OutputError(f"{out} is not empty; choose another folder, or continue its run with --resume")
    stored, requested = stored_recipe(out), identity(recipe)
    stored |= {key: value for key, value in _defaults().items() if key not in stored}
    if any_init:
        stored = {**stored, **{key: requested[key] for key in ("init", "init_weights")}}
    different = differing_settings(stored, requested)
    if not different:
        return
    for name, verb in (("init", "started from"), ("teacher", "learns from")):
        path = getattr(recipe, name)
        if stored.get(name) != requested[name] and path is not None and not user_path(path).exists():
            raise CheckpointError(
                f"{name} {path} does not exist, so it is unknown whether the run in {out} {verb} it; give the file "
                f"that it {verb}"
            )
    if differing_settings({**stored, "iterations": recipe.iterations}, requested):
        raise ConfigError(f"{out} holds the run of another recipe; it differs in {', '.join(different)}")
    before = stored.get("iterations")
    if not isinstance(before, int) or before > recipe.iterations:
        raise ConfigError(
            f"{out} holds a run of {before} iterations, but {recipe.iterations} are requested; a run can be made "
            "longer, not shorter: choose another folder for a shorter run"
        )


def stored_recipe(out: Path) -> dict[str, Any]:
    """The recipe of the run in `out`. Raises `OutputError` if there is none, or it is damaged."""
    if not has_run(out):
        raise OutputError(f"{out} holds no run to resume ({RECIPE} is missing); choose another folder")
    return _read_object(out / RECIPE, "start again in another folder")


def finished_summary(out: Path, recipe: Recipe) -> dict[str, Any] | None:
    """The summary of the run in `out` if it is finished and its weights are undamaged, else None.

    Raises `OutputError` if the summary is damaged.
    """
    if not (out / SUMMARY).is_file():
        return None
    summary = _read_object(out / SUMMARY, "remove it and use --resume to write it again")
    expected = summary.get("model_sha256")
    if summary.get("iterations") != recipe.iterations or not (out / MODEL).is_file():
        return None
    return summary if expected is None or expected == sha256_of(out / MODEL) else None


def _read_object(path: Path, advice: str) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise OutputError(f"{path} is damaged ({error}); {advice}") from error
    if not isinstance(values, dict):
        raise OutputError(f"{path} is damaged (it is not a JSON object); {advice}")
    return values


def identity(recipe: Recipe) -> dict[str, Any]:
    """What makes two runs the same: the recipe, with the hashes of `init` and `teacher` in place of their paths."""
    values = recipe.model_dump(mode="json")
    if recipe.init is not None and Path(recipe.init).is_file():
        values["init"] = f"sha256:{sha256_of(Path(recipe.init))}"
    if recipe.teacher is not None:  # a file or a folder, which a resumed run reads again
        path = user_path(recipe.teacher)
        if path.is_file():
            values["teacher"] = f"sha256:{sha256_of(path)}"
        elif path.is_dir():
            values["teacher"] = f"sha256:{load_checkpoint(path).sha256}"
    return values


def _defaults() -> dict[str, Any]:
    """The defaults of settings, as JSON has them: a run of an older dydit has the defaults of newer settings."""
    fields = Recipe.model_fields.items()
    return {name: json.loads(json.dumps(field.default)) for name, field in fields if not field.is_required()}


def differing_settings(stored: Any, requested: Any, prefix: str = "") -> list[str]:
    """`key (stored in the folder, requested)` of every setting that differs; nested keys are joined by dots."""
    if isinstance(stored, dict) and isinstance(requested, dict):
        keys = [*stored, *(key for key in requested if key not in stored)]
        return [
            line
            for key in keys
            for line in differing_settings(stored.get(key), requested.get(key), f"{prefix}.{key}" if prefix else key)
        ]
    return [] if stored == requested else [f"{prefix} ({stored} in the folder, {requested} requested)"]
