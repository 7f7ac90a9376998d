"""The folder of a quickstart: unfinished while it has `.work/`, finished once it has `report.json` without that."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from dydit.errors import OutputError
from dydit.files import explained, write_json
from dydit.locks import FileLock
from dydit.reports.results import Result

R = TypeVar("R", bound=Result)
KIND = "dydit-quickstart"
WORK, SETTINGS, REPORT = ".work", "settings.json", "report.json"
FOLDERS = ("bundle", "static-bundle", "samples")
RESULTS = ("parity.json", "bench.json", "report.html", REPORT)
PICTURES = ("samples.png", "masks.png", "tokens.png", "plan.png", "parity.png", "latency.png")


class QuickstartFolder:
    """Its state, what may be written into it, and the results of finished stages."""

    def __init__(self, out: Path):
        self.out, self.work = out, out / WORK

    @property
    def finished(self) -> bool:
        """Whether a quickstart was completed here."""
        values = read_object(self.out / REPORT)
        return values is not None and values.get("kind") == KIND and not self.work.exists()

    @property
    def begun(self) -> bool:
        """Whether a quickstart was started here and not completed."""
        values = read_object(self.work / SETTINGS)
        return values is not None and values.get("kind") == KIND

    def require_free(self, overwrite: bool) -> None:
        """Raise `OutputError` if the folder holds a finished quickstart (unless `overwrite`) or other files."""
        if self.finished:
            if not overwrite:
                raise OutputError(
                    f"{self.out} holds a finished quickstart (open {self.out / 'report.html'}); to replace it add "
                    "--overwrite, or choose another --out"
                )
        elif not self.begun and (self.out.is_symlink() or self.out.exists()):
            if not self.out.is_dir():
                raise OutputError(f"{self.out} exists and is not a folder; choose another --out")
            if any(entry.name != WORK for entry in self.out.iterdir()):
                raise OutputError(f"{self.out} holds files that do not belong to a quickstart; choose another --out")

    @contextlib.contextmanager
    def open(self, settings: Mapping[str, Any], overwrite: bool) -> Iterator[None]:
        """Lock the folder for this process. `settings` identify the run of an unfinished folder."""
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
                        f"{self.out} holds an unfinished quickstart with other settings or weights; to replace it "
                        "add --overwrite, or choose another --out"
                    )
                yield

    def _clear(self) -> None:
        """Remove what a quickstart writes, and nothing else. The report goes first, because it means a finished run."""
        for name in (REPORT, *RESULTS, *PICTURES):
            (self.out / name).unlink(missing_ok=True)
        for name in FOLDERS:
            shutil.rmtree(self.out / name, ignore_errors=True)
        for entry in self.work.iterdir():
            if entry.name != "lock":
                entry.unlink()

    def save(self, name: str, values: Mapping[str, Any]) -> None:
        """Save the result of a stage until the run is finished."""
        write_json(self.work / name, dict(values))

    def load(self, name: str, kind: type[R]) -> R | None:
        """The result of a stage, from the work files or the folder itself; None if it does not exist or is damaged."""
        values = read_object(self.work / name) or read_object(self.out / name)
        try:
            return None if values is None else kind.parse(values)
        except ValidationError:
            return None

    def finish(self, values: Mapping[str, Any]) -> None:
        """Write `report.json` and remove the work files."""
        write_json(self.out / REPORT, {"kind": KIND, **values})
        shutil.rmtree(self.work, ignore_errors=True)


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None
