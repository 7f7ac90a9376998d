"""Whether a diffusers model samples latents, which the autoencoder in its pipeline's folder shows."""

from __future__ import annotations

import json
from pathlib import Path

from dydit.models.config import Space

_AUTOENCODERS = ("vae", "vqvae")  # names in `model_index.json`, and of folders


def space_of_folder(folder: Path) -> Space | None:
    """Latents if `folder`, or the pipeline around it, has an autoencoder. Otherwise None, because it is not known."""
    folder = folder.resolve()
    pipeline = folder.parent if folder.name == "transformer" else folder
    if any((pipeline / name / "config.json").is_file() for name in _AUTOENCODERS):
        return Space.LATENTS
    try:
        index = json.loads((pipeline / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    named = isinstance(index, dict) and any(_is_present(index.get(name)) for name in _AUTOENCODERS)
    return Space.LATENTS if named else None


def _is_present(part: object) -> bool:
    """Whether an entry of `model_index.json`, [library, class], names a component. An absent one is [null, null]."""
    return isinstance(part, list) and any(part)
