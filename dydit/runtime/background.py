"""Work in other threads that an interrupt (Ctrl-C) cannot leave in a broken state.

`concurrent.futures`, `threading.Thread` and `queue.Queue` lock in Python code. An interrupt between two of its lines
releases a lock twice (`RuntimeError` in place of `KeyboardInterrupt`) or never (the next call waits forever). Here the
thread that may be interrupted calls only functions written in C, such as a lock's `acquire` or a queue's `put`, which
either have run or have not.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import weakref
from _thread import start_new_thread
from collections.abc import Callable, Iterable
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from dydit.runtime.forks import register

T = TypeVar("T")


class Pending(Generic[T]):
    """The result of a task that runs in another thread."""

    def __init__(self, task: Callable[[], T]):
        self._task: Callable[[], T] | None = task
        self._value: T | None = None
        self._error: BaseException | None = None
        self._running = threading.Lock()
        self._running.acquire()

    def run(self) -> None:
        """Run the task; called once, by the thread that does the work."""
        try:
            assert self._task is not None
            self._value = self._task()
        except BaseException as error:
            self._error = error
        finally:
            self._task = None  # else what the task refers to would live as long as its result
            self._running.release()

    @property
    def done(self) -> bool:
        """Whether `result` returns at once."""
        return not self._running.locked()

    @property
    def failed(self) -> bool:
        """Whether the task has ended with an error."""
        return self.done and self._error is not None

    def result(self) -> T:
        """Wait for the task; return its value or raise its error."""
        with self._running:
            pass
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]


class Pool:
    """At most `threads` threads, started when they are first needed; a forked child starts its own."""

    def __init__(self, threads: int):
        self._threads = threads
        self._workers: _Workers | None = None
        register(self)

    def submit(self, task: Callable[[], T]) -> Pending[T]:
        """Run a task as soon as a thread is free."""
        if self._workers is None:
            self._workers = _Workers(self._threads)
        pending = Pending(task)
        self._workers.submit(pending)
        return pending

    def all(self, tasks: Iterable[Callable[[], T]]) -> list[T]:
        """Run tasks in parallel; returns their values in order."""
        return [pending.result() for pending in [self.submit(task) for task in tasks]]

    def close(self) -> None:
        """Wait for all tasks and end the threads."""
        workers, self._workers = self._workers, None
        if workers is not None:
            workers.close()

    def after_fork(self) -> None:
        """Forget threads that a forked child does not have."""
        self._workers = None


class _Workers:
    """The threads of a pool. They refer to its queue, not to this object, so they end when the object is deleted."""

    def __init__(self, limit: int):
        self._tasks: SimpleQueue[Pending[Any] | None] = SimpleQueue()
        self._limit, self._process = limit, os.getpid()
        self._running: list[threading.Lock] = []
        self._entrance = threading.Lock()
        _ALIVE.add(self)
        weakref.finalize(self, self._tasks.put, None).atexit = False

    def submit(self, pending: Pending[Any]) -> None:
        if len(self._running) < self._limit:
            # Threads count themselves: an interrupt between a start and its count would lose one.
            start_new_thread(_work, (self._tasks, self._running, self._limit, self._entrance))
        self._tasks.put(pending)

    def close(self) -> None:
        """Wait for all tasks, and for the threads."""
        self._tasks.put(None)
        if self._process == os.getpid():
            for lock in list(self._running):
                with lock:
                    pass


_ALIVE: weakref.WeakSet[_Workers] = weakref.WeakSet()


def _work(
    tasks: SimpleQueue[Pending[Any] | None], running: list[threading.Lock], limit: int, entrance: threading.Lock
) -> None:
    """Run tasks until None comes. `running` has a lock for each thread, held until it ends."""
    ended = threading.Lock()
    with entrance:
        if len(running) >= limit:
            return
        ended.acquire()
        running.append(ended)
    while (pending := tasks.get()) is not None:
        pending.run()
        del pending  # else its value would live until the next task comes
    tasks.put(None)  # for the next thread
    running.remove(ended)
    ended.release()


@atexit.register
def _end_all() -> None:
    """Wait for running tasks: native code must not outlive the interpreter."""
    for workers in list(_ALIVE):
        with contextlib.suppress(KeyboardInterrupt):
            workers.close()
