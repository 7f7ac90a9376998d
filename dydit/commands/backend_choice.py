"""How `dydit sample` chooses a backend where its user names none, and what it says about that."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import click

from dydit.commands.group import Settings
from dydit.commands.options import AUTO
from dydit.commands.output import warn
from dydit.commands.progress import Progress
from dydit.extras import backend_modules, missing, require
from dydit.runtime.backends.registry import BACKENDS
from dydit.runtime.bulk.workers import Worker

if TYPE_CHECKING:
    from dydit.bundle.bundle import Bundle
    from dydit.runtime.backends.base import BackendOptions
    from dydit.runtime.bulk.finished import Run
    from dydit.runtime.bulk.run import ChooseBackend


def require_backend(command: str, backend: str) -> None:
    """Raise `BackendError` if the packages of a backend are missing; with `AUTO`, if those of all backends are."""
    if backend != AUTO:
        require(command, backend_modules(backend))
    elif all(missing(backend_modules(name)) for name in BACKENDS):
        require(command, backend_modules(BACKENDS[0]))


def chooser(bundle: Bundle, options: BackendOptions, worker: Worker, progress: Progress) -> ChooseBackend:
    """The function that chooses the backend of a run on a bundle. It says so in one line, and warns of backends that
    compute something else.
    """

    def choose(run: Run) -> str:
        from dydit.bench.choice import Workload, fastest_backend

        work = Workload(
            labels=max((batch.labels for batch in run.batches), key=len).tolist(),
            batches=math.ceil(len(run.batches) / worker.count),
            cfg_scale=run.settings["cfg_scale"],
            seed=run.settings["seed"] or 0,
            options=options,
        )
        choice = fastest_backend(
            bundle, work, progress=lambda done, total: progress.stage("choosing a backend", done, total)
        )
        for line in choice.deviating.values():
            warn(line)
        settings = click.get_current_context().ensure_object(Settings)
        lines = [f"{name} was not timed: {reason}" for name, reason in choice.failed.items()] if settings.debug else []
        if choice.line and not settings.quiet:  # also of a worker that shows no progress: only one of them chooses
            lines.append(choice.line)
        progress.close()
        for line in lines:
            click.echo(line, err=True)
        return choice.backend

    return choose
