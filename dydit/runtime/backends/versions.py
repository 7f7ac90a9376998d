"""Whether an installed package is new enough."""

from __future__ import annotations

import re
from typing import Any

from dydit.errors import BackendError


def require_release(module: Any, package: str, oldest: tuple[int, int], why: str) -> None:
    """Raise `BackendError`, with the version that is needed and the installed one, if a module is older than `oldest`.

    `package`: its name for pip. `why`: what needs the release, for the message.
    """
    version = str(getattr(module, "__version__", "(of an unknown version)"))
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < oldest:
        needed = ".".join(map(str, oldest))
        raise BackendError(
            f"{module.__name__} {version} is too old: {why} need {needed} or newer; "
            f"pip install -U '{package}>={needed}'"
        )
