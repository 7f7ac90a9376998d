"""The command `dydit calibrate`, apart from `cli`, which would be too long with it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from dydit.bundle.advice import run_options
from dydit.bundle.stored_weights import Precision
from dydit.calibrate.range_methods import Method
from dydit.commands.options import (
    PATH,
    CommandGroup,
    Settings,
    backend_options,
    checkpoint_options,
    chosen_plan,
    draw,
    json_option,
    parse_options,
    plan_options,
    print_json,
    progress_line,
    say,
)
from dydit.commands.suggestions import next_line, reading_words
from dydit.diffusion.schedule import Sampler
from dydit.errors import OutputError
from dydit.extras import CHECKPOINTS, GRAPHS, backend_modules, require
from dydit.words import counted


def add_calibrate(group: CommandGroup) -> None:
    """Add the command to `dydit`."""
    group.add("calibrate", "Choose token capacities and activation ranges for an export.")(calibrate_command)


@click.argument("checkpoint", type=PATH)
@click.option("--out", type=PATH, required=True, help="Calibration file to write (JSON); must not exist.")
@click.option("--steps", type=click.IntRange(1, 1000), default=250, help="Number of sampling steps, as in the export.")
@click.option(
    "--sampler",
    type=click.Choice([each.value for each in Sampler]),
    default=Sampler.DDPM.value,
    help="Sampler, as in the export.",
)
@plan_options
@click.option(
    "--samples", type=click.IntRange(min=1), default=128, help="Images to calibrate on, spread over all classes."
)
@click.option("--held-out", type=click.IntRange(min=1), default=64, help="Other images, to check the result on.")
@click.option(
    "--seed",
    type=int,
    default=0,
    help="Seed for the initial and per-step noise; held-out images use the seed after it.",
)
@click.option(
    "--cfg-scale",
    "cfg_scales",
    type=float,
    multiple=True,
    default=(4.0,),
    help="Classifier-free guidance scale to calibrate for, from 0. Repeatable: the images are spread over the scales.",
)
@click.option(
    "--quantile",
    type=float,
    default=0.998,
    help="Share of a segment's steps and batches whose tokens must fit, from 0.5; 1: all that were observed.",
)
@click.option(
    "--margin", type=float, default=0.01, help="Extra token slots, as a share of those that the quantile gives."
)
@click.option("--tile", type=int, default=1, help="Round capacities up to a multiple of this number of tokens.")
@click.option(
    "--batch-size",
    "batch_sizes",
    type=int,
    multiple=True,
    default=(16,),
    help="Batch size whose tokens must fit. Repeatable. Smaller batches vary more and need more slots per image.",
)
@click.option(
    "--activations",
    type=click.Choice([each.value for each in Method]),
    help="Also choose the ranges of activations that int8-static and fp8 need, from all values (minmax), from a share "
    "of them (percentile), or so that the squared error (mse) or the divergence (entropy) is least.",
)
@click.option(
    "--percentile",
    type=float,
    metavar="P",
    help="With --activations percentile: the share of values inside the range.  [default: 0.9999]",
)
@click.option(
    "--activation-images", type=click.IntRange(min=1), default=32, help="Images whose activations are observed."
)
@click.option(
    "--smooth",
    "--migrate",  # the name of older versions
    "smooth",
    is_flag=True,
    help="With --activations: SmoothQuant. Divide input channels that are much larger than others and multiply their "
    "weights instead, where that lowers the error in int8. The factors are powers of two, so the model is unchanged.",
)
@click.option(
    "--target-psnr",
    type=float,
    metavar="DB",
    help="With --activations: also choose which layers stay in 16 bits, as few as possible, so that every image has at "
    "least this PSNR against the model that is not quantised.",
)
@click.option(
    "--target-fd-ratio",
    type=float,
    metavar="R",
    help="In place of --target-psnr: the Fréchet distance to --reference is at most R times that of the model that is "
    "not quantised.",
)
@click.option(
    "--reference",
    type=PATH,
    metavar="FILE.npz",
    help="With --target-fd-ratio: the images to compare with, as an array `images`, or `latents` as `dydit sample "
    "--latents-out` writes it; floats [n, C, S, S] as the model samples them. Distances are taken on their first "
    "principal components.",
)
@click.option(
    "--precision",
    type=click.Choice([each.value for each in Precision if each.is_calibrated]),
    default=Precision.INT8_STATIC.value,
    help="With a target: the 8-bit precision that layers are searched for.",
)
@click.option(
    "--search-images",
    type=click.IntRange(min=1),
    default=16,
    help="With a target: images that are sampled to judge each choice of layers, and held-out images for the last.",
)
@click.option(
    "--search-steps",
    type=click.IntRange(min=1),
    default=4,
    help="With a target: steps per segment, evenly spaced, at which the loss of each layer in 8 bits is measured.",
)
@checkpoint_options
@backend_options
@json_option
def calibrate_command(
    checkpoint: Path,
    out: Path,
    steps: int,
    sampler: str,
    per_step: bool,
    max_subnets: int | None,
    memory_budget: int | None,
    sliding: bool,
    quantile: float,
    margin: float,
    tile: int,
    batch_sizes: tuple[int, ...],
    reading: dict[str, Any],
    backend: str,
    device: str,
    threads: int,
    as_json: bool,
    target_psnr: float | None,
    target_fd_ratio: float | None,
    reference: Path | None,
    precision: str,
    search_images: int,
    search_steps: int,
    **settings: Any,
) -> None:
    """Choose token capacities, and ranges of activations, for `dydit export --calibration`.

    Samples the dynamic model CHECKPOINT, counts the tokens that its routers send through the MLPs, chooses the number
    of token slots for each block and segment of the plan that will be exported, and checks them on other images. If
    the tokens of a step do not fit at run time, the step is repeated with a slot for every token, so images are always
    those of dynamic routing. A plot is saved beside --out. Repeat the command to resume a run that was interrupted.
    The default plan is --max-subnets 32; a memory budget counts bytes of weights here.

    With a target, the loss of every linear layer in 8 bits is measured for each segment and block, and whole runs are
    sampled in PyTorch to find the most layers that can be in 8 bits. The calibration file lists the layers that stay
    in 16 bits, and the export follows it; a second plot, -search.png, shows speed against quality.
    """
    plan = chosen_plan(per_step, max_subnets, memory_budget, sliding)
    if target_psnr is not None and target_fd_ratio is not None:
        raise click.UsageError("give only one of --target-psnr and --target-fd-ratio")
    if target_psnr is None and target_fd_ratio is None and reference is not None:
        raise click.UsageError("--reference is for --target-psnr or --target-fd-ratio; give one of them, too")
    if target_psnr is not None or target_fd_ratio is not None:
        target = {"psnr": target_psnr, "fd_ratio": target_fd_ratio}
        sampled = {"images": search_images, "steps": search_steps, "reference": reference}
        settings["search"] = {"target": target, "precision": precision, **sampled}
    require("dydit calibrate", [*CHECKPOINTS, *GRAPHS, *backend_modules(backend)])
    from dydit.calibrate.calibration import CalibrationConfig, kept_if_begun, run_calibration, work_name
    from dydit.calibrate.plots_calibration import calibration_png
    from dydit.calibrate.plots_precision import search_words, sensitivity_png
    from dydit.checkpoints.checkpoint import load_checkpoint
    from dydit.export.settings import ExportConfig
    from dydit.files import claimed, explained, parents, remove, require_absent, write_new
    from dydit.reports.text import extra_text
    from dydit.runtime.backends.base import BackendOptions

    chosen = {"quantile": quantile, "margin": margin, "tile": tile, "batch_sizes": batch_sizes}
    config = parse_options(CalibrationConfig, {**settings, "capacity": chosen})
    exported = parse_options(ExportConfig, {"steps": steps, "sampler": sampler, **plan})
    picture, curve = out.with_suffix(".png"), out.with_name(f"{out.stem}-search.png")
    if picture == out:
        raise OutputError(f"{out}: the plot would have this name; give --out another ending, such as .json")
    require_absent(out)
    require_absent(picture)
    if config.search is not None:
        require_absent(curve)
    model = load_checkpoint(checkpoint, **reading)
    work = out.parent / f".{out.name}.{work_name(model, exported, config)}"
    with explained(out), parents(out), claimed(out), progress_line("calibrate") as progress:
        options = BackendOptions(threads=threads, device=device)

        def announce(line: str) -> None:
            """Before a search: also where there is no progress line, as it takes long."""
            if progress:
                progress.close()
            if not click.get_current_context().ensure_object(Settings).quiet:
                click.echo(line, err=True)

        with kept_if_begun(work):
            result = run_calibration(model, exported, config, work, backend, options, progress, announce)
        draw(calibration_png, result, picture)
        if config.search is not None:
            draw(sensitivity_png, result, curve)
        write_new(out, result.calibration.to_json().encode())
        remove(work)
    tokens, found = result.calibration.tokens, result.calibration.sensitivity
    if as_json:
        rates = {"predicted": tokens.predicted.model_dump(), "held_out": tokens.held_out.model_dump()}
        searched = {} if found is None else {"sensitivity": found.model_dump(exclude={"losses"})}
        moved = {"migration": result.smoothing.to_json()} if result.smoothing else {}
        print_json({"calibration": str(out), "segments": len(tokens.capacities), **rates, **moved, **searched})
        return
    held = tokens.held_out
    words = [*shlex.split(run_options(plan, steps, sampler)), *reading_words(reading)]
    words += ["--precision", precision] if result.calibration.activations else []
    say(
        f"{out}: capacities of {counted(len(tokens.capacities), 'segment')}. On "
        f"{counted(held.images, 'held-out image')} {held.rate:.3%} of the blocks of all steps overflow (below "
        f"{held.upper:.2%} with 95 % confidence; predicted: {tokens.predicted.rate:.3%}), so "
        f"{held.repeated_steps:.2%} of the steps run again at full capacity, and MLPs compute "
        f"{extra_text(held.mlp_ratio)} than with dynamic routing, including repeated steps",
        *([f"{out}: {result.smoothing.text()}"] if result.smoothing else []),
        *([] if found is None else [search_words(found)]),
        *model.notes,
        *(f"Look at {each}" for each in (picture, curve) if each.exists()),
        "For TensorRT engines run `dydit build BUNDLE` after the export",
        next_line("export", checkpoint, *words, "--routing", "capacity", "--calibration", out, "--out", "BUNDLE"),
    )
