"""The files of a run. It can be killed at any moment and resumed with the same bits.

    recipe.json              the recipe, with a hash for `init`; a run can only be resumed with the same recipe
    log.jsonl                one line every `log_every` iterations; nothing in it depends on the clock
    state-00000500/          weights, EMA and optimizer moments (tensors.safetensors) and the counters (state.json)
    samples-00001000.png     samples of the EMA weights (dydit/training/samples.py), every `sample_every` iterations
    trackers/                what trackers write, if there are any (dydit/training/trackers.py)
    model.safetensors        the EMA weights, at the end
    train.json, curves.png   the summary, at the end; a run is finished if it has as many iterations as the recipe
    .lock                    held by the process that trains

A state is written to a temporary sibling and renamed; only then is the previous one removed. The last one stays, so
that a finished run can be made longer. A state holds only finite values.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dydit.errors import CheckpointError, OutputError, one_line
from dydit.files import explained, new_folder, sha256_of, write_atomic
from dydit.training.spread import spread_like, whole

RECIPE, LOG, MODEL, SUMMARY, CURVES = "recipe.json", "log.jsonl", "model.safetensors", "train.json", "curves.png"
_TENSORS, _COUNTERS = "tensors.safetensors", "state.json"
FORMAT = 1
"""Format of a state. States without the number have this format, too."""


@dataclass
class Counters:
    """The progress of a run. `sums`: of metrics since the last line of the log; `summed`: of how many iterations."""

    iteration: int = 0  # iterations done
    skipped: int = 0  # of these, steps that were skipped because of their gradient norm
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    planned: int = 0  # iterations of the recipe when the state was written
    made_longer_at: list[int] = field(default_factory=list)  # iterations where a run had ended and was made longer
    sums: dict[str, float] = field(default_factory=dict)
    summed: int = 0


def states(out: Path) -> list[Path]:
    """The complete states in `out`, oldest first."""
    complete = [path for path in out.glob("state-*") if path.name[6:].isdigit() and (path / _COUNTERS).is_file()]
    return sorted(complete, key=lambda path: int(path.name[6:]))


def state_tensors(
    model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer, keep: bool = True
) -> dict[str, Tensor]:
    """Weights, EMA and moments on the CPU. All processes call it together; one that does not `keep` them gets none."""
    named = {f"model.{name}": value for name, value in model.state_dict().items()}
    named |= {f"ema.{name}": value for name, value in ema.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            named[f"optimizer.{key}.{name}"] = value
    tensors = {}
    for name, value in named.items():
        complete = whole(value.detach())
        if keep:
            tensors[name] = complete.cpu().contiguous()
    return tensors


def save_state(out: Path, counters: Counters, tensors: dict[str, Tensor]) -> None:
    """Write `state-<iteration>` with `state_tensors`, then remove the older ones."""
    older = states(out)
    with new_folder(out / f"state-{counters.iteration:08d}") as part:
        try:
            save_file(tensors, part / _TENSORS)
        except SafetensorError as error:  # it wraps what the system reports, such as a full disk
            raise _system_error(error, part / _TENSORS) from error
        values = {"format": FORMAT, "sha256": sha256_of(part / _TENSORS), **asdict(counters)}
        (part / _COUNTERS).write_text(json.dumps(values, allow_nan=False))
    for path in older:
        shutil.rmtree(path)


def _system_error(error: SafetensorError, path: Path) -> Exception:
    """The `OSError` behind an error of safetensors, which names it as "(os error 28)"; else the error itself."""
    match = re.search(r"os error (\d+)", str(error))
    return OSError(int(match[1]), os.strerror(int(match[1])), str(path)) if match else error


def load_state(path: Path, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer) -> Counters:
    """Load the state in `path` into the modules and the optimizer. Raises `CheckpointError` if it is damaged."""
    try:
        values = json.loads((path / _COUNTERS).read_text())
        if values.pop("format", FORMAT) != FORMAT:
            raise CheckpointError(
                f"the training state {path} was written by another version of dydit; resume with that version"
            )
        digest = values.pop("sha256", None)
        if digest is not None and digest != sha256_of(path / _TENSORS):
            raise ValueError(f"{_TENSORS} was changed: its SHA-256 differs")
        counters = Counters(**values)
        tensors = load_file(path / _TENSORS)
        for prefix, module in (("model.", model), ("ema.", ema)):
            _load(module, {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)})
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"the training state {path} cannot be read ({one_line(error)}); restore it from a copy, or remove it: "
            "--resume then continues from the state before it, or starts again if there is none"
        ) from error
    named = {parameter: name for name, parameter in model.named_parameters()}
    keys = sorted({name.split(".")[1] for name in tensors if name.startswith("optimizer.")})
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            names = {key: f"optimizer.{key}.{named[parameter]}" for key in keys}
            entries = {key: tensors[name] for key, name in names.items() if name in tensors}
            # AdamW keeps the step counter on the CPU, unless it is fused, and the moments on their parameter's device.
            optimizer.state[parameter] = {
                key: _moment(value, parameter, on_cpu=key == "step" and not group.get("fused"))
                for key, value in entries.items()
            }
    return counters


def _load(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load whole tensors into a module whose weights may be spread over processes."""
    present = module.state_dict()
    module.load_state_dict({name: spread_like(each, present.get(name, each)) for name, each in tensors.items()})


def _moment(value: Tensor, parameter: Tensor, on_cpu: bool) -> Tensor:
    if on_cpu:
        return value
    return spread_like(value, parameter) if value.shape == parameter.shape else value.to(parameter.device)


def append_log(out: Path, entry: dict[str, Any]) -> None:
    """Add one line to the log, durably."""
    with explained(out / LOG), open(out / LOG, "a") as file:
        file.write(json.dumps(entry, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_log(out: Path) -> list[dict[str, Any]]:
    """The log's entries. An unfinished last line is ignored; other damaged lines raise `OutputError`."""
    if not (out / LOG).is_file():
        return []
    entries = []
    for number, line in enumerate((out / LOG).read_bytes().split(b"\n")[:-1], 1):
        try:
            entries.append(json.loads(line))
            if not isinstance(entries[-1]["iteration"], int):
                raise TypeError("iteration is not an integer")
        except (ValueError, KeyError, TypeError) as error:
            raise OutputError(
                f"line {number} of {out / LOG} is damaged ({one_line(error)}); remove that line and run again"
            ) from error
    return entries


def truncate_log(out: Path, iteration: int, log_every: int) -> None:
    """Remove the lines after `iteration`: the resumed run writes them again.

    A line that is no multiple of `log_every` is removed, too: it was the end of a run that is now made longer.
    """
    entries = read_log(out)
    remaining = [each for each in entries if each["iteration"] <= iteration and each["iteration"] % log_every == 0]
    write_atomic(out / LOG, "".join(json.dumps(entry, allow_nan=False) + "\n" for entry in remaining).encode())
