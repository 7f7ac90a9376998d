"""The command `dydit build`, apart from `cli`, which would be too long with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dydit.cli_options import PATH, CommandGroup, duration, json_option, print_json, progress_line, say
from dydit.engines.fingerprint import HardwareCompatibility
from dydit.engines.flavour import Flavour, default_flavour, installed_version, present_gpu


def add_build(group: CommandGroup) -> None:
    """Add the command to `dydit`."""
    group.add("build", "Build a bundle's TensorRT engines.")(build_command)


@click.argument("bundle", type=PATH)
@click.option(
    "--flavour",
    type=click.Choice([each.value for each in Flavour]),
    help="tensorrt: on the GPU that will run the engines; tensorrt-rtx: for RTX GPUs, anywhere.  [default: what is "
    "installed]",
)
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=1,
    help="Engines built at a time. Of DiT-XL/2 each takes about 4 GB of memory.",
)
@click.option("--max-batch", type=click.IntRange(min=1), help="Most images in a batch.  [default: the bundle's]")
@click.option("--opt-batch", type=click.IntRange(min=1), help="Batch to tune for.  [default: the largest]")
@click.option(
    "--compute-capability",
    "compute_capabilities",
    multiple=True,
    metavar="X.Y",
    help="A GPU to build for, with tensorrt-rtx; may be given again.  [default: all of 8.0 and later]",
)
@click.option(
    "--hardware-compatibility",
    type=click.Choice([each.value for each in HardwareCompatibility]),
    default=HardwareCompatibility.NONE.value,
    help="Other GPUs that engines of tensorrt shall run on, somewhat slower.",
)
@click.option(
    "--version-compatible", is_flag=True, help="Engines of tensorrt that later versions of the same major run, too."
)
@click.option(
    "--inspect/--no-inspect",
    default=True,
    help="Where there is a GPU: fail where an engine's kernels are not of the bundle's precision, or attention is not "
    "fused.",
)
@json_option
def build_command(bundle: Path, flavour: str | None, jobs: int, inspect: bool, as_json: bool, **settings: Any) -> None:
    """Build the TensorRT engines of a bundle into its folder; those that are there and still right stay as they are.

    Engines are for one TensorRT version and the GPUs that are named. A build that is interrupted goes on where it was.
    """
    from dydit.bundle.bundle import Bundle
    from dydit.engines.build import build_engines
    from dydit.engines.fingerprint import make_request
    from dydit.verify.text import bytes_text

    opened = Bundle.open(bundle)
    chosen = Flavour(flavour) if flavour else default_flavour()
    request = make_request(opened.manifest, chosen, installed_version(chosen), present_gpu(), **settings)
    with progress_line("build") as progress:
        report = build_engines(opened, request, jobs, progress, inspect)
    if as_json:
        print_json(report.to_json())
        return
    say(*report.text())
    if report.built:
        say(f"{bytes_text(report.bytes)} in {duration(report.seconds)}; next: dydit sample {bundle} --backend {chosen}")
