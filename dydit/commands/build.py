"""`dydit build`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dydit.commands.group import Command
from dydit.commands.options import PATH, json_option, option_names
from dydit.commands.output import print_json, say
from dydit.commands.progress import show_progress
from dydit.commands.suggestions import guidance_words, label_words, next_line
from dydit.engines.fingerprint import HardwareCompatibility
from dydit.engines.flavour import Flavour, default_flavour, installed_version, present_gpu
from dydit.extras import require
from dydit.reports.text import bytes_text
from dydit.words import duration


@click.command(cls=Command)
@click.argument("bundle", type=PATH)
@click.option(
    "--flavour",
    type=click.Choice([each.value for each in Flavour]),
    help="Which TensorRT to build with. tensorrt builds on the GPU that will run the engines. tensorrt-rtx is for RTX "
    "GPUs, and builds without a GPU.  [default: the one that is installed]",
)
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=1,
    help="Number of engines to build in parallel. For DiT-XL/2 each build takes about 4 GB of memory.",
)
@click.option(
    "--max-batch", type=click.IntRange(min=1), help="Largest batch size, in images.  [default: that of the bundle]"
)
@click.option(
    "--opt-batch",
    "opt_batches",
    type=click.IntRange(min=1),
    multiple=True,
    help="Batch size, in images, that the engines are tuned for. Repeatable: kernels are chosen for each of them, "
    "which takes time to build.  [default: 1, the largest, and one between them; below 8 the largest alone]",
)
@click.option(
    "--compute-capability",
    "compute_capabilities",
    multiple=True,
    metavar="X.Y",
    help="With tensorrt-rtx: a compute capability to build for. Repeatable.  [default: all that it can build for]",
)
@click.option(
    "--hardware-compatibility",
    type=click.Choice([each.value for each in HardwareCompatibility]),
    default=HardwareCompatibility.NONE.value,
    help="With tensorrt: which other GPUs the engines can also run on. Such engines are somewhat slower.",
)
@click.option(
    "--version-compatible",
    is_flag=True,
    help="With tensorrt: build engines that later releases of the same major version can also run.",
)
@click.option(
    "--inspect/--no-inspect",
    default=True,
    help="Fail if an engine's kernels are not in the precision of the bundle, or if attention is not fused. With "
    "tensorrt this needs a GPU that the engines run on.",
)
@json_option
def command(bundle: Path, flavour: str | None, jobs: int, inspect: bool, as_json: bool, **settings: Any) -> None:
    """Build the TensorRT engines of a bundle into its folder. Engines that are up to date are not built again.

    An engine runs with one TensorRT version, on the GPUs that it was built for. Run the same command again to resume an
    interrupted build.
    """
    chosen = Flavour(flavour) if flavour else default_flavour()
    require("dydit build", [chosen.module, "polygraphy", "onnx"], brought_by=chosen.value)
    from dydit.bundle.bundle import Bundle
    from dydit.engines.bundle_engines import build_engines
    from dydit.engines.fingerprint import make_request

    opened = Bundle.open(bundle)
    with option_names():
        request = make_request(opened.manifest, chosen, installed_version(chosen), present_gpu(), **settings)
    with show_progress("build") as progress:
        report = build_engines(opened, request, jobs, progress, inspect)
    if as_json:
        print_json(report.to_json())
        return
    say(*report.text())
    if report.built:
        model = opened.manifest.model
        run_words = [*label_words(model), *guidance_words(model)]
        say(
            f"{bytes_text(report.bytes)} in {duration(report.seconds)}",
            next_line("sample", bundle, *run_words, "--backend", chosen.value, "--out", "SAMPLES"),
        )
