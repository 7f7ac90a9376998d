"""Sends the log of a run to TensorBoard or Weights & Biases, through accelerate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dydit.extras import require
from dydit.training.recipe import Recipe, Tracker

FOLDER = "trackers"
PROJECT = "dydit"


def require_trackers(trackers: Sequence[Tracker]) -> None:
    """Raise `BackendError`, one line, if the package of a tracker is missing."""
    if trackers:
        require(f"logging to {' and '.join(trackers)}", list(trackers))


def start_trackers(accelerator: Any, recipe: Recipe, out: Path) -> None:
    """Start the trackers that the accelerator was made with. Files are in `out/trackers`."""
    if not recipe.trackers:
        return
    (out / FOLDER).mkdir(exist_ok=True)
    settings = {Tracker.WANDB.value: {"name": recipe.name, "dir": str(out / FOLDER)}}
    stated = {
        key: value for key, value in recipe.model_dump(mode="json").items() if isinstance(value, int | float | str)
    }
    accelerator.init_trackers(PROJECT, stated, {name: settings[name] for name in recipe.trackers if name in settings})


def track(accelerator: Any, entry: dict[str, Any]) -> None:
    """Send a line of the log: values by name, at their iteration."""
    values = {key: value for key, value in entry.items() if key != "iteration"}
    accelerator.log(values, step=entry["iteration"])


def finish_trackers(accelerator: Any) -> None:
    """Let trackers write what they hold. (`Accelerator.end_training` would end the process group, too.)"""
    for tracker in accelerator.trackers:
        tracker.finish()
