"""The folder of a sampling run, which a killed run leaves in a state that the same command completes.

    OUT/.work/run.json        what the run was asked for; while it is there, the run is not finished
    OUT/.work/000012.npz      batch 12: `segments` that it has behind it, its `latents`, steps `repeated` so far
    OUT/samples.json          written when all other files are; then `.work` goes

Every file is replaced atomically, so a batch is either before or after a segment. A damaged batch starts again.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dydit.errors import OutputError
from dydit.files import explained, write_atomic, write_json
from dydit.runtime.request import Batch

WORK, RUN, SUMMARY = ".work", "run.json", "samples.json"


class RunFolder:
    """The state of one run in its folder. `settings` identify the run; another run's folder is refused."""

    def __init__(self, out: Path, settings: Mapping[str, Any]):
        self.out, self.work = out, out / WORK
        self._settings = json.loads(json.dumps(settings, allow_nan=False))

    def summary(self) -> dict[str, Any] | None:
        """The content of `samples.json` where the run is finished, else None.

        Raises `OutputError` where the folder holds a run with other settings, or something else.
        """
        if not self.out.exists() and not self.out.is_symlink():
            return None
        if not self.out.is_dir():
            raise OutputError(f"{self.out} exists and is not a folder; choose another output")
        for file in (self.out / SUMMARY, self.work / RUN):
            if file.is_file():
                values = _read_json(file)
                self._require_same(values.get("settings"))
                if file.name == RUN:
                    return None
                if not isinstance(values.get("files"), list) or not isinstance(values.get("repeated_steps"), int):
                    raise OutputError(f"{file} was changed by hand; remove the folder and sample again")
                return values
        if any(entry.name != WORK for entry in self.out.iterdir()):
            raise OutputError(f"{self.out} exists and holds no sampling run; choose another output")
        return None

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Hold the folder, made where it is not there, for this process alone."""
        with explained(self.out):
            self.work.mkdir(parents=True, exist_ok=True)
            with open(self.work / "lock", "w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise OutputError(f"another process is sampling into {self.out}; wait for it") from error
                if not (self.work / RUN).is_file() and not (self.out / SUMMARY).is_file():
                    write_json(self.work / RUN, {"settings": self._settings})
                yield

    @property
    def fresh(self) -> bool:
        """Whether no run was started here yet."""
        return not (self.work / RUN).is_file()

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Write `samples.json` and remove the working files, and what killed processes left of half-written ones."""
        for part in self.out.glob(".*.part"):
            part.unlink(missing_ok=True)
        write_json(self.out / SUMMARY, {"settings": self._settings, **facts})
        self.clear()

    def clear(self) -> None:
        """Remove the working files."""
        shutil.rmtree(self.work, ignore_errors=True)

    def _require_same(self, found: Any) -> None:
        if not isinstance(found, dict):
            raise OutputError(f"{self.out} exists and holds no sampling run; choose another output")
        names = sorted(name for name in {*found, *self._settings} if found.get(name) != self._settings.get(name))
        if names:
            listed = "; ".join(
                f"{n}: {_short(found.get(n))} there, {_short(self._settings.get(n))} asked" for n in names
            )
            raise OutputError(f"{self.out} holds a run with other settings ({listed}); choose another output")


class FolderStore:
    """Latents of each batch between segments, as files of a run's folder (a `LatentStore`)."""

    def __init__(self, folder: RunFolder, batches: Sequence[Batch], image: tuple[int, ...]):
        self._work = folder.work
        self._shapes = [(len(batch.images), *image) for batch in batches]
        self._segments, self._repeated = [0] * len(batches), [0] * len(batches)
        for batch in range(len(batches)):
            if (state := self._read(batch)) is not None:
                self._segments[batch], self._repeated[batch] = int(state["segments"]), int(state["repeated"])

    @property
    def repeated_steps(self) -> int:
        """Steps repeated at full capacity, over the whole run."""
        return sum(self._repeated)

    def done(self, batch: int) -> int:
        """How many segments the batch has behind it."""
        return self._segments[batch]

    def load(self, batch: int) -> np.ndarray:
        """Its latents then, f32 [B, C, S, S]."""
        state = self._read(batch)
        if state is None:
            raise OutputError(f"{self._file(batch)} was damaged while the run was going on; run again")
        return state["latents"]

    def save(self, batch: int, segments: int, latents: np.ndarray, repeated: int) -> None:
        """Keep the latents after `segments` segments; the last of them repeated `repeated` steps."""
        total = repeated + (self._repeated[batch] if segments > 1 else 0)
        data = io.BytesIO()
        np.savez(data, segments=np.int64(segments), repeated=np.int64(total), latents=latents.astype(np.float32))
        write_atomic(self._file(batch), data.getvalue())
        self._segments[batch], self._repeated[batch] = segments, total

    def _file(self, batch: int) -> Path:
        return self._work / f"{batch:06d}.npz"

    def _read(self, batch: int) -> dict[str, np.ndarray] | None:
        """A batch's state; None where there is none, or it is damaged (the archive's checksums tell)."""
        try:
            with np.load(self._file(batch), allow_pickle=False) as file:
                state = {name: file[name] for name in ("segments", "repeated", "latents")}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        # NumPy hands out a member that does not start like an array as bytes.
        arrays = all(isinstance(value, np.ndarray) for value in state.values())
        return state if arrays and state["latents"].shape == self._shapes[batch] else None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise OutputError(f"{file} cannot be read ({error}); choose another output") from error
    return values if isinstance(values, dict) else {}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:24]}...{text[-12:]}"
