"""One process at a time: locks that go with the process that holds them, however it ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from dydit.errors import OutputError

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL}


@contextlib.contextmanager
def only_process(lock: Path, busy: str) -> Iterator[bool]:
    """Hold the file `lock` for the time of the block; it is made, and removed afterwards.

    Raises `OutputError` with the words `busy` where another process holds it. Yields whether it is held: where the file
    system has no locks, as some network mounts, everybody is let in.
    """
    with contextlib.ExitStack() as held:
        while True:
            file = held.enter_context(open(lock, "ab"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise OutputError(busy) from error
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                is_held = False
                break
            if _is_still(lock, file.fileno()):
                is_held = True
                break
            file.close()  # its holder removed it between our opening and locking it
        held.callback(lock.unlink, missing_ok=True)
        yield is_held


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
