"""What a forked child does with objects that hold threads or locks: it makes them anew.

A child of `fork` has none of its parent's other threads. A pool of threads there waits for ever, and so does whoever
asks for a lock that another thread of the parent held. Objects that own such things are registered here; in a child
each is told to forget them before anything else runs.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Forgets(Protocol):
    """An object with threads, locks or sessions that do not survive `fork`."""

    def after_fork(self) -> None:
        """Replace them. Runs in the child, right after `fork`; must not wait for anything."""


_registered: weakref.WeakSet[Forgets] = weakref.WeakSet()


def register(owner: Forgets) -> None:
    """Have `owner.after_fork` called in forked children, as long as `owner` lives."""
    _registered.add(owner)


def _tell_all() -> None:
    for owner in list(_registered):
        owner.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_tell_all)
