"""What the commands share: how labels and sizes are written, options that every command has, and the progress line."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from dydit.bundle.manifest import Manifest, PlanKind, Routing
from dydit.bundle.stored import Precision
from dydit.calibrate.file import Calibration, read_calibration
from dydit.files import user_path, write_atomic
from dydit.training.recipe import Recipe

MOST_LABELS = 1_000_000
BYTE_UNITS = {
    "B": 1,
    **{f"{letter}B": 1000**power for power, letter in enumerate("kMGT", 1)},
    **{f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", 1)},
}
_SPELLINGS = {unit.lower(): size for unit, size in BYTE_UNITS.items()}


@dataclass
class Settings:
    """What holds for a whole call of `dydit`: tracebacks or one line, progress or none."""

    debug: bool = False
    quiet: bool = False


def parse_labels(text: str) -> tuple[int, ...]:
    """`207,360` or `0-9` or both: class numbers, in the order written."""
    labels: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?", part, re.ASCII)
        if not match:
            raise click.BadParameter(f"{part!r} in {text!r} is no class; write 207,360 or 0-9")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise click.BadParameter(f"the range {part.strip()} runs backwards; write {last}-{first}")
        if len(labels) + last - first >= MOST_LABELS:
            raise click.BadParameter(
                f"{text!r} is more than {MOST_LABELS} labels; give fewer, and repeat them with --num"
            )
        labels.extend(range(first, last + 1))
    return tuple(labels)


def parse_bytes(text: str) -> int:
    """`8GiB`, `500MB`, `64kB`: a size in bytes, with its unit."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", text, re.ASCII | re.IGNORECASE)
    if not match or match[2].lower() not in _SPELLINGS:
        raise click.BadParameter(f"{text!r} is no size; write a number and its unit, {', '.join(BYTE_UNITS)}: 8GiB")
    size = int(Fraction(match[1]) * _SPELLINGS[match[2].lower()])
    if size < 1:
        raise click.BadParameter(f"{text!r} is less than a byte")
    return size


def parse_guided_channels(text: str) -> int:
    """A number of latent channels; 0 stands for `all`."""
    if text == "all":
        return 0
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII) or int(text) < 1:
        raise click.BadParameter(f"{text!r} is neither a number of channels, from 1, nor `all`")
    return int(text)


class _UserPath(click.Path):
    """A path whose `~` the shell did not replace, as in `--out=~/bundle`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return user_path(Path(os.fsdecode(super().convert(value, param, ctx))))


PATH = _UserPath(path_type=Path)


def labels_option(help: str, default: str | None = None) -> Callable[[Any], Any]:
    """`--labels`, which may be given several times; the command gets all of them as one tuple."""

    def joined(_: click.Context, __: click.Parameter, values: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
        return tuple(label for labels in values for label in labels)

    return click.option(
        "--labels",
        type=parse_labels,
        multiple=True,
        default=[default] if default else None,
        callback=joined,
        metavar="LABELS",
        help=help,
    )


def _switch_debug(context: click.Context, _: click.Parameter, value: bool) -> None:
    context.ensure_object(Settings).debug |= value


def _switch_quiet(context: click.Context, _: click.Parameter, value: bool) -> None:
    context.ensure_object(Settings).quiet |= value


def common_options() -> list[click.Parameter]:
    """`--quiet` and `--debug`, which every command has, and `dydit` itself."""
    settings: dict[str, Any] = {"is_flag": True, "is_eager": True, "expose_value": False}
    return [
        click.Option(
            ["-q", "--quiet"],
            callback=_switch_quiet,
            help="No progress and no closing words; errors and --json still show.",
            **settings,
        ),
        click.Option(
            ["--debug"],
            callback=_switch_debug,
            help="Show the traceback of an error, too; so does DYDIT_DEBUG=1.",
            **settings,
        ),
    ]


json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, and nothing else.")


heads_option = click.option(
    "--num-heads", type=click.IntRange(min=1), help="Attention heads, for a file that does not tell."
)


def plan_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--per-step`, `--max-subnets`, `--memory-budget` and `--sliding`, of which one may be given."""
    for option in (
        click.option(
            "--sliding",
            is_flag=True,
            help="One graph for every width: least compute, one copy of the weights; each step runs exactly its units.",
        ),
        click.option(
            "--memory-budget",
            type=parse_bytes,
            metavar="SIZE",
            help="As many subnetworks as fit in SIZE, all loaded at once: 8GiB, 500MB. Memory is measured on ONNX "
            "Runtime on this CPU; where that cannot be, bytes of weights count.",
        ),
        click.option(
            "--max-subnets",
            type=click.IntRange(min=1),
            metavar="K",
            help="At most K subnetworks, at the least compute; the images stay the same.",
        ),
        click.option(
            "--per-step", is_flag=True, help="A subnetwork for every distinct mask: least compute, most memory."
        ),
    ):
        command = option(command)
    return command


def chosen_plan(per_step: bool, max_subnets: int | None, memory_budget: int | None, sliding: bool) -> dict[str, Any]:
    """What `plan_options` come to, as settings of an export; nothing where none is given."""
    if per_step + (max_subnets is not None) + (memory_budget is not None) + sliding > 1:
        raise click.UsageError("--per-step, --max-subnets, --memory-budget and --sliding exclude each other")
    if sliding:
        return {"plan": PlanKind.SLIDING}
    if per_step:
        return {"plan": PlanKind.PER_STEP}
    if memory_budget is not None:
        return {"plan": PlanKind.MEMORY_BUDGET, "memory_budget": memory_budget}
    return {} if max_subnets is None else {"plan": PlanKind.MAX_SUBNETS, "max_subnets": max_subnets}


def _read_calibration(_: click.Context, __: click.Parameter, path: Path | None) -> Calibration | None:
    return None if path is None else read_calibration(path)


def graph_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--routing`, `--calibration` and `--precision`: what the graphs of an export are made of."""
    for option in (
        click.option(
            "--precision",
            type=click.Choice([each.value for each in Precision]),
            default=Precision.FP32.value,
            help="Type of matrix products, attention and their weights; residual stream, routers and sampler stay "
            "fp32. fp32: as the checkpoint; fp16: half the size, for TensorRT and ONNX Runtime; bf16: as small, with "
            "the range of fp32 and fewer digits, for TensorRT and PyTorch, not for ONNX Runtime on the CPU; int8: "
            "linear layers in 8 bits, each token with its own scale, the fastest of ONNX Runtime on the CPU; "
            "int8-static, fp8: 8 bits with scales from --calibration, for TensorRT, and for ONNX Runtime.",
        ),
        click.option(
            "--calibration",
            type=PATH,
            callback=_read_calibration,
            metavar="FILE",
            help="With --routing capacity: what `dydit calibrate` found for this checkpoint, run and plan.",
        ),
        click.option(
            "--routing",
            type=click.Choice([each.value for each in Routing]),
            default=Routing.DYNAMIC.value,
            help="How tokens skip the MLP. dynamic: shapes depend on the data, least compute, not for TensorRT for "
            "RTX; capacity: fixed shapes, with the slots that --calibration says, else one for every token; dense: all "
            "are computed, then masked (the yardstick).",
        ),
    ):
        command = option(command)
    return command


def vae_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--vae` and `--vae-tile`, the decoder of a latent model's bundle."""
    for option in (
        click.option(
            "--vae-tile",
            type=click.IntRange(min=1),
            metavar="N",
            help="Side of the latents that are decoded at once; more are decoded in overlapping tiles.  [default: all, "
            "up to 64]",
        ),
        click.option(
            "--vae",
            metavar="SOURCE",
            help="For a model of latents: the AutoencoderKL whose decoder the bundle gets, as a folder that diffusers "
            "saved, or a hub name, which is downloaded.",
        ),
    ):
        command = option(command)
    return command


class CommandGroup(click.Group):
    """Commands in the order in which they are written; each has the common options, and so has the group."""

    def __init__(self, *arguments: Any, **settings: Any):
        super().__init__(*arguments, **settings)
        self.params += common_options()

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def add(self, name: str, short_help: str, **settings: Any) -> Callable[[Callable[..., Any]], click.Command]:
        """Make a function a command."""

        def decorate(function: Callable[..., Any]) -> click.Command:
            made: click.Command = self.command(name, short_help=short_help, **settings)(function)
            made.params += common_options()
            return made

        return decorate


def backend_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--backend`, `--device` and `--threads`, for the commands that run a bundle."""
    for option in (
        click.option(
            "--threads",
            type=click.IntRange(min=0),
            default=0,
            help="CPU threads; 0 leaves the choice to the backend.",
        ),
        click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", help="Where to run."),
        click.option(
            "--backend",
            default="onnxruntime",
            metavar="[onnxruntime|torch]",
            help="What runs the subnetworks; `dydit doctor` says which work here.",
        ),
    ):
        command = option(command)
    return command


class ProgressLine:
    """One line on standard error that is written over: what is done, of how much, how long it will still take."""

    def __init__(self, title: str):
        self._title, self._started, self._shown, self._first = title, time.monotonic(), 0.0, 0
        self._total, self._width = 0, 0

    def __call__(self, done: int, total: int, details: Mapping[str, Any] | None = None) -> None:
        """Show `done` of `total`, ten times a second at most."""
        now = time.monotonic()
        if total != self._total or done < self._first:
            self._total, self._started, self._first = total, now, done
        if done < total and now - self._shown < 0.1:
            return
        self._shown = now
        line = f"{self._title}: {done}/{total} ({100 * done // max(1, total)} %)"
        if self._first < done < total:
            line += f", {duration((now - self._started) * (total - done) / (done - self._first))} left"
        sys.stderr.write(f"\r{line:<{self._width}}")
        sys.stderr.flush()
        self._width = len(line)

    def stage(self, title: str, done: int, total: int) -> None:
        """The same, for one of several stages."""
        if title != self._title:
            self._title, self._total = title, 0
        self(done, total)

    def close(self) -> None:
        """Wipe the line, so that what follows starts at the margin."""
        sys.stderr.write("\r" + " " * self._width + "\r")
        sys.stderr.flush()


@contextmanager
def progress_line(title: str) -> Iterator[ProgressLine | None]:
    """A progress line for the time of a block; None where standard error is no terminal, or with `--quiet`."""
    if click.get_current_context().ensure_object(Settings).quiet or not sys.stderr.isatty():
        yield None
        return
    line = ProgressLine(title)
    try:
        yield line
    finally:
        line.close()


def say(*lines: str) -> None:
    """Closing words for a person: where the result is, what to do next. Silent with `--quiet`."""
    if not click.get_current_context().ensure_object(Settings).quiet:
        for line in lines:
            click.echo(line)


def note(line: str) -> None:
    """A line for a person while a command is at work, on standard error. Silent with `--quiet`."""
    if not click.get_current_context().ensure_object(Settings).quiet:
        click.echo(line, err=True)


def draw(picture: Callable[[Any], bytes], result: Any, path: Path) -> None:
    """Write the picture of a result, where matplotlib is there to draw it; the result does not depend on it."""
    if find_spec("matplotlib") is not None:
        write_atomic(path, picture(result))


def say_files(folder: Path) -> None:
    """Closing words: what is in a folder now."""
    say(f"{folder}: {', '.join(sorted(file.name for file in folder.iterdir())) or 'nothing'}")


def next_commands(manifest: Manifest, bundle: Path, checkpoint: Path) -> str:
    """Closing words after an export: commands that work with a bundle of this kind."""
    backend = " --backend torch" if manifest.precision is Precision.BF16 else ""
    return (
        f"Next: dydit sample {bundle} --labels 0{backend} --out SAMPLES, dydit parity {bundle} --against {checkpoint}"
        f"{backend} --out PARITY"
    )


def print_json(value: Any) -> None:
    """`value` as JSON on standard output."""
    click.echo(json.dumps(value, indent=2, allow_nan=False))


def duration(seconds: float) -> str:
    """`12 s`, `3:07 min` or `2:05 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"


def recipe_settings() -> str:
    """The settings of a recipe, one a line, with their defaults and meanings."""
    lines = []
    for name, field in Recipe.model_fields.items():
        default = "(set by the recipe)" if field.is_required() else json.dumps(field.default)
        lines.append(f"  {name} {default}{': ' + field.description if field.description else ''}")
    return "\n".join(lines)
