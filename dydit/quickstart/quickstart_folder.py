"""The folder of a quickstart: unfinished while `.work/` is in it, finished once `report.json` is there without it."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import ValidationError

from dydit.errors import OutputError
from dydit.files import explained, write_atomic, write_json
from dydit.locks import FileLock
from dydit.reports.results import Result
from dydit.runtime.images.image_files import kept_arrays

R = TypeVar("R", bound=Result)
KIND = "dydit-quickstart"
WORK, SETTINGS, REPORT = ".work", "settings.json", "report.json"
FOLDERS = ("bundle", "static-bundle", "samples")
RESULTS = ("parity.json", "bench.json", "report.html", REPORT)
PICTURES = ("samples.png", "masks.png", "tokens.png", "plan.png", "parity.png", "latency.png")


class QuickstartFolder:
    """What is there, what may be written, and the results of stages that are done."""

    def __init__(self, out: Path):
        self.out, self.work = out, out / WORK

    @property
    def finished(self) -> bool:
        """Whether a quickstart was completed here."""
        values = read_object(self.out / REPORT)
        return values is not None and values.get("kind") == KIND and not self.work.exists()

    @property
    def begun(self) -> bool:
        """Whether a quickstart was begun here and not completed."""
        values = read_object(self.work / SETTINGS)
        return values is not None and values.get("kind") == KIND

    def require_free(self, overwrite: bool) -> None:
        """Raise `OutputError` where a quickstart is finished (unless `overwrite`), or where something else is."""
        if self.finished:
            if not overwrite:
                raise OutputError(
                    f"{self.out} holds a finished quickstart (open {self.out / 'report.html'}); to make it anew add "
                    "--overwrite, or choose another --out"
                )
        elif not self.begun and (self.out.is_symlink() or self.out.exists()):
            if not self.out.is_dir():
                raise OutputError(f"{self.out} exists and is not a folder; choose another --out")
            if any(entry.name != WORK for entry in self.out.iterdir()):
                raise OutputError(f"{self.out} holds files that are not a quickstart's; choose another --out")

    @contextlib.contextmanager
    def open(self, settings: Mapping[str, Any], overwrite: bool) -> Iterator[None]:
        """Hold the folder for this process alone; `settings` identify the run that an unfinished folder holds."""
        expected = {"kind": KIND, **json.loads(json.dumps(settings, allow_nan=False))}
        busy = f"another quickstart is writing {self.out}; wait for it"
        with explained(self.out):
            self.work.mkdir(parents=True, exist_ok=True)
            with FileLock(self.work / "lock").require(busy):
                found = read_object(self.work / SETTINGS)
                if overwrite or found is None:
                    self._clear()
                    write_json(self.work / SETTINGS, expected)
                elif found != expected:
                    raise OutputError(
                        f"{self.out} holds an unfinished quickstart with other settings or weights; to make it anew "
                        "add --overwrite, or choose another --out"
                    )
                yield

    def _clear(self) -> None:
        """Remove what a quickstart writes, and nothing else; the report first, so that no half passes for a whole."""
        for name in (REPORT, *RESULTS, *PICTURES):
            (self.out / name).unlink(missing_ok=True)
        for name in FOLDERS:
            shutil.rmtree(self.out / name, ignore_errors=True)
        for entry in self.work.iterdir():
            if entry.name != "lock":
                entry.unlink()

    def save(self, name: str, values: Mapping[str, Any]) -> None:
        """Keep the result of a stage until the run is finished."""
        write_json(self.work / name, dict(values))

    def save_arrays(self, name: str, **arrays: np.ndarray) -> None:
        """The same for arrays."""
        data = io.BytesIO()
        np.savez_compressed(data, allow_pickle=False, **arrays)
        write_atomic(self.work / name, data.getvalue())

    def load_arrays(self, name: str, *arrays: str) -> list[np.ndarray] | None:
        """The arrays that were kept, in this order; None where they are not there yet, or are damaged."""
        return kept_arrays(self.work / name, *arrays)

    def load(self, name: str, kind: type[R]) -> R | None:
        """A stage's result, from the working files or the folder itself; None where it is not there, or not whole."""
        values = read_object(self.work / name) or read_object(self.out / name)
        try:
            return None if values is None else kind.parse(values)
        except ValidationError:
            return None

    def finish(self, values: Mapping[str, Any]) -> None:
        """Write `report.json` and remove the working files."""
        write_json(self.out / REPORT, {"kind": KIND, **values})
        shutil.rmtree(self.work, ignore_errors=True)


def read_object(path: Path) -> dict[str, Any] | None:
    """A JSON object from a file; None where there is none, or something else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None
