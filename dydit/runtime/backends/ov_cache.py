"""`~/.cache/dydit/openvino/`: models that OpenVINO compiled, for the next process.

    <key>.model     32 bytes of SHA-256 of the rest, then what `CompiledModel.export_model` wrote

The key is a hash of all that the model was compiled from. OpenVINO's own `CACHE_DIR` is not used, because it does not
notice a changed byte in the weights of a cached model (2026.4 runs it and returns other values). A file holds the
weights of one subnetwork, so the folder has a limit; the files that were read least recently go first.

The cache only saves time. Whatever is wrong with it, the model is compiled again and nothing is reported.

`DYDIT_OPENVINO_CACHE` names another folder; `off` stands for none.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

from dydit.errors import OutputError
from dydit.files import user_cache, user_path, write_atomic

VARIABLE, OFF = "DYDIT_OPENVINO_CACHE", "off"
ENDING = ".model"
LIMIT = 4 << 30
"""Bytes in the folder, at most."""
_DIGEST = hashlib.sha256().digest_size


class ModelCache:
    """Compiled models by key. `folder`: None for no cache. `limit`: bytes of all files."""

    def __init__(self, folder: Path | None, limit: int = LIMIT):
        self.folder, self._limit = folder, limit

    @classmethod
    def of_user(cls) -> ModelCache:
        """The cache of this user, as the environment says."""
        chosen = os.environ.get(VARIABLE)
        if chosen == OFF:
            return cls(None)
        return cls(user_path(chosen) if chosen else user_cache("openvino"))

    def read(self, key: str) -> bytes | None:
        """A model, as it was written; None if there is none, or it is damaged."""
        if self.folder is None:
            return None
        path = self._path(key)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        if hashlib.sha256(memoryview(data)[_DIGEST:]).digest() != data[:_DIGEST]:
            self.drop(key)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # read just now
        return data[_DIGEST:]

    def write(self, key: str, model: bytes) -> None:
        """Save a model, if it fits; older ones make room."""
        size = _DIGEST + len(model)
        if self.folder is None or size > self._limit:
            return
        with contextlib.suppress(OSError, OutputError):
            self._make_room(size)
            write_atomic(self._path(key), hashlib.sha256(model).digest() + model)

    def drop(self, key: str) -> None:
        """Remove a model that cannot be used."""
        with contextlib.suppress(OSError):
            self._path(key).unlink()

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{key}{ENDING}"

    def _make_room(self, size: int) -> None:
        assert self.folder is not None
        states = {}
        for path in self.folder.glob(f"*{ENDING}"):
            with contextlib.suppress(OSError):  # another process may remove it
                states[path] = path.stat()
        used = sum(state.st_size for state in states.values())
        for path in sorted(states, key=lambda each: states[each].st_mtime_ns):
            if used + size <= self._limit:
                return
            with contextlib.suppress(OSError):
                path.unlink()
            used -= states[path].st_size
