"""The command line: each command parses, calls one public function, prints. What it needs is imported when it runs.
What all commands share is in `cli_options`; how errors become one line and an exit code, in `cli_errors`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from dydit import __version__
from dydit.commands.build import add_build
from dydit.commands.calibrate import add_calibrate
from dydit.commands.decode import add_decode
from dydit.commands.exit_codes import CHECK_FAILED, OK, run_command
from dydit.commands.export import add_export
from dydit.commands.options import (
    PATH,
    CommandGroup,
    backend_options,
    cfg_scale_option,
    checkpoint_options,
    draw,
    json_option,
    labels_option,
    note,
    parse_options,
    print_json,
    progress_line,
    recipe_settings,
    say,
    say_files,
    seed_option,
)
from dydit.commands.sample import sampling_progress, say_sampled, worker_option
from dydit.commands.suggestions import backend_words, next_line
from dydit.commands.vae_options import space_option
from dydit.extras import CHECKPOINTS, GRAPHS, REPORTS, as_installed, backend_modules, require
from dydit.runtime.bulk.workers import Worker
from dydit.training.recipe import RECIPES
from dydit.words import counted, duration

LARGE = 1 << 30
"""Bytes of a checkpoint whose conversion takes long enough to say that it has begun."""


@click.group(
    cls=CommandGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110, "show_default": True},
)
@click.version_option(__version__, message="dydit %(version)s")
def cli() -> None:
    """Train dynamic Diffusion Transformers (DyDiT), compile them into ONNX graphs, and sample with them.

    The usual order is: train or convert, export, sample. parity compares the result with PyTorch, bench times it, and
    inspect explains it. Run calibrate before an export with int8-static, fp8 or --routing capacity, and build after an
    export for TensorRT.
    """


@cli.add("quickstart", "Export, sample, check and time the small models that come with dydit.")
@click.option("--out", type=PATH, default=Path("quickstart"), help="Folder for everything that this writes.")
@click.option(
    "--overwrite", is_flag=True, help="Start again where --out holds a quickstart, finished or not; other files stay."
)
@click.option("--steps", type=click.IntRange(1, 1000), default=250, help="Number of sampling steps.")
@click.option("--per-class", type=click.IntRange(min=1), default=4, metavar="N", help="Images per class.")
@cfg_scale_option(2.0)
@seed_option
@click.option("--threads", type=click.IntRange(min=0), default=0, help="Number of CPU threads; 0: one for each core.")
@json_option
def quickstart_command(out: Path, overwrite: bool, as_json: bool, **settings: Any) -> int:
    """Export, sample, check and time the small models that come with dydit: a minute on the CPU, no downloads.

    Exports a dynamic and a static model of handwritten digits, samples the dynamic one, compares its images with
    PyTorch's, times both models, and writes report.html. Repeat the command to resume a run that was interrupted.
    """
    require("dydit quickstart", [*CHECKPOINTS, *GRAPHS, "onnxruntime", *REPORTS])
    from dydit.quickstart.quickstart import QuickstartConfig, run_quickstart

    config = parse_options(QuickstartConfig, settings)
    with progress_line("quickstart") as progress:
        result = run_quickstart(out, config, overwrite, progress.stage if progress else None)
    if as_json:
        print_json(result.to_json())
    else:
        click.echo(result.text())
        say(
            f"Look at {result.report} and {out / 'samples.png'}",
            next_line("inspect", out / "bundle"),
            next_line("sample", out / "bundle", "--labels", "0-9", "--out", "SAMPLES"),
        )
    return OK if result.ok else CHECK_FAILED


@cli.add(
    "train",
    "Train a model with a recipe.",
    epilog=f"\b\nSettings and their defaults (some recipes set others):\n{recipe_settings()}",
)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--recipe",
    type=click.Choice(tuple(RECIPES)),
    required=True,
    help="What to train. `digits` is three runs: a static model, a dynamic one that starts from its weights, and a "
    "last run in which the gates decide as they do at inference.",
)
@click.option(
    "--out", type=PATH, required=True, help="Folder for the run; must be empty or absent, unless --resume is given."
)
@click.option(
    "--resume",
    is_flag=True,
    help="Continue the run in --out from its last saved state. A larger iterations=N makes it longer.",
)
def train_command(overrides: tuple[str, ...], recipe: str, out: Path, resume: bool) -> None:
    """Train a model with a recipe, on the processors of this machine.

    KEY=VALUE changes a setting: iterations=100, model.depth=4. In a recipe of several runs, static.KEY, dynamic.KEY
    or settle.KEY changes one of them. Writes model.safetensors, train.json, log.jsonl and curves.png.
    """
    require("dydit train", [*CHECKPOINTS, "accelerate", "sklearn", "matplotlib"])
    from dydit.training.recipe import find_recipes
    from dydit.training.sequence import train_sequence

    recipes = find_recipes(recipe, overrides)
    with progress_line("train") as progress:
        results = train_sequence(recipes, out, resume, progress)
    for result in results:
        summary = result.summary
        note = f"; {result.note}" if result.note else ""
        took = duration(summary["seconds"])
        say(f"{result.model}: {counted(summary['iterations'], 'iteration')} in {took}{note}")
    say(next_line("export", results[-1].model, "--out", "BUNDLE"))


@cli.add("convert", "Convert a checkpoint to dydit's own format.")
@click.argument("checkpoint", type=PATH)
@click.option("--out", type=PATH, required=True, help="The .safetensors file to write; must not exist.")
@space_option
@checkpoint_options
def convert_command(checkpoint: Path, out: Path, space: str | None, reading: dict[str, Any]) -> None:
    """Convert a checkpoint to dydit's own format: a safetensors file that contains the model's configuration.

    CHECKPOINT is a DiT or DyDiT state dict, a training file that contains one, a diffusers DiT folder, or a file of
    dydit's. No code in it is run. A file that does not say how its model was trained is taken for a DiT, which predicts
    epsilon: the weights of a SiT have the same names and shapes.
    """
    require("dydit convert", CHECKPOINTS)
    from dydit.checkpoints.checkpoint import convert
    from dydit.models.config import Space
    from dydit.models.registry import architecture_of

    with progress_line("convert") as progress:
        if progress and checkpoint.is_file() and checkpoint.stat().st_size >= LARGE:
            progress(0, 1)
        converted = convert(checkpoint, out, space=Space(space) if space else None, **reading)
    config = converted.config
    kind = "dynamic" if config.dynamic else "static"
    weights = f" ({converted.metadata['weights']} weights)" if "weights" in converted.metadata else ""
    say(
        f"{out}: {kind} {architecture_of(config).title} ({config.summary}), "
        f"read as {converted.metadata['source']}{weights}",
        *converted.notes,
        next_line("inspect", out),
        next_line("export", out, "--out", "BUNDLE"),
    )


add_calibrate(cli)
add_export(cli)


@cli.add("sample", "Sample images with a bundle.")
@click.argument("bundle", type=PATH)
@labels_option(
    help="Class numbers, one image for each: 207,360 or 0-9. Repeatable. Needed unless --noise-from contains labels."
)
@click.option(
    "--out", type=PATH, required=True, help="Folder for the images. Repeat the command to resume an interrupted run."
)
@click.option(
    "--num",
    type=click.IntRange(min=1),
    help="Total number of images; the labels are repeated in turn.  [default: one image per label]",
)
@click.option(
    "--seed",
    type=int,
    default=0,
    help="Seed for the initial and per-step noise. The noise of an image depends on the seed and its index alone.",
)
@click.option("--first-image", type=int, default=0, help="Index of the first image.")
@cfg_scale_option(4.0)
@click.option("--batch-size", type=int, help="Images per batch.  [default: as many as the bundle allows]")
@backend_options
@click.option("--npz", is_flag=True, help="Also write samples.npz (array arr_0, uint8), as evaluators of FID read it.")
@click.option("--noise-from", type=PATH, metavar="FILE.npz", help="Use the arrays x_T, noise and labels of this file.")
@click.option("--latents-out", type=PATH, metavar="FILE.npz", help="Also write the latents to this file.")
@worker_option
@json_option
def sample_command(
    bundle: Path,
    out: Path,
    backend: str,
    device: str,
    threads: int,
    npz: bool,
    latents_out: Path | None,
    worker: Worker,
    as_json: bool,
    **request: Any,
) -> None:
    """Sample images with a bundle. The same settings give the same images, whatever the batch size.

    Writes numbered PNG files, grid.png and samples.json, or latents.npz where the bundle is of a latent model and has
    no VAE decoder. Several processes share a run when they are started by torchrun or accelerate launch
    (`torchrun --nproc-per-node 2 -m -- dydit sample ...`), or with --worker.
    """
    from dydit.bundle.bundle import Bundle
    from dydit.runtime.backends.base import BackendOptions
    from dydit.runtime.bulk.run import OutputOptions, sample_to_folder
    from dydit.runtime.request import SampleRequest

    require("dydit sample", backend_modules(backend))
    wanted = parse_options(SampleRequest, request)
    outputs = OutputOptions(npz=npz, latents_out=latents_out)
    opened = Bundle.open(bundle)
    options = BackendOptions(threads=threads, device=device)
    say_when = None if worker.local else note  # of the workers of a machine, the first one's words are enough
    with sampling_progress(worker) as (progress, pictures):
        done = sample_to_folder(opened, wanted, out, outputs, backend, options, progress, pictures, worker, say_when)
    if as_json:
        print_json({**vars(done), "out": str(done.out)})
    else:
        say_sampled(done)


add_decode(cli)


@cli.add("parity", "Compare a bundle with its checkpoint.")
@click.argument("bundle", type=PATH)
@click.option(
    "--against",
    type=PATH,
    required=True,
    metavar="CHECKPOINT",
    help="The checkpoint that the bundle was exported from.",
)
@click.option("--out", type=PATH, required=True, help="Folder for parity.json and parity.png; must not exist.")
@labels_option(default="0,1", help="Class numbers, one image for each: 207,360 or 0-9. Repeatable.")
@seed_option
@cfg_scale_option(4.0)
@click.option(
    "--every", type=click.IntRange(min=1), default=1, metavar="N", help="Compare every n-th step, and the last."
)
@checkpoint_options
@backend_options
@json_option
def parity_command(
    bundle: Path, against: Path, out: Path, reading: dict[str, Any], as_json: bool, **settings: Any
) -> int:
    """Compare a bundle with its checkpoint: masks, weights, the sliced model, single steps, and the whole run.

    Exits with 1 if a check exceeds its tolerance, and names the first step and block that do.
    """
    require("dydit parity", [*CHECKPOINTS, *GRAPHS, *backend_modules(settings["backend"])])
    from dydit.bundle.bundle import Bundle
    from dydit.checkpoints.checkpoint import load_checkpoint
    from dydit.files import new_folder, require_absent
    from dydit.parity.parity import ParityConfig, run_parity
    from dydit.reports.plots import parity_png
    from dydit.reports.text import aligned

    config = parse_options(ParityConfig, settings)
    require_absent(out)
    opened, checkpoint = Bundle.open(bundle), load_checkpoint(against, **reading)
    with new_folder(out) as folder, progress_line("parity") as progress:
        report = run_parity(opened, checkpoint, config, folder, progress)
        draw(parity_png, report, folder / "parity.png")
    if as_json:
        print_json(report.to_json())
    else:
        click.echo(aligned([[check.status.value, check.name, check.detail] for check in report.checks]))
        click.echo("\n".join([*checkpoint.notes, *report.stale_reasons, report.summary]))
        say_files(out)
        picture = out / "parity.png"
        if report.ok:
            say(next_line("bench", bundle, *backend_words(settings), "--out", "BENCH"))
        elif picture.exists():
            say(f"Look at {picture}")
    return OK if report.ok else CHECK_FAILED


@cli.add("bench", "Time a bundle, beside another one or PyTorch.")
@click.argument("bundle", type=PATH)
@click.option("--versus", type=PATH, metavar="BUNDLE2", help="Another bundle to time.")
@click.option("--against", type=PATH, metavar="CHECKPOINT", help="A checkpoint to time, as a dense model in PyTorch.")
@click.option("--out", type=PATH, required=True, help="Folder for bench.json and bench.png; must not exist.")
@labels_option(default="0", help="Class numbers of the batch: 207,360 or 0-9. Repeatable.")
@seed_option
@cfg_scale_option(4.0)
@click.option(
    "--steps-measured",
    type=click.IntRange(min=1),
    default=25,
    help="Steps that are timed in a round, evenly spaced over the run.",
)
@click.option("--repeats", type=click.IntRange(min=1), default=7, help="Rounds that count; the result is their median.")
@click.option("--warmup", type=click.IntRange(min=1), default=1, help="Rounds that are run first and do not count.")
@backend_options
@json_option
def bench_command(
    bundle: Path, versus: Path | None, against: Path | None, out: Path, backend: str, as_json: bool, **settings: Any
) -> None:
    """Time the steps of a bundle in milliseconds, and of another bundle or a checkpoint for comparison.

    Each runs in a process of its own; the processes take turns, so that they see the same load of the machine.
    """
    counts = ["onnx"] if backend == "onnxruntime" else []  # tokens are counted by a graph with further outputs
    require("dydit bench", [*backend_modules(backend), *counts, *(CHECKPOINTS if against else ())])
    from dydit.bench.bench import BenchConfig, run_bench, sides_of
    from dydit.bundle.bundle import Bundle
    from dydit.files import new_folder, require_absent
    from dydit.reports.plots import latency_png

    config = parse_options(BenchConfig, settings)
    require_absent(out)
    opened = [Bundle.open(path, verify=False) for path in (bundle, versus) if path]
    sides = sides_of(opened[0], opened[1] if versus else None, against, backend)
    with new_folder(out) as folder, progress_line("bench") as progress:
        report = run_bench(sides, config, folder, progress)
        draw(latency_png, report, folder / "bench.png")
    if as_json:
        print_json(report.to_json())
    else:
        click.echo("\n".join(report.lines))
        say_files(out)


@cli.add("inspect", "Show what a checkpoint or a bundle contains.")
@click.argument("path", metavar="CHECKPOINT|BUNDLE", type=PATH)
@click.option("--out", type=PATH, help="Also draw masks and plan as PNG files, into this folder; must not exist.")
@checkpoint_options
@json_option
def inspect_command(path: Path, out: Path | None, reading: dict[str, Any], as_json: bool) -> None:
    """Show what a checkpoint or a bundle contains: sizes, cost, masks over time, and the possible plans."""
    is_bundle = (path / "manifest.json").exists()
    require("dydit inspect", [*(() if is_bundle else CHECKPOINTS), *(["matplotlib"] if out else [])])
    from dydit.files import new_folder, require_absent
    from dydit.inspection.inspect import inspect

    if out is not None:
        require_absent(out)
    inspection = inspect(path, **reading)
    if out is not None:
        with new_folder(out) as folder:
            inspection.write_pictures(folder)
    if as_json:
        print_json(inspection.to_json())
        return
    click.echo(inspection.text())
    if out is not None:
        say_files(out)


@cli.add("doctor", "Test which backends work on this machine.")
@json_option
def doctor_command(as_json: bool) -> int:
    """Test which backends work on this machine, and say why the others do not. Exits with 1 if none works."""
    from dydit.doctor.doctor import run_doctor

    report = run_doctor()
    if as_json:
        print_json(report.to_json())
    else:
        click.echo(as_installed(report.text()))
    return OK if report.ok else CHECK_FAILED


add_build(cli)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code; errors become one line on standard error."""
    return run_command(cli, sys.argv[1:] if arguments is None else arguments)
