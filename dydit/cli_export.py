"""The command `dydit export`, apart from `cli`, which would be too long with it."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dydit.bundle.advice import capacity_chain, quoted, run_options
from dydit.bundle.costs import Measured
from dydit.bundle.manifest import Manifest, PlanKind, Routing
from dydit.bundle.stored import Precision
from dydit.cli_options import (
    PATH,
    CommandGroup,
    checkpoint_options,
    chosen_plan,
    graph_options,
    json_option,
    next_commands,
    parse_guided_channels,
    plan_options,
    print_json,
    progress_line,
    say,
    vae_options,
)
from dydit.cli_vae import scaling_options, space_lines, space_option
from dydit.diffusion.schedule import Sampler
from dydit.errors import BackendError
from dydit.words import counted

if TYPE_CHECKING:
    from dydit.export.exporter import ExportConfig
    from dydit.models.checkpoint import Checkpoint


class Cost(StrEnum):
    """What the plan of an export makes least."""

    MACS = "macs"
    MEASURED = "measured"


def add_export(group: CommandGroup) -> None:
    """Add the command to `dydit`."""
    group.add("export", "Compile a checkpoint into a bundle.")(export_command)


@click.argument("checkpoint", type=PATH)
@click.option("--out", type=PATH, required=True, help="Folder for the bundle; must not exist.")
@click.option("--steps", type=click.IntRange(1, 1000), default=250, help="Sampling steps of a run.")
@click.option(
    "--sampler",
    type=click.Choice([each.value for each in Sampler]),
    default=Sampler.DDPM.value,
    help="ddpm: ancestral, with fresh noise in each step; ddim: deterministic.",
)
@plan_options
@click.option(
    "--cost",
    type=click.Choice([each.value for each in Cost]),
    default=Cost.MACS.value,
    help="What the plan makes least. macs: multiply-adds; measured: milliseconds, by a profile of some seconds on ONNX "
    "Runtime on this CPU.",
)
@click.option(
    "--cost-batch",
    type=click.IntRange(min=1),
    default=1,
    metavar="N",
    help="Images in the batch, with guidance, whose time and memory are measured for --cost measured and "
    "--memory-budget.",
)
@graph_options
@click.option("--max-batch", type=click.IntRange(min=1), default=16, help="Most images in a batch.")
@click.option(
    "--cfg-channels",
    type=parse_guided_channels,
    metavar="N|all",
    help="Latent channels that guidance acts on.  [default: the first 3, or all of fewer]",
)
@vae_options
@scaling_options
@space_option
@checkpoint_options
@json_option
def export_command(
    checkpoint: Path,
    out: Path,
    per_step: bool,
    max_subnets: int | None,
    memory_budget: int | None,
    sliding: bool,
    cost: str,
    cost_batch: int,
    cfg_channels: int | None,
    reading: dict[str, Any],
    as_json: bool,
    **settings: Any,
) -> None:
    """Compile a checkpoint into a bundle: one folder that any backend runs.

    CHECKPOINT is any that `dydit convert` reads. --per-step, --max-subnets, --memory-budget and --sliding exclude each
    other. Without any of them the plan is the best that was measured for what the bundle is for: --sliding for ONNX
    Runtime and PyTorch on the CPU, --per-step in int8, which needs its weights packed, and --max-subnets 32 with the
    routings that engines take, where none was measured.
    """
    asked = plan = chosen_plan(per_step, max_subnets, memory_budget, sliding)
    if cost == Cost.MEASURED and (per_step or sliding):
        raise click.UsageError("--per-step and --sliding leave nothing to choose by --cost measured")
    if cost == Cost.MEASURED and settings["calibration"] is not None:
        raise click.UsageError("a calibration is of a plan that repeats; plans by --cost measured vary")
    from dydit.export.capacities import keeps_every_token
    from dydit.export.exporter import ExportConfig, export
    from dydit.files import require_absent
    from dydit.models.checkpoint import load_checkpoint
    from dydit.models.config import parse_config

    require_absent(out)
    if settings["vae"]:
        from dydit.export.vae import require_source

        require_source(settings["vae"])
    model = load_checkpoint(checkpoint, **reading)
    if cfg_channels is not None:
        settings["cfg_channels"] = cfg_channels or model.config.in_channels
    if not plan and cost == Cost.MACS and model.config.dynamic:
        plan = {"plan": best_plan(Routing(settings["routing"]), Precision(settings["precision"]))}
    config = parse_config(ExportConfig, {**settings, **plan})
    run = run_options(asked, config.steps, config.sampler) + (f" --num-heads {num_heads}" if num_heads else "")
    with progress_line("measure") as progress:
        if progress:
            progress(0, 1)
        measured, note = _measure(model, config, Cost(cost), cost_batch)
    with progress_line("export") as progress:
        bundle = export(model, out, config, progress, measured)
    manifest = bundle.manifest
    if keeps_every_token(manifest):
        click.echo(_all_slots(checkpoint, out, config, run), err=True)
    size = sum(entry.bytes for entry in manifest.files.values())
    if as_json:
        planned = manifest.plan.model_dump(mode="json", exclude={"segments"})
        facts = {"segments": len(manifest.plan.segments), "subnets": len(manifest.subnets), "bytes": size}
        pictures = {"samples": manifest.model.space_words, "decoder": manifest.vae and manifest.vae.scaling_words}
        print_json({"bundle": str(out), "steps": manifest.sampling.steps, **facts, **pictures, "plan": planned})
        return
    lines = [*_measured_lines(manifest), *note, *model.notes, *space_lines(manifest)]
    say(_made(manifest, out, size), *lines, next_commands(manifest, out, checkpoint))


def best_plan(routing: Routing, precision: Precision) -> PlanKind:
    """The plan of a dynamic model when none is asked for (figures: README, "Results")."""
    if routing is not Routing.DYNAMIC or precision.is_calibrated:
        return PlanKind.MAX_SUBNETS
    return PlanKind.PER_STEP if precision is Precision.INT8 else PlanKind.SLIDING


def _measure(model: Checkpoint, config: ExportConfig, cost: Cost, batch: int) -> tuple[Measured | None, list[str]]:
    """What the plan needs measured; where a budget's memory cannot be, nothing, and a line that says so."""
    from dydit.verify.profile import ProfileConfig, run_profile

    times, memory = cost is Cost.MEASURED, config.memory_budget is not None
    if memory and config.calibration is not None:
        return None, ["The budget holds bytes of weights, not measured memory: so does that of the calibration"]
    if not (times or memory):
        return None, []
    settings = ProfileConfig(batch=batch)
    if times:
        return run_profile(model, config, settings, times, memory), []
    try:
        if config.precision is Precision.BF16:
            raise BackendError("onnxruntime on the CPU does not run bf16")
        return run_profile(model, config, settings, times, memory), []
    except BackendError as error:
        return None, [f"The budget holds bytes of weights, not measured memory: {error}"]


def _all_slots(checkpoint: Path, out: Path, config: ExportConfig, run: str) -> str:
    """The warning that tokens save nothing, and the commands with which they do."""
    if config.calibration is not None:
        return (
            "Warning: the calibration keeps a slot for every token, as its images send nearly all of them through the "
            "MLPs: routing saves nothing"
        )
    slots, bundle = out.with_name(f"{out.name}-slots.json"), out.with_name(f"{out.name}-slots")
    more = "".join(
        f" --{name.replace('_', '-')} {quoted(str(getattr(config, name)))}"
        for name in ("max_batch", "cfg_channels", "vae", "vae_tile")
        if getattr(config, name) != type(config).model_fields[name].default
    )
    chain = capacity_chain(checkpoint, slots, bundle, run, config.precision, more)
    return (
        "Warning: without --calibration capacity routing keeps a slot for every token, so that all of them are "
        f"computed and routing saves nothing. For as many slots as are needed: {chain}"
    )


def _made(manifest: Manifest, out: Path, size: int) -> str:
    from dydit.verify.text import bytes_text

    count = len(manifest.subnets)
    served = f"one graph of {counted(count, 'width')}" if manifest.sliding else counted(count, "subnetwork")
    made = f"{out}: {counted(manifest.sampling.steps, 'step')} on {served}, {bytes_text(size)}"
    if not manifest.model.dynamic:
        return f"{made}; a static model: every step computes all of it"
    computed, exact = (cost / manifest.plan.static_macs for cost in (manifest.plan.macs, manifest.plan.per_step_macs))
    return (
        f"{made}; widths take {computed:.1%} of the multiply-adds of the static model's blocks"
        + (f" ({exact:.1%} if every step had its own)" if computed > exact * 1.0005 else "")
        + ", before token routing" * (manifest.routing is not Routing.DENSE)
    )


def _measured_lines(manifest: Manifest) -> list[str]:
    from dydit.verify.text import measured_lines

    return measured_lines(manifest.plan.measured)
