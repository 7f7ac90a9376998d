"""A run and the processes around it: those that train with it, and those that ask it to stop."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from dydit.errors import DyditError


def agreed(accelerator: Any, action: Callable[[], Any]) -> Any:
    """What `action` gives in the main process, in all of them; what is refused there is refused in all."""
    if accelerator.num_processes == 1:
        return action()
    from accelerate.utils import broadcast_object_list

    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = action()
        except DyditError as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


@contextlib.contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM, as schedulers and `kill` send it, stops the block as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
