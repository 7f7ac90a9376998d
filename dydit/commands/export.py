"""The command `dydit export`, apart from `cli`, which would be too long with it."""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dydit.bundle.advice import capacity_chain, options_text, quoted, run_options
from dydit.bundle.manifest import Manifest, PlanKind, Routing
from dydit.bundle.measurements import Measured
from dydit.bundle.stored_weights import Precision
from dydit.calibrate.calibration_file import Calibration, read_calibration
from dydit.commands.options import (
    PATH,
    CommandGroup,
    checkpoint_options,
    chosen_plan,
    json_option,
    parse_options,
    plan_options,
    print_json,
    progress_line,
    say,
)
from dydit.commands.suggestions import after_export, reading_words
from dydit.commands.vae_options import space_lines, space_option, vae_options
from dydit.diffusion.schedule import Sampler
from dydit.errors import BackendError
from dydit.extras import CHECKPOINTS, FITS, GRAPHS, VAES, require
from dydit.words import counted

if TYPE_CHECKING:
    from dydit.checkpoints.checkpoint import Checkpoint
    from dydit.export.exporter import ExportConfig


class Cost(StrEnum):
    """What the plan of an export minimizes."""

    MACS = "macs"
    MEASURED = "measured"


def parse_guided_channels(text: str) -> int:
    """A number of latent channels; 0 stands for `all`."""
    if text == "all":
        return 0
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII) or int(text) < 1:
        raise click.BadParameter(f"{text!r} is neither a number of channels (at least 1) nor `all`")
    return int(text)


def _read_calibration(_: click.Context, __: click.Parameter, path: Path | None) -> Calibration | None:
    return None if path is None else read_calibration(path)


def graph_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--routing`, `--calibration` and `--precision`: what the graphs of an export are made of."""
    for option in (
        click.option(
            "--precision",
            type=click.Choice([each.value for each in Precision]),
            default=Precision.FP32.value,
            help="Data type of matrix products, attention and their weights; the residual stream, routers and sampler "
            "stay in fp32. fp32: as in the checkpoint. fp16: half the size, for TensorRT and ONNX Runtime. bf16: half "
            "the size, for TensorRT and PyTorch, not for ONNX Runtime on the CPU. int8: linear layers in int8 with a "
            "scale per token, the fastest with ONNX Runtime on the CPU. int8-static, fp8: linear layers in 8 bits with "
            "fixed scales from --calibration, for TensorRT and ONNX Runtime.",
        ),
        click.option(
            "--calibration",
            type=PATH,
            callback=_read_calibration,
            metavar="FILE",
            help="The file that `dydit calibrate` wrote for this checkpoint, steps, sampler and plan. For "
            "--routing capacity, and for --precision int8-static and fp8.",
        ),
        click.option(
            "--routing",
            type=click.Choice([each.value for each in Routing]),
            default=Routing.DYNAMIC.value,
            help="How tokens skip the MLP. dynamic: only routed tokens are computed, in shapes that depend on the "
            "data; least compute, not for TensorRT for RTX. capacity: fixed shapes, with the token slots that "
            "--calibration chose; without it, one for every token, which saves nothing. dense: every "
            "token is computed, then masked.",
        ),
    ):
        command = option(command)
    return command


def add_export(group: CommandGroup) -> None:
    """Add the command to `dydit`."""
    group.add("export", "Compile a checkpoint into a bundle.")(export_command)


@click.argument("checkpoint", type=PATH)
@click.option("--out", type=PATH, required=True, help="Folder for the bundle; must not exist.")
@click.option("--steps", type=click.IntRange(1, 1000), default=250, help="Number of sampling steps.")
@click.option(
    "--sampler",
    type=click.Choice([each.value for each in Sampler]),
    default=Sampler.DDPM.value,
    help="ddpm: ancestral sampling, with new noise in each step. ddim: deterministic.",
)
@plan_options
@click.option(
    "--cost",
    type=click.Choice([each.value for each in Cost]),
    default=Cost.MACS.value,
    help="What the choice of subnetworks minimizes. macs: multiply-adds. measured: time, from a profile of a few "
    "seconds with ONNX Runtime on this CPU.",
)
@click.option(
    "--cost-batch",
    type=click.IntRange(min=1),
    default=1,
    metavar="N",
    help="For --cost measured and --memory-budget: the batch size, with guidance, at which time and memory are "
    "measured.",
)
@graph_options
@click.option("--max-batch", type=click.IntRange(min=1), default=16, help="Largest batch size.")
@click.option(
    "--cfg-channels",
    type=parse_guided_channels,
    metavar="N|all",
    help="Number of latent channels that guidance acts on, from the first.  [default: 3]",
)
@vae_options(required=False)
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
    """Compile a checkpoint into a bundle, a folder that every backend can run.

    CHECKPOINT is any file or folder that `dydit convert` reads. Give at most one of --per-step, --max-subnets,
    --memory-budget and --sliding. The default is the plan that was fastest in measurements: --sliding with ONNX Runtime
    and PyTorch on the CPU, and --per-step for int8. With --routing capacity or dense, int8-static and fp8 it is
    --max-subnets 32.
    """
    asked = plan = chosen_plan(per_step, max_subnets, memory_budget, sliding)
    if cost == Cost.MEASURED and (per_step or sliding):
        raise click.UsageError("--cost measured has no effect with --per-step and --sliding; leave one of them out")
    if cost == Cost.MEASURED and settings["calibration"] is not None:
        raise click.UsageError(
            "--calibration does not go with --cost measured: a calibration holds for one plan, and measured plans vary"
        )
    needed = [*CHECKPOINTS, *GRAPHS, *(VAES if settings["vae"] else ())]
    require("dydit export", [*needed, *(["onnxruntime", *FITS] if cost == Cost.MEASURED else [])])
    from dydit.checkpoints.checkpoint import load_checkpoint
    from dydit.export.capacities import keeps_every_token
    from dydit.export.exporter import ExportConfig, export
    from dydit.files import require_absent

    require_absent(out)
    if settings["vae"]:
        from dydit.export.vae_graph import require_source

        require_source(settings["vae"])
    model = load_checkpoint(checkpoint, **reading)
    if cfg_channels is not None:
        settings["cfg_channels"] = cfg_channels or model.config.in_channels
    if not plan and cost == Cost.MACS and model.config.dynamic:
        plan = {"plan": best_plan(Routing(settings["routing"]), Precision(settings["precision"]))}
    config = parse_options(ExportConfig, {**settings, **plan})
    run = run_options(asked, config.steps, config.sampler) + options_text(reading_words(reading))
    with progress_line("measure") as progress:
        if progress and (cost == Cost.MEASURED or memory_budget is not None):
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
    lines = [*_measured_lines(manifest), *note, *model.notes, *space_lines(manifest), *_without_decoder(manifest)]
    say(_made(manifest, out, size), *lines, *after_export(manifest, out, checkpoint, reading))


def best_plan(routing: Routing, precision: Precision) -> PlanKind:
    """The plan of a dynamic model when none is asked for (figures: README, "Results")."""
    if routing is not Routing.DYNAMIC or precision.is_calibrated:
        return PlanKind.MAX_SUBNETS
    return PlanKind.PER_STEP if precision is Precision.INT8 else PlanKind.SLIDING


def _measure(model: Checkpoint, config: ExportConfig, cost: Cost, batch: int) -> tuple[Measured | None, list[str]]:
    """What the plan needs measured; where a budget's memory cannot be, nothing, and a line that says so."""
    from dydit.planning.profile import ProfileConfig, run_profile

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
    from dydit.reports.text import bytes_text

    count = len(manifest.subnets)
    served = f"one graph with {counted(count, 'width')}" if manifest.sliding else counted(count, "subnetwork")
    made = f"{out}: {counted(manifest.sampling.steps, 'step')} on {served}, {bytes_text(size)}"
    if not manifest.model.dynamic:
        return f"{made}. A static model: every step computes all of it"
    computed, exact = (cost / manifest.plan.static_macs for cost in (manifest.plan.macs, manifest.plan.per_step_macs))
    return (
        f"{made}. Its heads and channel groups take {computed:.1%} of the multiply-adds of the static model's blocks"
        + (f" ({exact:.1%} with a subnetwork for each mask)" if computed > exact * 1.0005 else "")
        + ", before token routing" * (manifest.routing is not Routing.DENSE)
    )


def _without_decoder(manifest: Manifest) -> list[str]:
    """A line where samples will be latents, so that nobody waits for pictures."""
    if manifest.model.samples_pixels or manifest.vae is not None:
        return []
    return [
        "This bundle has no VAE decoder, so `dydit sample` writes latents. For pictures export with --vae, e.g. --vae "
        "stabilityai/sd-vae-ft-ema for models of Stable Diffusion's latents; `dydit attach-vae` adds a decoder to this "
        "bundle, and `dydit decode` makes pictures of latents"
    ]


def _measured_lines(manifest: Manifest) -> list[str]:
    from dydit.reports.text import measured_lines

    return measured_lines(manifest.plan.measured)
