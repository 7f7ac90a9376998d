"""Work in other threads, waited for in a way that an interrupt (Ctrl-C) cannot break.

`concurrent.futures` waits in Python code between whose lines an interrupt may strike, leaving a lock released twice
(`RuntimeError` in place of `KeyboardInterrupt`). Here waiting is one call of a lock, which Python does not interrupt
half-way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

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
            self._task = None  # or what the task holds would live as long as its result
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
        """Wait for the task; its value, or raise its error."""
        with self._running:
            pass
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]


class Pool:
    """At most `threads` threads, started when they are first needed, and again in a forked child."""

    def __init__(self, threads: int, name: str):
        self._threads, self._name = threads, name
        self._executor: ThreadPoolExecutor | None = None
        register(self)

    def submit(self, task: Callable[[], T]) -> Pending[T]:
        """Run a task as soon as a thread is free."""
        if self._executor is None:
            self._executor = ThreadPoolExecutor(self._threads, thread_name_prefix=self._name)
        pending = Pending(task)
        self._executor.submit(pending.run)
        return pending

    def all(self, tasks: Iterable[Callable[[], T]]) -> list[T]:
        """Run tasks side by side; their values in order."""
        return [pending.result() for pending in [self.submit(task) for task in tasks]]

    def close(self) -> None:
        """Wait for all tasks and end the threads."""
        if self._executor is not None:
            self._executor.shutdown(wait=True)
            self._executor = None

    def after_fork(self) -> None:
        """Forget threads that a forked child does not have."""
        self._executor = None
