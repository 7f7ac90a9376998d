"""Agreement among the processes of a run, and their end."""

from __future__ import annotations

import atexit
import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from dydit.errors import DyditError

if TYPE_CHECKING:
    from torch import Tensor


def leave_group_at_exit() -> None:
    """Let this process leave its process group before the interpreter ends.

    Without it, threads of the group may meet the end of the process, or of another one, and abort (SIGABRT in place of
    the exit code).
    """
    atexit.unregister(_leave_group)
    atexit.register(_leave_group)


def _leave_group() -> None:
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def agreed(accelerator: Any, action: Callable[[], Any]) -> Any:
    """Run `action` in the main process; its result is returned, and its `DyditError` raised, in all processes."""
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


def over_processes(local: Tensor) -> Tensor:
    """The mean of a statistic over all processes, for a loss that is not a mean over images.

    Its gradient is that of this process' statistic. Training averages the gradients of the processes, which makes the
    result exactly the gradient of the loss of the whole batch: d f(mean) = f'(mean) * mean over processes of d local.
    """
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return local
    mean = local.detach().clone()
    distributed.all_reduce(mean)
    return mean / distributed.get_world_size() + (local - local.detach())


@contextlib.contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """Let SIGTERM, which schedulers and `kill` send, stop the block as Ctrl-C does."""
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
