"""What the pipeline around a diffusers model says: whether it samples latents, and the names of its classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dydit.models.config import Space

_AUTOENCODERS = ("vae", "vqvae")  # names in `model_index.json`, and of folders
_NAMES = "id2label"


def space_of_folder(folder: Path) -> Space | None:
    """Latents if `folder`, or the pipeline around it, has an autoencoder. Otherwise None, because it is not known."""
    if any((_pipeline(folder) / name / "config.json").is_file() for name in _AUTOENCODERS):
        return Space.LATENTS
    index = _index(folder)
    return Space.LATENTS if any(_is_present(index.get(name)) for name in _AUTOENCODERS) else None


def class_names_of_folder(folder: Path, classes: int) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    """The texts of `id2label` in the pipeline's `model_index.json`, one for each class; and a note if they do not fit.

    A text is one or more names with commas between them. None if there are none, or if they do not fit.
    """
    stated = _index(folder).get(_NAMES)
    if not stated:
        return None, ()
    known = stated if isinstance(stated, dict) else {}
    names = [name for label in range(classes) if isinstance(name := known.get(str(label)), str)]
    if not len(names) == len(known) == classes:
        return None, (
            f"{_NAMES} of model_index.json does not name the {classes} classes of the model, and is not used",
        )
    return tuple(names), ()


def _pipeline(folder: Path) -> Path:
    folder = folder.resolve()
    return folder.parent if folder.name in ("transformer", "transformer_ema") else folder


def _index(folder: Path) -> dict[str, Any]:
    """The content of the pipeline's `model_index.json`; empty if there is none, or if it cannot be read."""
    try:
        index = json.loads((_pipeline(folder) / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return index if isinstance(index, dict) else {}


def _is_present(part: object) -> bool:
    """Whether an entry of `model_index.json`, [library, class], names a component. An absent one is [null, null]."""
    return isinstance(part, list) and any(part)
