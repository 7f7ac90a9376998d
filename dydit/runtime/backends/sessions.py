"""Making sessions of ONNX Runtime on graphs of a bundle, whose weights lie in a file beside them.

ONNX Runtime maps that file itself. It refuses one whose real path is outside the graph's folder, which links lead to
(the cache of a hub, git-annex), and it needs a file system that maps files. Where either is so, the weights are mapped,
or read, here and handed over, to be used where they are: nothing is copied.
"""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np

from dydit.bundle.bundle import mapped_file
from dydit.bundle.stored_weights import WEIGHTS
from dydit.bundle.vae_entry import VAE_DECODER, VAE_WEIGHTS

_FOLDER = "session.model_external_initializers_file_folder_path"
_IN_PLACE = "session.use_external_initializer_file_buffers_directly"
_CPU = "CPUExecutionProvider"
_shared: weakref.WeakValueDictionary[Path, np.ndarray] = weakref.WeakValueDictionary()


def open_session(
    ort: Any, file: Path, settings: Any, providers: list[Any], graph: bytes | None = None, **more: Any
) -> tuple[Any, object]:
    """An `InferenceSession` on a graph of a bundle, and what must live as long as the session.

    `graph` replaces the file's content. Raises what ONNX Runtime raises, and `BackendError` where there is no memory
    for the weights.
    """
    weights = file.with_name(VAE_WEIGHTS if file.name == VAE_DECODER else WEIGHTS)
    held = _handed_over(file, weights) if weights.is_file() else None  # a graph may have all its weights inside
    if held is not None:
        graph = file.read_bytes() if graph is None else graph
        settings.add_external_initializers_from_files_in_memory([weights.name], [held], [held.nbytes])
        if providers == [_CPU]:
            settings.add_session_config_entry(_IN_PLACE, "1")
    if graph is not None:
        settings.add_session_config_entry(_FOLDER, str(file.parent))
    return ort.InferenceSession(str(file) if graph is None else graph, settings, providers=providers, **more), held


def _handed_over(file: Path, weights: Path) -> np.ndarray | None:
    """The weights, where ONNX Runtime cannot take them from their file."""
    if not (file.is_symlink() or weights.is_symlink()) and isinstance(mapped_file(weights), np.memmap):
        return None
    held = _shared.get(weights)
    if held is None:
        _shared[weights] = held = mapped_file(weights)
    return held
