"""Writing results so that a killed process leaves either the old state or the new one, never a half of either."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from dydit.errors import OutputError

_CHUNK = 1 << 22


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file, read in 4 MiB pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def fsync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a file to write; on success it becomes `path` by a rename, on failure nothing is left of it.

    Raises `OutputError` where the disk is full or the folder cannot be written.
    """
    path = Path(path)
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            raise
        fsync_folder(path.parent)


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path`, all of it or nothing. Raises as `atomic_file` does."""
    with atomic_file(path) as file:
        file.write(data)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, atomically. NaN and infinities are refused: they are not JSON."""
    write_atomic(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def require_absent(path: Path) -> None:
    """Raise `OutputError` if `path` exists: results are never written over something that was there."""
    if path.exists() or path.is_symlink():
        raise OutputError(f"{path} exists already; choose another output or remove it first")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path`; rename it to `path` on success, remove it on failure.

    The rename is the last thing that happens, so `path` is complete or absent whenever the process dies.
    """
    path = Path(path)
    require_absent(path)
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale_parts(path)
        part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=f".{os.getpid()}.part", dir=path.parent))
        try:
            yield part
            for file in part.rglob("*"):
                if file.is_file():
                    with open(file, "rb") as opened:
                        os.fsync(opened.fileno())
                elif file.is_dir():
                    fsync_folder(file)
            fsync_folder(part)
            os.chmod(part, 0o755)
            require_absent(path)
            os.rename(part, path)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        fsync_folder(path.parent)


def remove_stale_parts(path: Path) -> None:
    """Remove the temporary folders that killed runs left beside `path`; those of living processes stay."""
    for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        owner = part.name.split(".")[-2]
        if owner.isdigit() and not _alive(int(owner)):
            shutil.rmtree(part, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write `path` into an `OutputError` that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(f"no space left on the disk that holds {path}; free some and run again") from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise OutputError(f"cannot write {path}: {error.strerror}; choose a folder that can be written") from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENOTEMPTY, errno.ENAMETOOLONG):
            raise OutputError(f"cannot write {path}: {error.strerror}; choose another output") from error
        raise
