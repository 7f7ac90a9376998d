"""`dydit calibrate`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dydit.bundle.advice import run_options
from dydit.bundle.stored_weights import Precision
from dydit.calibrate.range_methods import Method
from dydit.commands.group import Command
from dydit.commands.options import (
    PATH,
    backend_options,
    checkpoint_options,
    json_option,
    parse_options,
    plan_options,
    renamed,
    sampler_options,
)
from dydit.commands.output import print_json, say
from dydit.commands.progress import show_progress
from dydit.commands.suggestions import next_line, reading_words
from dydit.commands.text_options import texts_option
from dydit.extras import CHECKPOINTS, GRAPHS, backend_modules, require
from dydit.reports.text import extra_text
from dydit.words import counted

if TYPE_CHECKING:
    from dydit.calibrate.calibration import CalibrationResult


@click.command(cls=Command)
@click.argument("checkpoint", type=PATH)
@click.option("--out", type=PATH, required=True, help="Calibration file to write (JSON). Must not exist.")
@sampler_options(as_exported=False)
@plan_options
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=128,
    help="Number of images to calibrate on, spread over all classes.",
)
@click.option(
    "--held-out", type=click.IntRange(min=1), default=64, help="Number of other images, on which the result is checked."
)
@click.option(
    "--seed",
    type=int,
    default=0,
    help="Seed for the initial and per-step noise. The held-out images use the next seed.",
)
@click.option(
    "--cfg-scale",
    "cfg_scales",
    type=float,
    multiple=True,
    help="Classifier-free guidance scale to calibrate for, at least 0. Repeatable: the images are divided between the "
    "scales.  [default: 4; 1 for an unconditional model]",
)
@click.option(
    "--quantile",
    type=float,
    default=0.998,
    help="Share of the observed steps and batches of a segment whose tokens must fit into the token slots, at least "
    "0.5 and at most 1.",
)
@click.option(
    "--margin",
    type=float,
    default=0.01,
    help="Extra token slots, as a share of those that the quantile requires: 0.01 adds 1 %.",
)
@click.option(
    "--tile", type=int, default=1, help="Round the number of token slots up to a multiple of this number of tokens."
)
@click.option(
    "--batch-size",
    "batch_sizes",
    type=int,
    multiple=True,
    default=(16,),
    help="Batch size, in images, whose tokens must fit. Repeatable. Smaller batches vary more, and need more slots per "
    "image.",
)
@click.option(
    "--activations",
    type=click.Choice([each.value for each in Method]),
    help="Also choose the activation ranges that int8-static and fp8 need. minmax: a range that contains all values. "
    "percentile: a range that contains a share of the values. mse: the range with the lowest squared error. entropy: "
    "the range with the lowest divergence.",
)
@click.option(
    "--percentile",
    type=float,
    metavar="P",
    help="With --activations percentile: the share of the values that the range contains, from 0 to 1.  "
    "[default: 0.9999]",
)
@click.option(
    "--activation-images",
    type=click.IntRange(min=1),
    default=32,
    help="With --activations: number of images whose activations are observed.",
)
@click.option(
    "--smooth",
    is_flag=True,
    help="With --activations: apply SmoothQuant where it lowers the error in int8. Input channels that are much larger "
    "than others are divided by a power of two and their weights multiplied by it, so the model is unchanged.",
)
@renamed("--migrate", "--smooth")
@click.option(
    "--target-psnr",
    type=float,
    metavar="DB",
    help="With --activations: also choose which layers stay in 16 bits, as few as possible, so that every image has at "
    "least this PSNR, in dB, against the model before quantization.",
)
@click.option(
    "--target-fd-ratio",
    type=float,
    metavar="R",
    help="Instead of --target-psnr: choose the layers that stay in 16 bits so that the Fréchet distance to the images "
    "in --reference is at most R times the distance of the model before quantization.",
)
@click.option(
    "--reference",
    type=PATH,
    metavar="FILE.npz",
    help="With --target-fd-ratio: the reference images, as an array `images`, or as an array `latents` written by "
    "`dydit sample --latents-out`: floats [n, C, S, S] in the range that the model samples. The distance is computed "
    "on their first principal components.",
)
@click.option(
    "--precision",
    type=click.Choice([each.value for each in Precision if each.is_calibrated]),
    default=Precision.INT8_STATIC.value,
    help="With --target-psnr or --target-fd-ratio: the precision of the layers that are in 8 bits.",
)
@click.option(
    "--search-images",
    type=click.IntRange(min=1),
    default=16,
    help="With --target-psnr or --target-fd-ratio: number of images that are sampled to judge a choice of layers. The "
    "final choice is checked on the same number of held-out images.",
)
@click.option(
    "--search-steps",
    type=click.IntRange(min=1),
    default=4,
    help="With --target-psnr or --target-fd-ratio: number of steps per segment, evenly spaced, at which the error of "
    "each layer in 8 bits is measured.",
)
@texts_option("Such a model needs them, because they decide what is measured.")
@checkpoint_options
@backend_options
@json_option
def command(
    checkpoint: Path,
    out: Path,
    steps: int,
    sampler: str | None,
    spacing: str | None,
    eta: float,
    plan: dict[str, Any],
    reading: dict[str, Any],
    backend: str,
    device: str,
    threads: int,
    as_json: bool,
    target_psnr: float | None,
    target_fd_ratio: float | None,
    reference: Path | None,
    precision: str,
    **settings: Any,
) -> None:
    """Choose token capacities, and on request activation ranges, for `dydit export --calibration`.

    Samples the dynamic model CHECKPOINT and counts the tokens that its routers send through each MLP. A plan divides
    the run into segments: consecutive steps that share a subnetwork. For each segment and block, the command chooses a
    capacity: the number of token slots, one for each token that the MLP can compute. It then checks the capacities on
    held-out images. If the tokens of a step do not fit at run time, the step is repeated with a slot for every token,
    so the images are always those of dynamic routing. A plot is saved next to --out. The default plan is --max-subnets
    32. In this command, --memory-budget always limits the size of the weights, not measured memory. Run the same
    command again to resume an interrupted run.

    With --target-psnr or --target-fd-ratio, the command measures the error that each linear layer causes in 8 bits,
    for each segment and block. Then it samples whole runs in PyTorch to find the largest set of layers that can be
    in 8 bits while the target is reached. The calibration file lists the layers that stay in 16 bits, and the export
    follows it. A second plot, whose name ends in -search.png, shows speed against quality.
    """
    target = {"psnr": target_psnr, "fd_ratio": target_fd_ratio}
    if None not in target.values():
        raise click.UsageError("give only one of --target-psnr and --target-fd-ratio")
    search = {name: settings.pop(f"search_{name}") for name in ("images", "steps")}
    if any(value is not None for value in target.values()):
        settings["search"] = {"target": target, "precision": precision, "reference": reference, **search}
    elif reference is not None:
        raise click.UsageError("--reference needs --target-psnr or --target-fd-ratio; give one of them as well")
    require("dydit calibrate", [*CHECKPOINTS, *GRAPHS, *backend_modules(backend)])
    from dydit.calibrate.calibration import CalibrationConfig
    from dydit.calibrate.calibration_run import calibrate_to_file, require_free
    from dydit.checkpoints.checkpoint import load_checkpoint
    from dydit.export.settings import ExportConfig
    from dydit.runtime.backends.base import BackendOptions

    capacity = {name: settings.pop(name) for name in ("quantile", "margin", "tile", "batch_sizes")}
    config = parse_options(CalibrationConfig, {**settings, "capacity": capacity})
    exported = parse_options(ExportConfig, {"steps": steps, "sampler": sampler, "spacing": spacing, "eta": eta, **plan})
    require_free(out, config)
    model = load_checkpoint(checkpoint, **reading)
    options = BackendOptions(threads=threads, device=device)
    with show_progress("calibrate") as progress:
        result = calibrate_to_file(model, exported, config, out, backend, options, progress, announce=progress.note)
    if as_json:
        print_json(_facts(result, out))
        return
    run = run_options(plan, exported.sampling(model.config), model.config)
    words = [*shlex.split(run), *reading_words(reading)]
    words += ["--precision", precision] if result.calibration.activations else []
    say(
        *_result_lines(result, out),
        *model.notes,
        *_plot_lines(out),
        "For TensorRT, run `dydit build BUNDLE` after the export",
        next_line("export", checkpoint, *words, "--routing", "capacity", "--calibration", out, "--out", "BUNDLE"),
    )


def _facts(result: CalibrationResult, out: Path) -> dict[str, Any]:
    """What `--json` prints."""
    tokens, search = result.calibration.tokens, result.calibration.sensitivity
    facts = {
        "calibration": str(out),
        "segments": len(tokens.capacities),
        "predicted": tokens.predicted.model_dump(),
        "held_out": tokens.held_out.model_dump(),
    }
    if result.smoothing:
        facts["migration"] = result.smoothing.to_json()
    if search is not None:
        facts["sensitivity"] = search.model_dump(exclude={"losses"})
    return facts


def _result_lines(result: CalibrationResult, out: Path) -> list[str]:
    """What was chosen, and how it does on the held-out images."""
    from dydit.calibrate.plots_precision import search_words

    tokens, search = result.calibration.tokens, result.calibration.sensitivity
    held = tokens.held_out
    lines = [
        f"{out}: token capacities for {counted(len(tokens.capacities), 'segment')}",
        f"On {counted(held.images, 'held-out image')}, the tokens overflow in {held.rate:.3%} of the blocks of all "
        f"steps (below {held.upper:.2%} with 95 % confidence; predicted: {tokens.predicted.rate:.3%}). Therefore "
        f"{held.repeated_steps:.2%} of the steps run again at full capacity. With them, the MLPs compute "
        f"{extra_text(held.mlp_ratio)} than with dynamic routing",
    ]
    lines += [f"{out}: {result.smoothing.text()}"] if result.smoothing else []
    lines += [search_words(search)] if search is not None else []
    return lines


def _plot_lines(out: Path) -> list[str]:
    from dydit.calibrate.calibration_run import plot_path, search_plot_path

    return [f"Look at {path}" for path in (plot_path(out), search_plot_path(out)) if path.exists()]
