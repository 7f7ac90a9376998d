"""What the folder around a diffusers model says of it: a pipeline with an autoencoder samples latents."""

from __future__ import annotations

import json
from pathlib import Path

from dydit.models.config import Space

_AUTOENCODERS = ("vae", "vqvae")  # a pipeline's part, and its folder


def space_of_folder(folder: Path) -> Space | None:
    """Latents where `folder`, or the pipeline that holds it, has an autoencoder; else None, as nothing tells."""
    folder = folder.resolve()
    pipeline = folder.parent if folder.name == "transformer" else folder
    if any((pipeline / name / "config.json").is_file() for name in _AUTOENCODERS):
        return Space.LATENTS
    try:
        index = json.loads((pipeline / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    named = isinstance(index, dict) and any(_is_there(index.get(name)) for name in _AUTOENCODERS)
    return Space.LATENTS if named else None


def _is_there(part: object) -> bool:
    """Whether an entry of `model_index.json`, [library, class], names a part; [null, null] says that it is left out."""
    return isinstance(part, list) and any(part)
