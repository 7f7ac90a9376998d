"""Replaces threads and locks in forked children.

A child of `fork` has none of its parent's other threads. Thread pools there would wait forever, and so would locks that
another thread of the parent held. Objects with threads or locks register here. In a child, each replaces them before
anything else runs.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Forgets(Protocol):
    """An object with threads, locks or sessions that do not survive `fork`."""

    def after_fork(self) -> None:
        """Replace them. Runs in the child right after `fork`, and must not wait for anything."""


_registered: weakref.WeakSet[Forgets] = weakref.WeakSet()


def register(owner: Forgets) -> None:
    """Call `owner.after_fork` in forked children, as long as `owner` lives."""
    _registered.add(owner)


def _tell_all() -> None:
    for owner in list(_registered):
        owner.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_tell_all)
