"""Locks between processes, on files. A lock ends with the process that holds it, however that ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from dydit.errors import OutputError

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL, errno.EBADF}
"""What file systems without locks answer. EBADF: NFS, which locks only what is open for writing, so no folders."""


class FileLock:
    """A lock that one process holds at a time. `path`: a folder, or a file, which is made where it is missing.

    `temporary`: remove the file when the lock is released. A killed process leaves it; the next one removes it.
    """

    def __init__(self, path: Path, temporary: bool = False):
        self._path, self._temporary = path, temporary

    @contextlib.contextmanager
    def require(self, busy: str) -> Iterator[bool]:
        """Hold the lock for the time of the block; yields whether it is held.

        Raises `OutputError` with the message `busy` where another process holds it. Where the file system has no locks,
        as some network mounts, nobody holds it and everybody is let in.
        """
        with self._locked(fcntl.LOCK_NB) as refusal:
            if isinstance(refusal, BlockingIOError):
                raise OutputError(busy) from refusal
            yield refusal is None

    @contextlib.contextmanager
    def attempt(self, wait: bool = False) -> Iterator[bool]:
        """Hold the lock for the time of the block; yields False where another process holds it.

        `wait`: until it is free. Raises `OutputError` where the file system has no locks.
        """
        with self._locked(0 if wait else fcntl.LOCK_NB) as refusal:
            if refusal is not None and not isinstance(refusal, BlockingIOError):
                raise OutputError(
                    f"the file system of {self._path} does not support file locks ({refusal.strerror}), which several "
                    "processes need to share the folder; choose a folder on another file system"
                ) from refusal
            yield refusal is None

    @contextlib.contextmanager
    def _locked(self, flags: int) -> Iterator[OSError | None]:
        """Lock the file for the time of the block; yields why that is refused, or None."""
        with contextlib.ExitStack() as stack:
            while True:
                refusal, descriptor = None, self._open()
                stack.callback(os.close, descriptor)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | flags)
                except OSError as error:
                    if not isinstance(error, BlockingIOError) and error.errno not in _NO_LOCKS:
                        raise
                    refusal = error
                if refusal is not None or not self._temporary or self._is_still(descriptor):
                    break
            if self._temporary and not isinstance(refusal, BlockingIOError):
                stack.callback(self._path.unlink, missing_ok=True)
            yield refusal

    def _open(self) -> int:
        if self._path.is_dir():
            return os.open(self._path, os.O_RDONLY)
        return os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o666)

    def _is_still(self, descriptor: int) -> bool:
        """Whether the path is still the open file; its last holder may have removed it before it was locked here."""
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self._path))
        except FileNotFoundError:
            return False
