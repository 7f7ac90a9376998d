"""Chooses the weights in a training folder of U-ViT: `nnet_ema.pth`, the moving average, or `nnet.pth`.

The programs that train U-ViT save a folder, `N.ckpt/`, with one file for each part of the state: these two state dicts,
and `optimizer.pth`, `lr_scheduler.pth` and `step.pth`, which are not read. No PyTorch here. Errors do not name the
folder: the caller does.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dydit.errors import CheckpointError

AVERAGE, TRAINED = "nnet_ema.pth", "nnet.pth"
_ENTRIES = {"ema": AVERAGE, "model": TRAINED}  # the values of --weights


@dataclass(frozen=True)
class ChosenFile:
    """The file to read, the entry that it stands for ("ema" or "model"), and notes about the choice for the user."""

    path: Path
    entry: str
    notes: tuple[str, ...] = ()


def is_nnet_folder(path: Path) -> bool:
    """Whether a folder has at least one of the two state dicts."""
    return any((path / name).is_file() for name in _ENTRIES.values())


def choose_file(folder: Path, wanted: str | None) -> ChosenFile:
    """The state dict to read: the moving average if there is one, unless the user wants the other.

    `wanted`: "ema", "model" or None. Raises `CheckpointError` for anything that the folder does not have.
    """
    files = {entry: folder / name for entry, name in _ENTRIES.items() if (folder / name).is_file()}
    entry = next(iter(files)) if wanted is None else wanted
    if entry not in files:
        held = " and ".join(f"{each} ({files[each].name})" for each in files)
        raise CheckpointError(f"holds no weights {entry!r:.40}, only {held}; change or remove --weights (weights=)")
    others = [f"{each} ({file.name})" for each, file in files.items() if each != entry]
    note = f"weights: {entry} ({files[entry].name}); "
    note += f"the folder also holds {others[0]} (see --weights)" if others else "the folder holds no others"
    return ChosenFile(files[entry], entry, (note,))
