"""Writes results so that a killed process leaves either the old state or the new one, never half of it.

`atomic_file` replaces a file. `new_file` and `new_folder` create one that must not exist, and lock it while they work:
if two processes write one output, the second fails at once, and neither replaces the other's result. The umask decides
the modes of files and folders.

While an output `NAME` is written, these lie beside it: `.NAME.<host and random>.part`, which becomes `NAME` at the end,
and `.NAME.lock`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from dydit.errors import OutputError
from dydit.locks import FileLock

_CHUNK = 1 << 22
_LONG_NAME = 200
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM, errno.EBADF, errno.EISDIR, errno.ENOSYS}
"""Errors of file systems that cannot flush a folder, or a file opened for reading: CIFS, some of FUSE."""
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV, errno.EACCES, errno.EINVAL}
_NO_RENAMES = {errno.EXDEV, errno.ENOSYS, errno.ENOTSUP, errno.EMFILE, errno.EBUSY}
"""Errors of a rename where the names count as different devices, or where folders cannot be renamed at all."""


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file, read in 4 MiB pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def user_path(path: Path | str) -> Path:
    """A path as a user wrote it, with a leading `~` replaced by the home folder."""
    path = Path(path)
    try:
        return path.expanduser()
    except RuntimeError:  # an unknown user: `~` is then part of a name
        return path


def user_cache(*names: str) -> Path | None:
    """The folder for what later processes of this user need not make again: `~/.cache/dydit/...`, or where the
    environment puts caches. None if the user has no home folder. The folder is not made.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "dydit", *names).expanduser()
    except RuntimeError:
        return None


def fsync_path(path: Path) -> None:
    """Make a file, or renames inside a folder, durable, as far as its file system can."""
    with _as_far_as_possible():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _as_far_as_possible() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a file to write. On success it is renamed to `path`; on failure it is removed.

    Raises `OutputError` if the disk is full or the folder cannot be written.
    """
    path = Path(path)
    with explained(path), parents(path), _part_file(path) as (file, part):
        yield file
        _close_durably(file)
        _replace(part, path)


@contextlib.contextmanager
def new_file(path: Path, same_is_fine: bool = False) -> Iterator[BinaryIO]:
    """As `atomic_file`, for a path that must not exist: an existing file is never replaced.

    `same_is_fine`: a file with the same bytes may exist. Raises `OutputError` if another file exists, at the start or
    at the end, or if another process is writing it.
    """
    path = Path(path)
    if not same_is_fine:
        require_absent(path)
    with explained(path), parents(path), claimed(path), _part_file(path) as (file, part):
        yield file
        _close_durably(file)
        _publish(part, path, same_is_fine)


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path`, all of it or nothing. Raises as `atomic_file` does."""
    with atomic_file(path) as file:
        file.write(data)


def write_new(path: Path, data: bytes) -> None:
    """Write `data` to `path`, which must not exist. Call it while `path` is `claimed`. Raises `OutputError`."""
    with explained(path), parents(path), _part_file(path) as (file, part):
        file.write(data)
        _close_durably(file)
        _publish(part, path, same_is_fine=False)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, atomically. NaN and infinities are refused: they are not JSON."""
    write_atomic(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def require_absent(path: Path) -> None:
    """Raise `OutputError` if `path` exists: results never replace anything."""
    if os.path.lexists(path):
        raise OutputError(f"{path} exists already; choose another output or remove it first")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path`; rename it to `path` on success, remove it on failure.

    The rename comes last, so `path` is complete or absent whenever the process dies. (Where folders cannot be renamed,
    their content is moved, and this does not hold.) Raises `OutputError` if `path` exists, at the start or at the end,
    or if another process is writing it.
    """
    path = Path(path)
    require_absent(path)
    with explained(path), parents(path), claimed(path):
        part = _part_of(path)
        part.mkdir()
        try:
            yield part
            for entry in part.rglob("*"):
                fsync_path(entry)
            fsync_path(part)
            require_absent(path)
            _move_folder(part, path)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        fsync_path(path.parent)


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Lock `path` as this process's output, and remove what killed processes left of it.

    Raises `OutputError` if another process has locked it. If the file system has no locks, nothing is locked, and the
    first process to finish wins.
    """
    busy = f"another process is writing {path}; wait for it, or choose another output"
    with FileLock(_beside(path, "lock"), temporary=True).require(busy) as is_held:
        if is_held:
            _remove_parts(path)
        yield


def _remove_parts(path: Path) -> None:
    """Remove what killed processes of this machine left of `path`; processes of other machines may be alive."""
    pattern = re.compile(re.escape(_beside(path, _host()).name) + r"[0-9a-f]{8}\.part")
    for entry in path.parent.iterdir():
        if pattern.fullmatch(entry.name):
            remove(entry)


def _part_of(path: Path) -> Path:
    return _beside(path, f"{_host()}{secrets.token_hex(4)}.part")


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def remove(path: Path) -> None:
    """Remove a file, or a folder with its content. Errors are ignored."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _beside(path: Path, ending: str) -> Path:
    """A hidden name beside `path`, made of its name and an ending; no longer than file systems allow."""
    name = path.name
    if len(os.fsencode(name)) > _LONG_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return path.parent / f".{name}.{ending}"


@contextlib.contextmanager
def parents(path: Path) -> Iterator[None]:
    """Create the folders above `path` for the block. If the block fails, new ones are removed again."""
    missing = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in missing:  # the innermost first; a folder that is not empty stays, and so do those above it
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


@contextlib.contextmanager
def _part_file(path: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """A file beside `path`, open for writing. It is always removed afterwards."""
    part = _part_of(path)
    try:
        with open(part, "xb") as file:
            yield file, part
    finally:
        part.unlink(missing_ok=True)


def _close_durably(file: BinaryIO) -> None:
    file.flush()
    with _as_far_as_possible():
        os.fsync(file.fileno())
    file.close()


def _replace(part: Path, path: Path) -> None:
    """Rename `part` to `path`; if the file system cannot, copy its bytes."""
    try:
        os.replace(part, path)
    except OSError as error:
        if error.errno not in _NO_RENAMES:
            raise
        shutil.copyfile(part, path)
        fsync_path(path)
    fsync_path(path.parent)


def _publish(part: Path, path: Path, same_is_fine: bool) -> None:
    """Give `part` the name `path` unless it exists, in one step."""
    try:
        try:
            os.link(part, path)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))  # reserves the name
            _replace(part, path)
    except FileExistsError:
        if not (same_is_fine and path.is_file() and sha256_of(path) == sha256_of(part)):
            require_absent(path)
            raise
    fsync_path(path.parent)


def _move_folder(part: Path, path: Path) -> None:
    try:
        os.rename(part, path)
    except OSError as error:
        if error.errno not in _NO_RENAMES:
            raise
        path.mkdir()  # reserves the name
        for entry in sorted(part.iterdir()):
            shutil.move(entry, path / entry.name)
        part.rmdir()


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn the operating system's errors in writing `path` into an `OutputError` that says what to do.

    Errors that name a file elsewhere, such as one that was read, are not changed.
    """
    try:
        yield
    except OSError as error:
        if (reason := _reason(error, path)) is None or _elsewhere(error, path):
            raise
        raise OutputError(reason) from error


def _reason(error: OSError, path: Path) -> str | None:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left on the disk that holds {path}; free some space and run again"
    if error.errno == errno.EFBIG:
        return (
            f"cannot write {path}: {error.strerror} for its file system or for `ulimit -f`; raise the limit, or choose "
            "another output"
        )
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"cannot write {path}: {error.strerror}; choose a folder that can be written"
    if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENOTEMPTY, errno.ENAMETOOLONG):
        return f"cannot write {path}: {error.strerror}; choose another output"
    return None


def _elsewhere(error: OSError, path: Path) -> bool:
    """Whether the error names a file that is not `path`, nor in it or above it, nor one of its parts."""
    path = Path(os.path.abspath(path))
    names = [Path(os.path.abspath(name)) for name in (error.filename, error.filename2) if isinstance(name, str | Path)]
    own_names = (path.name, f".{path.name}.", _beside(path, "").name)
    return bool(names) and not any(
        path.is_relative_to(name)
        or (name.is_relative_to(path.parent) and name.relative_to(path.parent).parts[0].startswith(own_names))
        for name in names
    )
