"""What a run keeps on disk, so that it can be killed at any moment and resumed to the same bits.

    recipe.json              the recipe, its `init` as a hash; a run is resumed only with the same one
    log.jsonl                one line every `log_every` iterations; nothing in it depends on the clock
    state-00000500/          weights, EMA and optimiser moments (tensors.safetensors) and the counters (state.json)
    model.safetensors        the EMA weights, at the end
    train.json, curves.png   the summary, at the end; a folder with train.json is a finished run

A state is written to a temporary sibling and renamed; the one before it is removed only then.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dydit.errors import CheckpointError, ConfigError, OutputError
from dydit.files import explained, new_folder, sha256_of, write_atomic, write_json
from dydit.training.recipe import Recipe

RECIPE, LOG, MODEL, SUMMARY, CURVES = "recipe.json", "log.jsonl", "model.safetensors", "train.json", "curves.png"
_TENSORS, _COUNTERS = "tensors.safetensors", "state.json"


@dataclass
class Counters:
    """How far a run has come. `sums` are those of the metrics since the last line of the log, `summed` their number."""

    iteration: int = 0  # iterations done
    skipped: int = 0  # of these, steps skipped for their gradient norm
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    summed: int = 0


def claim_folder(out: Path, recipe: Recipe, resume: bool) -> None:
    """Make `out` this recipe's folder.

    Raises `OutputError` where it holds something and `resume` is false or it is no run, `ConfigError` where it is the
    run of another recipe (naming the settings that differ).
    """
    with explained(out):
        out.mkdir(parents=True, exist_ok=True)
        present = [path for path in out.iterdir() if not path.name.endswith(".part")]
    if not present:
        write_json(out / RECIPE, identity(recipe))
        return
    if not resume:
        raise OutputError(f"{out} is not empty; choose another folder, or continue the run in it with --resume")
    if not (out / RECIPE).is_file():
        raise OutputError(f"{out} holds no run to resume ({RECIPE} is missing); choose another folder")
    try:
        stored = json.loads((out / RECIPE).read_text())
    except json.JSONDecodeError as error:
        raise OutputError(f"{out / RECIPE} is damaged ({error}); start again in another folder") from error
    different = differing_settings(stored, identity(recipe))
    if different:
        raise ConfigError(f"{out} is a run of another recipe; it differs in {', '.join(different)}")


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


def states(out: Path) -> list[Path]:
    """The complete states in `out`, oldest first."""
    found = [path for path in out.glob("state-*") if path.name[6:].isdigit() and (path / _COUNTERS).is_file()]
    return sorted(found, key=lambda path: int(path.name[6:]))


def save_state(
    out: Path, counters: Counters, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Write `state-<iteration>`, then remove the older ones."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"ema.{name}": value for name, value in ema.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = value
    older = states(out)
    with new_folder(out / f"state-{counters.iteration:08d}") as part:
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, part / _TENSORS)
        (part / _COUNTERS).write_text(json.dumps(asdict(counters), allow_nan=False))
    for path in older:
        shutil.rmtree(path)


def load_state(path: Path, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer) -> Counters:
    """Load the state in `path` into the modules and the optimiser. Raises `CheckpointError` where it is damaged."""
    try:
        tensors = load_file(path / _TENSORS)
        counters = Counters(**json.loads((path / _COUNTERS).read_text()))
        model.load_state_dict(_with_prefix(tensors, "model."))
        ema.load_state_dict(_with_prefix(tensors, "ema."))
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"the training state {path} cannot be read ({error}); remove it and resume") from error
    named = {parameter: name for name, parameter in model.named_parameters()}
    keys = sorted({name.split(".")[1] for name in tensors if name.startswith("optimizer.")})
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            names = {key: f"optimizer.{key}.{named[parameter]}" for key in keys}
            entries = {key: tensors[name] for key, name in names.items() if name in tensors}
            # The step counter stays where AdamW made it; the moments live beside their parameter.
            optimizer.state[parameter] = {
                key: value if key == "step" else value.to(parameter.device) for key, value in entries.items()
            }
    return counters


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def append_log(out: Path, entry: dict[str, Any]) -> None:
    """Add one line to the log, durably."""
    with explained(out / LOG), open(out / LOG, "a") as file:
        file.write(json.dumps(entry, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_log(out: Path) -> list[dict[str, Any]]:
    """The log's lines; a last line that a killed process left unfinished is ignored."""
    if not (out / LOG).is_file():
        return []
    lines = (out / LOG).read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


def truncate_log(out: Path, iteration: int) -> None:
    """Drop the lines after `iteration`: the resumed run writes them again."""
    kept = [entry for entry in read_log(out) if entry["iteration"] <= iteration]
    write_atomic(out / LOG, "".join(json.dumps(entry, allow_nan=False) + "\n" for entry in kept).encode())
