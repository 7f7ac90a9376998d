"""The command `dydit calibrate`, apart from `cli`, which would be too long with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dydit.bundle.stored import Precision
from dydit.calibrate.ranges import Method
from dydit.cli_options import (
    PATH,
    CommandGroup,
    backend_options,
    chosen_plan,
    draw,
    heads_option,
    json_option,
    plan_options,
    print_json,
    progress_line,
    say,
)
from dydit.diffusion.schedule import Sampler
from dydit.errors import OutputError


def add_calibrate(group: CommandGroup) -> None:
    """Add the command to `dydit`."""
    group.add("calibrate", "Choose token capacities for a checkpoint.")(calibrate_command)


@click.argument("checkpoint", type=PATH)
@click.option("--out", type=PATH, required=True, help="The calibration file to write, JSON; must not exist.")
@click.option("--steps", type=click.IntRange(1, 1000), default=250, help="Sampling steps of a run, as in the export.")
@click.option(
    "--sampler",
    type=click.Choice([each.value for each in Sampler]),
    default=Sampler.DDPM.value,
    help="As in the export.",
)
@plan_options
@click.option("--samples", type=click.IntRange(min=1), default=128, help="Images to calibrate on, of all classes.")
@click.option("--held-out", type=click.IntRange(min=1), default=64, help="Other images, to verify on.")
@click.option("--seed", type=int, default=0, help="Of the images' noise; the held-out ones have the next.")
@click.option(
    "--cfg-scale",
    "cfg_scales",
    type=float,
    multiple=True,
    default=(4.0,),
    help="Guidance from 0 that is sampled with; may be given again, images are then shared out evenly.",
)
@click.option(
    "--quantile",
    type=float,
    default=0.998,
    help="Share of a segment's steps and batches whose tokens shall fit; 1: all that were seen.",
)
@click.option("--margin", type=float, default=0.01, help="Further slots, as a share of those.")
@click.option("--tile", type=int, default=1, help="Round capacities up to a multiple of so many tokens.")
@click.option(
    "--batch-size",
    "batch_sizes",
    type=int,
    multiple=True,
    default=(16,),
    help="Images of a batch that shall fit; may be given again. Smaller batches vary more, so they need more slots.",
)
@click.option(
    "--activations",
    type=click.Choice([each.value for each in Method]),
    help="Also choose ranges of what enters linear layers, for --precision int8-static and fp8: all values (minmax), "
    "all but few (percentile), the least error (mse), the distribution kept best (entropy).",
)
@click.option(
    "--percentile",
    type=float,
    metavar="P",
    help="Share of values within the range, for that method.  [default: 0.9999]",
)
@click.option(
    "--activation-images", type=click.IntRange(min=1), default=32, help="Images whose activations are watched."
)
@click.option(
    "--migrate",
    is_flag=True,
    help="With --activations: divide input channels that are much larger than others, where the weights, multiplied in "
    "return, then lose less in int8. By powers of two, so that the model stays itself.",
)
@click.option(
    "--target-psnr",
    type=float,
    metavar="DB",
    help="With --activations: also find which layers stay in 16 bits, as few as keep every image within so many "
    "decibels of the model that is not quantised.",
)
@click.option(
    "--target-fd-ratio",
    type=float,
    metavar="R",
    help="Instead: as few as keep the Fréchet distance to --reference within R times the model's.",
)
@click.option(
    "--reference",
    type=PATH,
    metavar="FILE.npz",
    help="Images to take Fréchet distances to, on their first principal components: floats `images`, or `latents` as "
    "`dydit sample --latents-out` writes them, [n, C, S, S] as the model makes them.",
)
@click.option(
    "--precision",
    type=click.Choice([each.value for each in Precision if each.is_calibrated]),
    default=Precision.INT8_STATIC.value,
    help="The 8 bits that a target is searched for.",
)
@click.option(
    "--search-images",
    type=click.IntRange(min=1),
    default=16,
    help="Images that are sampled for each choice, and held-out ones for the last.",
)
@click.option(
    "--search-steps",
    type=click.IntRange(min=1),
    default=4,
    help="Steps of a segment, evenly spread, at which each layer's loss in 8 bits is measured.",
)
@heads_option
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
    num_heads: int | None,
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
    """Choose token slots, and ranges of activations, by segment and block, for `dydit export --calibration`.

    Samples the dynamic model CHECKPOINT, counts the tokens that its routers send through the MLPs, chooses capacities
    for the plan that is to be exported, and verifies them on other images. Where a step's tokens do not fit after all,
    it is repeated with a slot for every token: images are always those of dynamic routing. A picture is drawn beside
    --out. A run that was killed goes on where it was. Without a plan it is --max-subnets 32; a memory budget holds
    bytes of weights.

    With a target, the loss of every linear layer in 8 bits is measured, by segment and block, and whole runs are
    sampled in PyTorch with more and more layers in 8 bits, as many as keep the target. The layers that stay in 16 bits
    are in the file, so that the export leaves them there; a second picture, -search.png, shows speed against quality.
    """
    plan = chosen_plan(per_step, max_subnets, memory_budget, sliding)
    if target_psnr is not None and target_fd_ratio is not None:
        raise click.UsageError("--target-psnr and --target-fd-ratio exclude each other")
    if target_psnr is None and target_fd_ratio is None and reference is not None:
        raise click.UsageError("--reference goes with --target-psnr or --target-fd-ratio")
    if target_psnr is not None or target_fd_ratio is not None:
        target = {"psnr": target_psnr, "fd_ratio": target_fd_ratio}
        sampled = {"images": search_images, "steps": search_steps, "reference": reference}
        settings["search"] = {"target": target, "precision": precision, **sampled}
    from dydit.export.exporter import ExportConfig
    from dydit.files import claimed, explained, parents, remove, require_absent, write_new
    from dydit.models.checkpoint import load_checkpoint
    from dydit.models.config import parse_config
    from dydit.runtime.backends.base import BackendOptions
    from dydit.runtime.backends.registry import require_known
    from dydit.verify.calibration import CalibrationConfig, kept_if_begun, run_calibration, work_name
    from dydit.verify.plots_calibration import calibration_png
    from dydit.verify.plots_sensitivity import search_words, sensitivity_png

    require_known(backend)
    chosen = {"quantile": quantile, "margin": margin, "tile": tile, "batch_sizes": batch_sizes}
    config = parse_config(CalibrationConfig, {**settings, "capacity": chosen})
    exported = parse_config(ExportConfig, {"steps": steps, "sampler": sampler, **plan})
    picture, curve = out.with_suffix(".png"), out.with_name(f"{out.stem}-search.png")
    if picture == out:
        raise OutputError(f"{out} would be the picture; give --out another ending, .json")
    require_absent(out)
    require_absent(picture)
    if config.search is not None:
        require_absent(curve)
    model = load_checkpoint(checkpoint, num_heads)
    work = out.parent / f".{out.name}.{work_name(model, exported, config)}"
    with explained(out), parents(out), claimed(out), progress_line("calibrate") as progress:
        options = BackendOptions(threads=threads, device=device)
        with kept_if_begun(work):
            result = run_calibration(model, exported, config, work, backend, options, progress)
        draw(calibration_png, result, picture)
        if config.search is not None:
            draw(sensitivity_png, result, curve)
        write_new(out, result.calibration.to_json().encode())
        remove(work)
    tokens, found = result.calibration.tokens, result.calibration.sensitivity
    if as_json:
        rates = {"predicted": tokens.predicted.model_dump(), "held_out": tokens.held_out.model_dump()}
        searched = {} if found is None else {"sensitivity": found.model_dump(exclude={"losses"})}
        moved = {"migration": result.found.to_json()} if result.found else {}
        print_json({"calibration": str(out), "segments": len(tokens.capacities), **rates, **moved, **searched})
        return
    held = tokens.held_out
    options_text = _plan_words(plan, steps, sampler)
    eighth = f" --precision {precision}" if result.calibration.activations else ""
    say(
        f"{out}: capacities of {len(tokens.capacities)} segments; on {held.images} held-out images {held.rate:.3%} of "
        f"step-blocks overflow (below {held.upper:.2%} with 95 % confidence; predicted: {tokens.predicted.rate:.3%}), "
        f"and MLPs compute {held.mlp_ratio - 1:.1%} more than with dynamic routing, repeated steps among it",
        *([f"{out}: {result.found.text()}"] if result.found else []),
        *([] if found is None else [search_words(found)]),
        *(f"Look at {each}" for each in (picture, curve) if each.exists()),
        f"Next: dydit export {checkpoint}{options_text}{eighth} --routing capacity --calibration {out} --out BUNDLE",
    )


def _plan_words(plan: dict[str, Any], steps: int, sampler: str) -> str:
    """The options of an export that make the same run and plan, where they are not the defaults."""
    words = [] if steps == 250 else [f"--steps {steps}"]
    words += [] if sampler == Sampler.DDPM else [f"--sampler {sampler}"]
    words += {"per-step": ["--per-step"], "sliding": ["--sliding"]}.get(plan.get("plan", ""), [])
    words += [f"--max-subnets {plan['max_subnets']}"] if "max_subnets" in plan else []
    words += [f"--memory-budget {plan['memory_budget']}B"] if "memory_budget" in plan else []
    return "".join(f" {word}" for word in words)
