"""The folder of a sampling run, which a killed run leaves in a state that the same command completes.

    OUT/.work/run.json             what the run was asked for; while it is there, the run is not finished
    OUT/.work/000012.npz           batch 12: `segments` that it has behind it, its `latents`, steps `repeated` so far
    OUT/.work/worker-2-of-8.lock   held by worker 2 of 8 while it works; `finish.lock` by who writes the results, `lock`
                                   for the moment in which a worker comes in
    OUT/samples.json               written when all other files are; then `.work` goes

Every file is replaced atomically, so a batch is either before or after a segment. A damaged batch starts again.

A batch belongs to one worker, by its number modulo how many there are (`Worker.share`), so a worker knows its batches
and passes each segment once. All that work at a time must count alike: a worker with another count is refused while one
is at work, and goes on from where they were once they ended or died, for a batch's file says how far it is. Locks go
with the process that holds them. Machines need a file system that they share, locks included (NFS has them).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dydit.errors import OutputError
from dydit.files import explained, parents, write_atomic, write_json
from dydit.locks import FileLock
from dydit.runtime.bulk.workers import Worker
from dydit.runtime.images.image_files import kept_arrays
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
        # The first again: when another worker ends the run in between, that comes and the second goes.
        for file in (self.out / SUMMARY, self.work / RUN, self.out / SUMMARY):
            if (values := _read_json(file)) is not None:
                self._require_same(values.get("settings"))
                if file.name == RUN:
                    return None
                kinds = {"files": list, "repeated_steps": int, "sha256": dict}
                if any(not isinstance(values.get(name, {}), kind) for name, kind in kinds.items()):
                    raise OutputError(f"{file} was changed by hand; remove the folder and sample again")
                return values
        if any(entry.name != WORK for entry in self.out.iterdir()):
            raise OutputError(f"{self.out} exists and holds no sampling run; choose another output")
        return None

    @contextlib.contextmanager
    def open(self, worker: Worker) -> Iterator[None]:
        """Hold a worker's place in the folder, made where it is not there, for this process alone.

        Raises `OutputError` where another process has it, or has another number of workers in mind. In a finished run
        there is nothing to hold.
        """
        begun = os.path.lexists(self.work)
        with explained(self.out), parents(self.work / RUN), contextlib.ExitStack() as held:
            try:
                self._come_in(worker, held)
            except FileNotFoundError:  # of `.work`, which another worker removes in this moment, or something is wrong
                if not self._finished:
                    raise
            try:
                yield
            except BaseException:
                # A run that fails before it has saved anything leaves the folder as it was. Other workers may be in it.
                if not begun and worker.count == 1 and not self._finished and not any(self.work.glob("[!.]*.npz")):
                    shutil.rmtree(self.work, ignore_errors=True)
                raise

    @contextlib.contextmanager
    def repairing(self) -> Iterator[bool]:
        """Whether a finished run is this process's to repair, for the time of the block."""
        with explained(self.out), contextlib.ExitStack() as held:
            try:
                self.work.mkdir(exist_ok=True)
                free = held.enter_context(FileLock(self.work / "finish.lock").attempt())
            except FileNotFoundError:  # another process repaired it in this moment
                free = False
            yield free

    def _come_in(self, worker: Worker, held: contextlib.ExitStack) -> None:
        if self._finished:
            return
        self.work.mkdir(parents=True, exist_ok=True)
        with FileLock(self.work / "lock").attempt(wait=True):
            if self._finished:
                return
            for file in sorted(self.work.glob("worker-*.lock")):
                other = Worker(*map(int, re.findall(r"\d+", file.name)))
                if other.count != worker.count:
                    with FileLock(file).attempt() as free:
                        if not free:
                            raise OutputError(
                                f"worker {other} is sampling into {self.out} and this is worker {worker}; wait until "
                                "it ends, or give all the same number of workers"
                            )
            file = self.work / f"worker-{worker.number}-of-{worker.count}.lock"
            if not held.enter_context(FileLock(file).attempt()):
                raise OutputError(
                    f"another process is sampling into {self.out}; wait for it"
                    if worker.count == 1
                    else f"another process is sampling into {self.out} as worker {worker}; wait for it, or give this "
                    "one a number of its own"
                )
            if not (self.work / RUN).is_file():
                write_json(self.work / RUN, {"settings": self._settings})

    @contextlib.contextmanager
    def finishing(self) -> Iterator[bool]:
        """Whether the results are this process's to write, for the time of the block: nobody else writes or wrote them.

        To be asked when all batches are done: who is refused may then leave.
        """
        with contextlib.ExitStack() as held:
            try:
                free = held.enter_context(FileLock(self.work / "finish.lock").attempt())
            except FileNotFoundError:  # another worker finished the run
                free = False
            yield free and not self._finished

    @property
    def fresh(self) -> bool:
        """Whether no run was started here yet."""
        return not (self.work / RUN).is_file()

    @property
    def _finished(self) -> bool:
        return (self.out / SUMMARY).is_file()

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Write `samples.json`, and remove what killed processes left of half-written files."""
        for part in self.out.glob(".*.part"):
            part.unlink(missing_ok=True)
        write_json(self.out / SUMMARY, {"settings": self._settings, **facts})

    def clear(self) -> None:
        """Remove the working files, of a finished run."""
        shutil.rmtree(self.work, ignore_errors=True)

    def _require_same(self, found: Any) -> None:
        if not isinstance(found, dict):
            raise OutputError(f"{self.out} exists and holds no sampling run; choose another output")
        names = sorted(name for name in {*found, *self._settings} if found.get(name) != self._settings.get(name))
        if names == ["threads"] and isinstance(threads := found.get("threads"), int):
            raise OutputError(
                f"{self.out} holds a run of {threads} threads, and this would be one of {self._settings['threads']}, "
                f"whose images could differ in their last bits; give threads={threads} (--threads {threads}), the same "
                "to all workers, or choose another output"
            )
        if names:
            listed = "; ".join(
                f"{n}: {_short(found.get(n))} there, {_short(self._settings.get(n))} asked" for n in names
            )
            raise OutputError(f"{self.out} holds a run with other settings ({listed}); choose another output")


class FolderStore:
    """Latents of each batch between segments, as files of a run's folder (a `LatentStore`).

    A batch's file is looked up when the batch is first asked for: file systems of several machines may go on telling
    for a while that a file is not there, so that of another worker is best looked up late, and once.
    """

    def __init__(self, folder: RunFolder, batches: Sequence[Batch], image: tuple[int, ...]):
        self._work = folder.work
        self._shapes = [(len(batch.images), *image) for batch in batches]
        self._known: dict[int, tuple[int, int]] = {}  # segments behind it, steps repeated

    def repeated_steps(self, batches: Iterable[int]) -> int:
        """Steps of these batches that were repeated at full capacity, whichever call ran them."""
        return sum(self._state(batch)[1] for batch in batches)

    def done(self, batch: int) -> int:
        """How many segments the batch has behind it."""
        return self._state(batch)[0]

    def load(self, batch: int) -> np.ndarray:
        """Its latents then, f32 [B, C, S, S]."""
        state = self._read(batch)
        if state is None:
            raise OutputError(f"{self._file(batch)} was damaged while the run was going on; run again")
        return state["latents"]

    def save(self, batch: int, segments: int, latents: np.ndarray, repeated: int) -> None:
        """Keep the latents after `segments` segments; the last of them repeated `repeated` steps."""
        total = repeated + (self._state(batch)[1] if segments > 1 else 0)
        data = io.BytesIO()
        np.savez(data, segments=np.int64(segments), repeated=np.int64(total), latents=latents.astype(np.float32))
        write_atomic(self._file(batch), data.getvalue())
        self._known[batch] = segments, total

    def _state(self, batch: int) -> tuple[int, int]:
        if batch not in self._known:
            state = self._read(batch)
            self._known[batch] = (0, 0) if state is None else (int(state["segments"]), int(state["repeated"]))
        return self._known[batch]

    def _file(self, batch: int) -> Path:
        return self._work / f"{batch:06d}.npz"

    def _read(self, batch: int) -> dict[str, np.ndarray] | None:
        """A batch's state; None where there is none, or it is damaged (the archive's checksums tell)."""
        names = ("segments", "repeated", "latents")
        if (arrays := kept_arrays(self._file(batch), *names)) is None:
            return None
        state = dict(zip(names, arrays, strict=True))
        return state if state["latents"].shape == self._shapes[batch] else None


class ShareStore:
    """A worker's batches of a store, numbered from 0 (a `LatentStore`); all are looked up at once."""

    def __init__(self, store: FolderStore, share: Sequence[int]):
        self._store, self._share = store, share
        for batch in share:
            store.done(batch)

    def done(self, batch: int) -> int:
        """How many segments the batch has behind it."""
        return self._store.done(self._share[batch])

    def load(self, batch: int) -> np.ndarray:
        """Its latents then, f32 [B, C, S, S]."""
        return self._store.load(self._share[batch])

    def save(self, batch: int, segments: int, latents: np.ndarray, repeated: int) -> None:
        """Keep the latents after `segments` segments; the last of them repeated `repeated` steps."""
        self._store.save(self._share[batch], segments, latents, repeated)


def _read_json(file: Path) -> dict[str, Any] | None:
    """An object from a file; empty where the file holds something else, None where there is no such file."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise OutputError(f"{file} cannot be read ({error}); choose another output") from error
    return values if isinstance(values, dict) else {}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:24]}...{text[-12:]}"
