"""The folder of a sampling run. After a kill, the same command completes it.

    OUT/.work/run.json             the request of the run; while it exists, the run is not finished
    OUT/.work/backend.json         the backend that several workers agreed on, before the first of them began
    OUT/.work/000012.npz           batch 12: `segments` that it has passed, its `latents`, steps `repeated` so far
    OUT/.work/worker-2-of-8.lock   held by worker 2 of 8 while it works
    OUT/.work/finish.lock          held by the process that writes the results
    OUT/.work/lock                 held briefly while a worker starts
    OUT/samples.json               written after all other files; then `.work` is removed

Every file is replaced atomically, so a batch is either before or after a segment. A damaged batch starts again.

A batch belongs to one worker, by its number modulo the number of workers (`Worker.share`). So a worker knows its
batches and runs each segment once. All workers that run at a time must agree on their number: a worker with another
number is refused while they run. Once they have ended or died it continues their batches, because a batch's file says
how far it is. Locks end with the process that holds them. Several machines need a shared file system with locks (NFS
has them).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dydit.diffusion.steps import State
from dydit.errors import OutputError
from dydit.files import explained, parents, write_atomic, write_json
from dydit.locks import FileLock
from dydit.runtime.bulk.workers import Worker
from dydit.runtime.images.image_files import kept_arrays
from dydit.runtime.request import Batch

WORK, RUN, SUMMARY, AGREED = ".work", "run.json", "samples.json", "backend.json"


class RunFolder:
    """The state of one run in its folder. `settings` identify the run; the folder of another run is refused."""

    def __init__(self, out: Path, settings: Mapping[str, Any]):
        self.out, self.work = out, out / WORK
        self._settings = json.loads(json.dumps(settings, allow_nan=False))

    def summary(self) -> dict[str, Any] | None:
        """The content of `samples.json` if the run is finished, else None.

        Raises `OutputError` if the folder holds a run with other settings, or something else.
        """
        if not self.out.exists() and not self.out.is_symlink():
            return None
        if not self.out.is_dir():
            raise OutputError(f"{self.out} exists and is not a folder; choose another output")
        # `samples.json` is read twice: another worker may finish the run in between, and then `run.json` is removed.
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
            raise OutputError(f"{self.out} exists and is not the folder of a sampling run; choose another output")
        return None

    @contextlib.contextmanager
    def open(self, worker: Worker) -> Iterator[None]:
        """Reserve a worker's number in the folder for this process; the folder is made if it is missing.

        Raises `OutputError` if another process has the number, or if workers of another count are running. In a
        finished run there is nothing to reserve.
        """
        begun = os.path.lexists(self.work)
        with explained(self.out), parents(self.work / RUN), contextlib.ExitStack() as held:
            try:
                self._enter(worker, held)
            except FileNotFoundError:  # another worker may be removing `.work` at this moment
                if not self._finished:
                    raise
            try:
                yield
            except BaseException:
                # A run that fails before it has saved anything leaves nothing behind; but others may work here.
                if not begun and worker.count == 1 and not self._finished and not any(self.work.glob("[!.]*.npz")):
                    shutil.rmtree(self.work, ignore_errors=True)
                raise

    def _enter(self, worker: Worker, held: contextlib.ExitStack) -> None:
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
                                f"worker {other} is sampling into {self.out}, but this is worker {worker}; wait until "
                                f"worker {other} ends, or start all workers with the same N in --worker I/N"
                            )
            file = self.work / f"worker-{worker.number}-of-{worker.count}.lock"
            if not held.enter_context(FileLock(file).attempt()):
                raise OutputError(
                    f"another process is sampling into {self.out}; wait for it"
                    if worker.count == 1
                    else f"another process is sampling into {self.out} as worker {worker}; wait for it, or give this "
                    "worker another number"
                )
            if not (self.work / RUN).is_file():
                write_json(self.work / RUN, {"settings": self._settings})

    @contextlib.contextmanager
    def finishing(self, repair: bool = False) -> Iterator[bool]:
        """Reserve writing the results for the time of the block; yields False if another process writes or wrote them.

        Call it when all batches are done, or, with `repair`, on a finished run. A process that gets False has nothing
        left to do.
        """
        with explained(self.out), contextlib.ExitStack() as held:
            try:
                if repair:
                    self.work.mkdir(exist_ok=True)
                free = held.enter_context(FileLock(self.work / "finish.lock").attempt())
            except FileNotFoundError:  # another process finished or repaired the run in this moment
                free = False
            yield free and (repair or not self._finished)

    @property
    def fresh(self) -> bool:
        """Whether no run was started here yet."""
        return not (self.work / RUN).is_file()

    @property
    def _finished(self) -> bool:
        return (self.out / SUMMARY).is_file()

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Write `samples.json`, and remove half-written files that killed processes left."""
        for part in self.out.glob(".*.part"):
            part.unlink(missing_ok=True)
        write_json(self.out / SUMMARY, {"settings": self._settings, **facts})

    def clear(self) -> None:
        """Remove the working files of a finished run."""
        shutil.rmtree(self.work, ignore_errors=True)

    def _require_same(self, stored: Any) -> None:
        if not isinstance(stored, dict):
            raise OutputError(f"{self.out} exists and is not the folder of a sampling run; choose another output")
        names = sorted(name for name in {*stored, *self._settings} if stored.get(name) != self._settings.get(name))
        if names == ["threads"] and isinstance(threads := stored.get("threads"), int):
            raise OutputError(
                f"{self.out} holds a run with {threads} threads, but this run has {self._settings['threads']}; images "
                f"could differ in their last bits; use threads={threads} (--threads {threads}) for all workers, or "
                "choose another output"
            )
        if "num" in names:  # the default batch size follows from the number of images
            names = [name for name in names if name != "batch_size"]
        if names:
            listed = "; ".join(
                f"{n}: {_short(stored.get(n))} in the folder, {_short(self._settings.get(n))} requested" for n in names
            )
            raise OutputError(f"{self.out} holds a run with other settings ({listed}); choose another output")


def begun_backend(out: Path) -> str | None:
    """The backend of the run that began in a folder, or that its workers agreed on; None if there is none."""
    # `samples.json` is read twice, as in `RunFolder.summary`.
    for file in (out / SUMMARY, out / WORK / RUN, out / SUMMARY, out / WORK / AGREED):
        values = _read_json(file)
        settings = {} if values is None else values if file.name == AGREED else values.get("settings")
        if isinstance(settings, dict) and isinstance(backend := settings.get("backend"), str):
            return backend
    return None


def agreed_backend(out: Path, choose: Callable[[], str], worker: Worker) -> str:
    """The backend of a run that has not begun: what `choose` says to the first of its workers, for all of them.

    The others wait for it meanwhile.
    """
    if worker.count == 1:
        return choose()
    work = out / WORK
    with explained(out), parents(work / AGREED), FileLock(work / "lock").attempt(wait=True):
        backend = begun_backend(out)
        if backend is None:
            backend = choose()
            write_json(work / AGREED, {"backend": backend})
        return backend


class FolderStore:
    """Latents of each batch between segments, as files of a run's folder (a `LatentStore`).

    A batch's file is looked up when the batch is first used. A shared file system may report for a while that a new
    file does not exist, so files of other workers are best looked up late, and once.
    """

    def __init__(self, folder: RunFolder, batches: Sequence[Batch], image: tuple[int, ...]):
        self._work = folder.work
        self._shapes = [(len(batch.images), *image) for batch in batches]
        self._known: dict[int, tuple[int, int]] = {}  # segments passed, steps repeated

    def repeated_steps(self, batches: Iterable[int]) -> int:
        """Steps of these batches that were repeated at full capacity, whichever call ran them."""
        return sum(self._state(batch)[1] for batch in batches)

    def done(self, batch: int) -> int:
        return self._state(batch)[0]

    def load(self, batch: int) -> State[np.ndarray]:
        stored = self._read(batch)
        if stored is None:
            raise OutputError(f"{self._file(batch)} was damaged during the run; run again")
        return State(stored["latents"], stored["history"] if stored["history"].size else None)

    def save(self, batch: int, segments: int, state: State[np.ndarray], repeated: int) -> None:
        total = repeated + (self._state(batch)[1] if segments > 1 else 0)
        data = io.BytesIO()
        np.savez(
            data,
            segments=np.int64(segments),
            repeated=np.int64(total),
            latents=state.x.astype(np.float32),
            history=np.empty(0, np.float32) if state.history is None else state.history.astype(np.float32),
        )
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
        """A batch's state; None if it is missing, or damaged by the archive's checksums."""
        names = ("segments", "repeated", "latents", "history")
        if (arrays := kept_arrays(self._file(batch), *names)) is None:
            return None
        state = dict(zip(names, arrays, strict=True))
        fits = state["latents"].shape == self._shapes[batch] and state["history"].shape in (self._shapes[batch], (0,))
        return state if fits else None


class ShareStore:
    """A worker's batches of a store, numbered from 0 (a `LatentStore`). All are looked up at once."""

    def __init__(self, store: FolderStore, share: Sequence[int]):
        self._store, self._share = store, share
        for batch in share:
            store.done(batch)

    def done(self, batch: int) -> int:
        return self._store.done(self._share[batch])

    def load(self, batch: int) -> State[np.ndarray]:
        return self._store.load(self._share[batch])

    def save(self, batch: int, segments: int, state: State[np.ndarray], repeated: int) -> None:
        self._store.save(self._share[batch], segments, state, repeated)


def _read_json(file: Path) -> dict[str, Any] | None:
    """A JSON object from a file; empty if the file holds something else, None if there is no such file."""
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
