"""What `dydit sample` alone has: its `--worker`, its progress, its closing words."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import click

from dydit.commands.options import progress_line, say
from dydit.errors import ConfigError
from dydit.runtime.bulk.workers import GPUS, Worker, launched_worker, own_gpu, parse_worker
from dydit.words import counted, duration

Counter = Callable[[int, int], None]
if TYPE_CHECKING:
    from dydit.runtime.bulk.run import SampleSummary


def _choose_worker(_: click.Context, __: click.Parameter, value: str | None) -> Worker:
    if value is not None:
        try:
            return parse_worker(value)
        except ConfigError as error:
            raise click.BadParameter(str(error)) from error
    worker = launched_worker(os.environ)
    if worker.local is not None:
        os.environ[GPUS] = own_gpu(worker.local, os.environ)
    return worker


worker_option = click.option(
    "--worker",
    metavar="I/N",
    callback=_choose_worker,
    help="Sample part I of N, from 0: N processes with the same --out and options together make one run. Divide the "
    "cores between them with --threads, the same for all.  [default: what torchrun or accelerate launch set, else 0/1]",
)


@contextmanager
def sampling_progress(worker: Worker) -> Iterator[tuple[Counter | None, Counter | None]]:
    """Progress of steps and of pictures; of the workers that a launcher started on a machine, the first one's alone."""
    if worker.local:
        yield None, None
        return
    who = "" if worker.count == 1 else f" (worker {worker})"
    with progress_line(f"sample{who}") as line:
        if line is None:
            yield None, None
        else:
            yield partial(line.stage, f"sample{who}"), partial(line.stage, f"pictures{who}")


def say_sampled(done: SampleSummary) -> None:
    """Closing words after sampling."""
    took = "were there already" if done.finished_before else f"in {duration(done.seconds + done.picture_seconds)}"
    look = f"; look at {', '.join(done.files)}" if done.finished else ""
    say(f"{done.out}: {counted(done.images, 'image')} {took}{look}")
    if done.repeated_steps:
        say(
            f"{counted(done.repeated_steps, 'step')} of a batch ran again at full capacity, because more tokens were "
            "routed than the bundle has slots for. The images are complete"
        )
    if done.note:
        say(done.note)
