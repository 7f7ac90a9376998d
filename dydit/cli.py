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
from dydit.cli_build import add_build
from dydit.cli_calibrate import add_calibrate
from dydit.cli_errors import CHECK_FAILED, OK, run_command
from dydit.cli_export import add_export
from dydit.cli_options import (
    PATH,
    CommandGroup,
    backend_options,
    draw,
    duration,
    heads_option,
    json_option,
    labels_option,
    print_json,
    progress_line,
    recipe_settings,
    say,
    say_files,
)
from dydit.cli_sample import sampling_progress, say_sampled, worker_option
from dydit.runtime.workers import Worker
from dydit.training.recipe import RECIPES


@click.group(
    cls=CommandGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110, "show_default": True},
)
@click.version_option(__version__, message="dydit %(version)s")
def cli() -> None:
    """Fine-tune Diffusion Transformers into dynamic ones, and compile them so that the compute saved on paper is saved
    on the clock.

    The usual order: train or convert, export, sample; parity, bench and inspect prove and explain the result.
    """


@cli.add("quickstart", "Small models to pictures and a report, on the CPU.")
@click.option("--out", type=PATH, default=Path("quickstart"), help="Folder for everything that is made.")
@click.option(
    "--overwrite", is_flag=True, help="Make the quickstart in --out anew, finished or not; nothing else is replaced."
)
@click.option("--steps", type=click.IntRange(1, 1000), default=250, help="Sampling steps of a run.")
@click.option("--per-class", type=click.IntRange(min=1), default=4, metavar="N", help="Images of each class.")
@click.option("--cfg-scale", type=float, default=2.0, help="Guidance from 0; 1 is none, at half the compute.")
@click.option("--seed", type=int, default=0, help="Of the images' noise.")
@click.option("--threads", type=click.IntRange(min=0), default=0, help="CPU threads; 0: all.")
@json_option
def quickstart_command(out: Path, overwrite: bool, as_json: bool, **settings: Any) -> int:
    """From the small models that come with dydit to pictures and a report, on the CPU, in about a minute.

    Exports a dynamic and a static model of handwritten digits, samples, compares with PyTorch, and takes times. A run
    that was killed goes on where it was.
    """
    from dydit.models.config import parse_config
    from dydit.verify.quickstart import QuickstartConfig, run_quickstart

    config = parse_config(QuickstartConfig, settings)
    with progress_line("quickstart") as progress:
        result = run_quickstart(out, config, overwrite, progress.stage if progress else None)
    if as_json:
        print_json(result.to_json())
    else:
        click.echo(result.text())
        say(f"Look at {result.report} and {out / 'samples.png'}; next: dydit inspect {out / 'bundle'}, dydit --help")
    return OK if result.ok else CHECK_FAILED


@cli.add(
    "train",
    "Train a model by a recipe.",
    epilog=f"\b\nSettings and their defaults (recipes have their own for some):\n{recipe_settings()}",
)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--recipe",
    type=click.Choice(tuple(RECIPES)),
    required=True,
    help="What to train. `digits` is three runs: static, then dynamic from its weights, then settle.",
)
@click.option("--out", type=PATH, required=True, help="Folder for the run; must be empty, unless --resume is given.")
@click.option(
    "--resume",
    is_flag=True,
    help="Go on with the run in --out from its last saved state; a larger iterations=N makes it longer.",
)
def train_command(overrides: tuple[str, ...], recipe: str, out: Path, resume: bool) -> None:
    """Train a model by a recipe, on the processors that are here.

    KEY=VALUE changes a setting: iterations=100, model.depth=4; in a recipe of several runs static.KEY, dynamic.KEY
    or settle.KEY changes one of them. Leaves model.safetensors, train.json, log.jsonl and curves.png.
    """
    from dydit.training.recipe import find_recipes
    from dydit.training.sequence import train_sequence

    recipes = find_recipes(recipe, overrides)
    with progress_line("train") as progress:
        results = train_sequence(recipes, out, resume, progress)
    for result in results:
        summary = result.summary
        note = f"; {result.note}" if result.note else ""
        say(f"{result.model}: {summary['iterations']} iterations in {duration(summary['seconds'])}{note}")
    say(f"Next: dydit export {results[-1].model} --out BUNDLE")


@cli.add("convert", "Bring a checkpoint into dydit's own format.")
@click.argument("checkpoint", type=PATH)
@click.option("--out", type=PATH, required=True, help="The .safetensors file to write; must not exist.")
@heads_option
def convert_command(checkpoint: Path, out: Path, num_heads: int | None) -> None:
    """Read a checkpoint of any known format and write it in ours: safetensors with its configuration.

    CHECKPOINT is an official DiT file, a DyDiT training file (its EMA weights are used), a diffusers DiT folder, or
    one of ours. Nothing in it is executed.
    """
    from dydit.models.checkpoint import convert

    converted = convert(checkpoint, out, num_heads)
    config = converted.config
    kind = "dynamic" if config.dynamic else "static"
    say(
        f"{out}: {kind} DiT, {config.depth} blocks of {config.hidden_size} with {config.num_heads} heads, from the "
        f"{converted.metadata['source']} format",
        f"Next: dydit inspect {out}, dydit export {out} --out BUNDLE",
    )


add_calibrate(cli)
add_export(cli)


@cli.add("sample", "Make images with a bundle.")
@click.argument("bundle", type=PATH)
@labels_option(
    help="Classes, an image for each: 207,360 or 0-9; may be given again. Needed unless --noise-from has them."
)
@click.option(
    "--out", type=PATH, required=True, help="Folder for the images; the same command goes on with a killed run."
)
@click.option(
    "--num", type=click.IntRange(min=1), help="Images in all, the labels repeated in turn.  [default: one a label]"
)
@click.option("--seed", type=int, default=0, help="Image i draws its noise from (seed, i) alone.")
@click.option("--first-image", type=int, default=0, help="The i of the first image.")
@click.option("--cfg-scale", type=float, default=4.0, help="Guidance from 0; 1 is none, at half the compute.")
@click.option("--batch-size", type=int, help="Images at a time.  [default: as many as the bundle allows]")
@backend_options
@click.option("--npz", is_flag=True, help="Also write samples.npz (arr_0, uint8), which FID evaluators read.")
@click.option("--noise-from", type=PATH, metavar="FILE.npz", help="Take noise from here: x_T, noise, labels.")
@click.option("--latents-out", type=PATH, metavar="FILE.npz", help="Also write the latents, to this file.")
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
    """Make images with a bundle; the same settings give the same images, in whatever batches.

    Writes numbered PNGs, grid.png and samples.json; of latents, where the bundle has no VAE decoder, latents.npz. Under
    `torchrun -m -- dydit sample` and `accelerate launch`, or with --worker, processes that share --out make one run.
    """
    from dydit.bundle.bundle import Bundle
    from dydit.models.config import parse_config
    from dydit.runtime.backends.base import BackendOptions
    from dydit.runtime.backends.registry import require_known
    from dydit.runtime.bulk import OutputOptions, sample_to_folder
    from dydit.runtime.request import SampleRequest

    require_known(backend)
    wanted = parse_config(SampleRequest, request)
    outputs = OutputOptions(npz=npz, latents_out=latents_out)
    opened = Bundle.open(bundle)
    options = BackendOptions(threads=threads, device=device)
    with sampling_progress(worker) as (progress, pictures):
        done = sample_to_folder(opened, wanted, out, outputs, backend, options, progress, pictures, worker)
    if as_json:
        print_json({**vars(done), "out": str(done.out)})
    else:
        say_sampled(done)


@cli.add("parity", "Hold a bundle against its checkpoint.")
@click.argument("bundle", type=PATH)
@click.option("--against", type=PATH, required=True, metavar="CHECKPOINT", help="What the bundle was exported from.")
@click.option("--out", type=PATH, required=True, help="Folder for parity.json and parity.png; must not exist.")
@labels_option(default="0,1", help="Classes, an image for each: 207,360 or 0-9; may be given again.")
@click.option("--seed", type=int, default=0, help="Of the images' noise.")
@click.option("--cfg-scale", type=float, default=4.0, help="Guidance from 0; 1 is none.")
@click.option(
    "--every", type=click.IntRange(min=1), default=1, metavar="N", help="Compare every Nth step, and the last."
)
@heads_option
@backend_options
@json_option
def parity_command(
    bundle: Path, against: Path, out: Path, num_heads: int | None, as_json: bool, **settings: Any
) -> int:
    """Hold a bundle against its checkpoint, hop by hop: masks, weights, sliced form, each step, the whole run.

    Exits with 1 where a hop is over its tolerance, naming the first such step and block.
    """
    from dydit.bundle.bundle import Bundle
    from dydit.files import new_folder, require_absent
    from dydit.models.checkpoint import load_checkpoint
    from dydit.models.config import parse_config
    from dydit.runtime.backends.registry import require_known
    from dydit.verify.parity import ParityConfig, run_parity
    from dydit.verify.plots import parity_png
    from dydit.verify.text import aligned

    require_known(settings["backend"])
    config = parse_config(ParityConfig, settings)
    require_absent(out)
    opened, checkpoint = Bundle.open(bundle), load_checkpoint(against, num_heads)
    with new_folder(out) as folder, progress_line("parity") as progress:
        report = run_parity(opened, checkpoint, config, folder, progress)
        draw(parity_png, report, folder / "parity.png")
    if as_json:
        print_json(report.to_json())
    else:
        click.echo(aligned([[hop.status.value, hop.name, hop.detail] for hop in report.hops]))
        click.echo("\n".join([*report.stale_reasons, report.summary]))
        say_files(out)
        say(f"Next: dydit bench {bundle} --out BENCH" if report.ok else f"Next: look at {out / 'parity.png'}")
    return OK if report.ok else CHECK_FAILED


@cli.add("bench", "Time bundles, and PyTorch beside them.")
@click.argument("bundle", type=PATH)
@click.option("--versus", type=PATH, metavar="BUNDLE2", help="Another bundle to time beside it.")
@click.option("--against", type=PATH, metavar="CHECKPOINT", help="A checkpoint to time beside it, as masked PyTorch.")
@click.option("--out", type=PATH, required=True, help="Folder for bench.json and bench.png; must not exist.")
@labels_option(default="0", help="The batch, an image for each class: 207,360 or 0-9; may be given again.")
@click.option("--seed", type=int, default=0, help="Of the images' noise.")
@click.option("--cfg-scale", type=float, default=4.0, help="Guidance from 0; 1 is none, at half the compute.")
@click.option("--steps-measured", type=click.IntRange(min=1), default=25, help="Steps of a round, spread over the run.")
@click.option("--repeats", type=click.IntRange(min=1), default=7, help="Rounds that count; their median is the result.")
@click.option("--warmup", type=click.IntRange(min=1), default=1, help="Rounds before them that do not count.")
@backend_options
@json_option
def bench_command(
    bundle: Path, versus: Path | None, against: Path | None, out: Path, backend: str, as_json: bool, **settings: Any
) -> None:
    """Time a step in milliseconds, side against side: each in a process of its own, taking turns."""
    from dydit.bundle.bundle import Bundle
    from dydit.files import new_folder, require_absent
    from dydit.models.config import parse_config
    from dydit.runtime.backends.registry import require_known
    from dydit.verify.bench import BenchConfig, run_bench, sides_of
    from dydit.verify.plots import latency_png

    require_known(backend)
    config = parse_config(BenchConfig, settings)
    require_absent(out)
    opened = [Bundle.open(path, verify=False) for path in (bundle, versus) if path]
    sides = sides_of(opened[0], opened[1] if versus else None, against, backend)
    with new_folder(out) as folder, progress_line("bench") as progress:
        report = run_bench(sides, config, folder, progress)
        draw(latency_png, report, folder / "bench.png")
    if as_json:
        print_json(report.to_json())
    else:
        click.echo(report.summary)
        say_files(out)


@cli.add("inspect", "Say what a checkpoint or a bundle holds.")
@click.argument("path", metavar="CHECKPOINT|BUNDLE", type=PATH)
@click.option("--out", type=PATH, help="Also draw masks and plan as PNG, into this folder; must not exist.")
@heads_option
@json_option
def inspect_command(path: Path, out: Path | None, num_heads: int | None, as_json: bool) -> None:
    """Say what a checkpoint or a bundle holds: sizes, cost, masks over time, and the plans that they allow."""
    from dydit.files import new_folder, require_absent
    from dydit.verify.inspect import inspect

    if out is not None:
        require_absent(out)
    inspection = inspect(path, num_heads)
    if out is not None:
        with new_folder(out) as folder:
            inspection.write_pictures(folder)
    if as_json:
        print_json(inspection.to_json())
        return
    click.echo(inspection.text())
    if out is not None:
        say_files(out)


@cli.add("doctor", "Try which backends work here.")
@json_option
def doctor_command(as_json: bool) -> int:
    """Try which backends work here, and say why the others do not. Exits with 1 where none does."""
    from dydit.verify.doctor import run_doctor

    report = run_doctor()
    if as_json:
        print_json(report.to_json())
    else:
        click.echo(report.text())
    return OK if report.ok else CHECK_FAILED


add_build(cli)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code; errors become one line on standard error."""
    return run_command(cli, sys.argv[1:] if arguments is None else arguments)
