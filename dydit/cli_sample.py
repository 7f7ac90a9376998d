"""What `dydit sample` alone has: its `--worker`, its progress, its closing words."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import click

from dydit.cli_options import duration, progress_line, say
from dydit.errors import ConfigError
from dydit.runtime.workers import GPUS, Worker, launched_worker, own_gpu, parse_worker

Progress = Callable[[int, int], None]
if TYPE_CHECKING:
    from dydit.runtime.bulk import SampleSummary


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
    help="Make share I, from 0, of N: as many processes, with all else the same, make the images of one. Share cores "
    "out with --threads.  [default: what torchrun or accelerate launch say, else 0/1]",
)


@contextmanager
def sampling_progress(worker: Worker) -> Iterator[tuple[Progress | None, Progress | None]]:
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
    say(f"{done.out}: {done.images} images {took}" + (f"; look at {', '.join(done.files)}" if done.finished else ""))
    if done.note:
        say(done.note)
