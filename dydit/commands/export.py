"""`dydit export`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dydit.bundle.advice import capacity_chain, options_text, quoted, run_options
from dydit.bundle.manifest import Manifest, PlanKind, Routing
from dydit.bundle.stored_weights import Precision
from dydit.calibrate.calibration_file import Calibration, read_calibration
from dydit.commands.group import Command
from dydit.commands.options import (
    PATH,
    checkpoint_options,
    json_option,
    parse_options,
    plan_options,
    sampler_options,
    space_option,
)
from dydit.commands.output import print_json, say, warn
from dydit.commands.progress import show_progress
from dydit.commands.suggestions import after_export, reading_words
from dydit.commands.vae_options import decoder_line, vae_options
from dydit.extras import CHECKPOINTS, FITS, GRAPHS, VAES, require
from dydit.reports.text import bytes_text, measured_lines
from dydit.words import counted

if TYPE_CHECKING:
    from dydit.export.settings import ExportConfig

MEASURED = "measured"


def parse_guided_channels(text: str) -> int:
    """A number of latent channels; 0 stands for `all`."""
    if text == "all":
        return 0
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII) or int(text) < 1:
        raise click.BadParameter(f"{text!r} is neither `all` nor a number of channels of at least 1")
    return int(text)


def _read_calibration(_: click.Context, __: click.Parameter, path: Path | None) -> Calibration | None:
    return None if path is None else read_calibration(path)


@click.command(cls=Command)
@click.argument("checkpoint", type=PATH)
@click.option("--out", type=PATH, required=True, help="Folder for the bundle. Must not exist.")
@sampler_options(as_exported=False)
@plan_options
@click.option(
    "--cost",
    type=click.Choice(["macs", MEASURED]),
    default="macs",
    help="What the choice of subnetworks minimizes. macs: the number of multiply-adds. measured: the time, from a "
    "profile of a few seconds with ONNX Runtime on this CPU.",
)
@click.option(
    "--cost-batch",
    type=click.IntRange(min=1),
    default=1,
    metavar="N",
    help="With --cost measured or --memory-budget: the batch size, in images, at which time and memory are measured. "
    "Guidance is on.",
)
@click.option(
    "--routing",
    type=click.Choice([each.value for each in Routing]),
    default=Routing.DYNAMIC.value,
    help="How tokens skip the MLP. dynamic: only routed tokens are computed. This has the lowest compute, but shapes "
    "depend on the data, which tensorrt-rtx does not support. capacity: shapes are fixed. Each MLP computes the number "
    "of tokens (token slots) that --calibration gives. Without --calibration it computes every token, which saves "
    "nothing. dense: every token is computed, then masked.",
)
@click.option(
    "--calibration",
    type=PATH,
    callback=_read_calibration,
    metavar="FILE",
    help="The file that `dydit calibrate` wrote for this checkpoint, with the same steps, sampler and plan. Used by "
    "--routing capacity, and required by --precision int8-static and fp8.",
)
@click.option(
    "--precision",
    type=click.Choice([each.value for each in Precision]),
    default=Precision.FP32.value,
    help="Data type of matrix products, attention and their weights. The residual stream, routers and sampler are "
    "always in fp32. fp32: as in the checkpoint. fp16: half the size, for TensorRT and ONNX Runtime. bf16: half the "
    "size, for TensorRT and PyTorch, not for ONNX Runtime on the CPU. int8: linear layers in int8 with one scale per "
    "token, the fastest with ONNX Runtime on the CPU. int8-static, fp8: linear layers in 8 bits with fixed scales from "
    "--calibration, for TensorRT and ONNX Runtime.",
)
@click.option("--max-batch", type=click.IntRange(min=1), default=16, help="Largest batch size, in images.")
@click.option(
    "--cfg-channels",
    type=parse_guided_channels,
    metavar="N|all",
    help="Number of latent channels that guidance acts on, counted from the first.  [default: 3]",
)
@vae_options(required=False)
@space_option
@checkpoint_options
@json_option
def command(
    checkpoint: Path,
    out: Path,
    plan: dict[str, Any],
    cost: str,
    cost_batch: int,
    cfg_channels: int | None,
    reading: dict[str, Any],
    as_json: bool,
    **settings: Any,
) -> None:
    """Compile a checkpoint into a bundle, a folder that every backend can run.

    CHECKPOINT is any file or folder that `dydit convert` reads. Give at most one of --per-step, --max-subnets,
    --memory-budget and --dynamic-width. If none of them is given, --routing and --precision decide: --max-subnets
    32 for --routing capacity or dense and for int8-static and fp8, --per-step for int8, and --dynamic-width in all
    other cases. With --cost measured, the default is --max-subnets 32. A static model has one subnetwork.
    """
    if cost == MEASURED and plan.get("plan") in (PlanKind.PER_STEP, PlanKind.DYNAMIC_WIDTH):
        raise click.UsageError("--cost measured has no effect with --per-step or --dynamic-width; remove one of them")
    if cost == MEASURED and settings["calibration"] is not None:
        raise click.UsageError(
            "--calibration cannot be combined with --cost measured: a calibration is made for one plan, and the plans "
            "that result from measured times vary"
        )
    needed = [*CHECKPOINTS, *GRAPHS, *(VAES if settings["vae"] else ())]
    require("dydit export", [*needed, *(["onnxruntime", *FITS] if cost == MEASURED else [])])
    from dydit.checkpoints.checkpoint import load_checkpoint
    from dydit.export.capacities import keeps_every_token
    from dydit.export.settings import ExportConfig
    from dydit.export.vae_model import require_source
    from dydit.files import require_absent
    from dydit.planning.measured_export import Cost, default_plan, export_measured

    require_absent(out)
    if settings["vae"]:
        require_source(settings["vae"])
    model = load_checkpoint(checkpoint, **reading)
    if cfg_channels is not None:
        settings["cfg_channels"] = cfg_channels or model.config.in_channels
    if not plan and cost != MEASURED and model.config.dynamic:
        settings["plan"] = default_plan(Routing(settings["routing"]), Precision(settings["precision"]))
    config = parse_options(ExportConfig, {**settings, **plan})
    with show_progress("export") as progress:
        bundle, notes = export_measured(model, out, config, Cost(cost), cost_batch, progress.stage)
    manifest = bundle.manifest
    if keeps_every_token(manifest):
        own = model.config
        run = run_options(plan, config.sampling(own), own) + options_text(reading_words(reading))
        warn(_slots_warning(checkpoint, out, config, run))
    if as_json:
        print_json(_facts(manifest, out))
        return
    say(
        _bundle_line(manifest, out),
        *measured_lines(manifest.plan.measured),
        *notes,
        *model.notes,
        *_space_lines(manifest),
        *after_export(manifest, out, checkpoint, reading),
    )


def _facts(manifest: Manifest, out: Path) -> dict[str, Any]:
    """What `--json` prints."""
    return {
        "bundle": str(out),
        "steps": manifest.sampling.steps,
        "segments": len(manifest.plan.segments),
        "subnets": len(manifest.subnets),
        "bytes": _size(manifest),
        "samples": manifest.model.space_words,
        "training": manifest.model.diffusion.words,
        "decoder": manifest.vae and manifest.vae.scaling_words,
        "plan": manifest.plan.model_dump(mode="json", exclude={"segments"}),
    }


def _size(manifest: Manifest) -> int:
    return sum(entry.bytes for entry in manifest.files.values())


def _slots_warning(checkpoint: Path, out: Path, config: ExportConfig, run: str) -> str:
    """That token routing saves nothing in this bundle, and the commands that make one in which it does."""
    if config.calibration is not None:
        return (
            "the calibration keeps a slot for every token, because its images send nearly all tokens through the MLPs; "
            "token routing saves nothing"
        )
    slots, bundle = out.with_name(f"{out.name}-slots.json"), out.with_name(f"{out.name}-slots")
    more = "".join(
        f" --{name.replace('_', '-')} {quoted(str(getattr(config, name)))}"
        for name in ("max_batch", "cfg_channels", "vae", "vae_tile")
        if getattr(config, name) != type(config).model_fields[name].default
    )
    return (
        "without --calibration, --routing capacity keeps a slot for every token, so token routing saves nothing. To "
        f"calibrate the number of slots, run {capacity_chain(checkpoint, slots, bundle, run, config.precision, more)}"
    )


def _bundle_line(manifest: Manifest, out: Path) -> str:
    count = len(manifest.subnets)
    graphs = f"one graph with {counted(count, 'width')}" if manifest.dynamic_width else counted(count, "subnetwork")
    line = f"{out}: {counted(manifest.sampling.steps, 'step')}, {graphs}, {bytes_text(_size(manifest))}"
    if not manifest.model.dynamic:
        return f"{line}. The model is static: every step runs all of it"
    share, per_step = (cost / manifest.plan.static_macs for cost in (manifest.plan.macs, manifest.plan.per_step_macs))
    return (
        f"{line}. Its {manifest.model.units.group_titles} take {share:.1%} of the multiply-adds of the static model's "
        "blocks"
        + (f" ({per_step:.1%} with one subnetwork per mask)" if share > per_step * 1.0005 else "")
        + ", not counting what token routing saves" * (manifest.routing is not Routing.DENSE)
    )


def _space_lines(manifest: Manifest) -> list[str]:
    """What samples of the bundle are, where that is not plain: latents, with or without a decoder, or an assumption."""
    if manifest.vae is not None:
        return [decoder_line(manifest.vae)]
    if not manifest.model.samples_pixels:
        return [
            "This bundle has no VAE decoder, so `dydit sample` writes latents instead of images. `dydit attach-vae` "
            "adds a decoder, `dydit decode` decodes latents, and `dydit export --vae` includes a decoder from the "
            "start. If the model samples latents of Stable Diffusion 1 or 2, use --vae stabilityai/sd-vae-ft-ema"
        ]
    if manifest.model.space_is_assumed:
        return [
            "The samples are assumed to be RGB pixels, because they have 3 channels. If they are latents, export with "
            "--space latents"
        ]
    return []
