"""`dydit bench`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from dydit.commands.backend_choice import require_backend
from dydit.commands.group import Command
from dydit.commands.label_options import labels_option
from dydit.commands.options import (
    AUTO,
    PATH,
    backend_options,
    cfg_scale_option,
    json_option,
    parse_options,
    sampling_options,
    seed_option,
)
from dydit.commands.output import print_json, say_files
from dydit.commands.progress import show_progress
from dydit.commands.text_options import texts_option
from dydit.extras import CHECKPOINTS, GRAPHS, backend_modules, require


@click.command(cls=Command)
@click.argument("bundle", type=PATH)
@click.option(
    "--all",
    "everything",
    is_flag=True,
    help="Time every backend that works here, in every precision, and measure the error of each.",
)
@click.option(
    "--versus", type=PATH, metavar="BUNDLE2", multiple=True, help="Also time this bundle, for comparison. Repeatable."
)
@click.option(
    "--against",
    type=PATH,
    metavar="CHECKPOINT",
    help="Also time this checkpoint in PyTorch, for comparison. It computes every head, channel and token. With --all, "
    "also in the precisions that no bundle has: it is exported in fp32, fp16, bf16 and int8 for the time of the "
    "benchmark.",
)
@click.option("--out", type=PATH, required=True, help="Folder for bench.json and bench.png. Must not exist.")
@labels_option(default="0", help="Class numbers of the batch, one image for each: 207,360 or 0-9. Repeatable.")
@texts_option("Without it, random ones are timed. --labels are their numbers.")
@seed_option
@cfg_scale_option()
@click.option(
    "--steps-measured",
    type=click.IntRange(min=1),
    default=25,
    help="Number of sampling steps that are timed in a round, evenly spaced over the run.",
)
@click.option(
    "--repeats", type=click.IntRange(min=1), default=7, help="Number of timed rounds. The result is their median."
)
@click.option(
    "--warmup",
    type=click.IntRange(min=1),
    default=1,
    help="Number of warm-up rounds. They run before the timed rounds and are not counted.",
)
@click.option(
    "--apart",
    is_flag=True,
    help="Start a new process for each round, so that one configuration is in memory at a time. For large models; it "
    "takes longer.",
)
@sampling_options
@backend_options
@json_option
def command(
    bundle: Path,
    everything: bool,
    versus: tuple[Path, ...],
    against: Path | None,
    out: Path,
    backend: str,
    as_json: bool,
    **settings: Any,
) -> None:
    """Time the steps of a bundle in milliseconds, and those of other bundles or a checkpoint for comparison.

    Each of them runs in its own process. The processes take turns, so that all see the same load of the machine.
    A step is timed as in a run of this batch alone: where subnetworks are not all kept, the next one loads meanwhile.

    With --all, each bundle runs on every backend that works here, and a table shows times and errors. Errors are
    measured against the checkpoint of --against, or without it against a bundle in fp32. All processes stay loaded
    until the end, which takes much memory; with --apart they do not.
    """
    source = click.get_current_context().get_parameter_source("backend")
    if everything and source is not click.core.ParameterSource.DEFAULT:
        raise click.UsageError("--all times every backend; remove --backend")
    if everything:
        require_backend("dydit bench", AUTO)
        require("dydit bench", ["onnx", *((*CHECKPOINTS, *GRAPHS) if against else ())])
    else:
        counts_tokens = ["onnx"] if backend in ("onnxruntime", "openvino") else []  # by a graph with more outputs
        require("dydit bench", [*backend_modules(backend), *counts_tokens, *(CHECKPOINTS if against else ())])
    from dydit.bench.bench import BenchConfig, bench_files
    from dydit.bench.everything import bench_everything
    from dydit.reports.bench_table import table_lines

    config = parse_options(BenchConfig, settings)
    with show_progress("bench") as progress:
        if everything:
            rounds, exports = (partial(progress.stage, title) for title in ("bench", "export"))
            report = bench_everything(bundle, versus, against, config, out, rounds, exports)
        else:
            report = bench_files(bundle, versus, against, backend, config, out, progress)
    if as_json:
        print_json(report.to_json())
    else:
        click.echo("\n".join(table_lines(report) if everything else report.lines))
        say_files(out)
