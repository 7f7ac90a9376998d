"""What the commands share: how labels and sizes are written, common options, and what is said at the end."""

from __future__ import annotations

import functools
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import click
from pydantic import BaseModel

from dydit.bundle.manifest import PlanKind
from dydit.commands.progress import Progress, ProgressLine, ProgressLog
from dydit.errors import BackendError, ConfigError
from dydit.files import user_path, write_atomic
from dydit.models.config import parse_config
from dydit.runtime.backends.registry import require_known
from dydit.training.recipe import Recipe
from dydit.validation import SettingsError

T = TypeVar("T", bound=BaseModel)
MOST_LABELS = 1_000_000
DEFAULT_BACKEND = "onnxruntime"
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
            raise click.BadParameter(f"{part!r} in {text!r} is not a class number; write 207,360 or 0-9")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise click.BadParameter(f"the range {part.strip()} is reversed; write {last}-{first}")
        if len(labels) + last - first >= MOST_LABELS:
            raise click.BadParameter(
                f"{text!r} is more than {MOST_LABELS:,} labels; give fewer, and repeat them with --num"
            )
        labels.extend(range(first, last + 1))
    return tuple(labels)


def parse_bytes(text: str) -> int:
    """`8GiB`, `500MB`, `64kB`: a size in bytes, with its unit."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", text, re.ASCII | re.IGNORECASE)
    if not match or match[2].lower() not in _SPELLINGS:
        raise click.BadParameter(f"{text!r} is not a size; write a number and a unit ({', '.join(BYTE_UNITS)}): 8GiB")
    size = int(Fraction(match[1]) * _SPELLINGS[match[2].lower()])
    if size < 1:
        raise click.BadParameter(f"{text!r} is less than a byte")
    return size


class PathType(click.Path):
    """A path. A leading `~` is expanded here, too: shells leave `--out=~/x` as it is."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return user_path(Path(os.fsdecode(super().convert(value, param, ctx))))


PATH = PathType(path_type=Path)


@contextmanager
def option_names() -> Iterator[None]:
    """Errors about settings in this block name the command's options, as users type them, instead of fields."""
    try:
        yield
    except SettingsError as error:
        parameters = click.get_current_context().command.params
        options = {str(each.name): max(each.opts, key=len) for each in parameters if isinstance(each, click.Option)}
        texts = (problem.text(_option_of(problem.path, options)) for problem in error.problems)
        # Errors that concern several settings name fields in the midst of a sentence.
        fields = re.compile(rf"\b({'|'.join(sorted(filter(lambda name: '_' in name, options))) or '(?!)'})\b")
        raise ConfigError("; ".join(fields.sub(lambda match: options[match[0]], text) for text in texts)) from error


def _option_of(path: tuple[str | int, ...], options: Mapping[str, str]) -> str | None:
    """The option for a field: `search.target.psnr` has `--target-psnr`, `capacity.tile` has `--tile`."""
    names = [part for part in path if isinstance(part, str)]
    return next((options[key] for at in range(len(names)) if (key := "_".join(names[at:])) in options), None)


def parse_options(kind: type[T], values: dict[str, Any]) -> T:
    """A configuration from the values of a command's options."""
    with option_names():
        return parse_config(kind, values)


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
            help="Print no progress and no summary; errors and the output of --json are still printed.",
            **settings,
        ),
        click.Option(
            ["--debug"],
            callback=_switch_debug,
            help="Print the traceback of an error, too. DYDIT_DEBUG=1 does the same.",
            **settings,
        ),
    ]


json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, and nothing else.")

seed_option = click.option("--seed", type=int, default=0, help="Seed for the initial and per-step noise.")

READING = ("num_heads", "weights", "num_classes", "input_size")


def checkpoint_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """How to read a checkpoint that leaves something open; the command gets it as `reading`, for `load_checkpoint`."""

    @functools.wraps(command)
    def with_reading(*arguments: Any, **settings: Any) -> Any:
        return command(*arguments, reading={name: settings.pop(name) for name in READING}, **settings)

    count = click.IntRange(min=1)
    for option in (
        click.option(
            "--input-size", type=count, help="Side of the latents, for a checkpoint that does not contain it."
        ),
        click.option(
            "--num-classes",
            type=count,
            help='Number of classes, not counting the one for "no class", for a checkpoint that does not contain it.',
        ),
        click.option(
            "--weights",
            metavar="ema|model|NAME",
            help="Which weights to read from a file with several: ema, model, or the name of an entry or variant.  "
            "[default: ema if there is one]",
        ),
        click.option(
            "--num-heads", type=count, help="Number of attention heads, for a checkpoint that does not contain it."
        ),
    ):
        with_reading = option(with_reading)
    return with_reading


def cfg_scale_option(default: float) -> Callable[[Any], Any]:
    """`--cfg-scale` with the command's own default."""
    return click.option(
        "--cfg-scale",
        type=float,
        default=default,
        help="Classifier-free guidance scale, from 0. 1 disables guidance and halves the compute.",
    )


def plan_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--per-step`, `--max-subnets`, `--memory-budget` and `--sliding`, of which one may be given."""
    for option in (
        click.option(
            "--sliding",
            is_flag=True,
            help="One graph of dynamic width: each step runs exactly the heads and channel groups that it needs, with "
            "one copy of the weights in memory.",
        ),
        click.option(
            "--memory-budget",
            type=parse_bytes,
            metavar="SIZE",
            help="The fastest plan whose subnetworks fit in SIZE of memory, all loaded at once: 8GiB, 500MB. Memory is "
            "measured with ONNX Runtime on this CPU; where that is not possible, the size of the weights counts.",
        ),
        click.option(
            "--max-subnets",
            type=click.IntRange(min=1),
            metavar="K",
            help="At most K subnetworks, each shared by consecutive steps so that compute is least. The images are the "
            "same as with --per-step.",
        ),
        click.option(
            "--per-step", is_flag=True, help="One subnetwork for every distinct mask: least compute, most memory."
        ),
    ):
        command = option(command)
    return command


def chosen_plan(per_step: bool, max_subnets: int | None, memory_budget: int | None, sliding: bool) -> dict[str, Any]:
    """What `plan_options` come to, as settings of an export; nothing where none is given."""
    if per_step + (max_subnets is not None) + (memory_budget is not None) + sliding > 1:
        raise click.UsageError("give only one of --per-step, --max-subnets, --memory-budget and --sliding")
    if sliding:
        return {"plan": PlanKind.SLIDING}
    if per_step:
        return {"plan": PlanKind.PER_STEP}
    if memory_budget is not None:
        return {"plan": PlanKind.MEMORY_BUDGET, "memory_budget": memory_budget}
    return {} if max_subnets is None else {"plan": PlanKind.MAX_SUBNETS, "max_subnets": max_subnets}


class Command(click.Command):
    """A command that, called with nothing at all, says in one line what it needs."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        required = [each for each in self.params if each.required]
        if required and not args:
            words = [each.make_metavar(ctx) if isinstance(each, click.Argument) else each.opts[0] for each in required]
            raise click.UsageError(f"{ctx.command_path} needs {' and '.join(words)}", ctx)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if error.option_name == "--steps":
                what = "the sampling steps of a bundle are fixed when it is exported: dydit export CHECKPOINT --steps N"
                raise click.UsageError(what, ctx) from error
            raise


class CommandGroup(click.Group):
    """Commands in the order in which they are written; each has the common options, and so has the group."""

    command_class = Command

    def __init__(self, *arguments: Any, **settings: Any):
        super().__init__(*arguments, **settings)
        self.params += common_options()

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # `dydit help sample` is what many people type first.
        return super().parse_args(ctx, [*args[1:], "--help"] if args[:1] == ["help"] else args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def add(self, name: str, short_help: str, **settings: Any) -> Callable[[Callable[..., Any]], click.Command]:
        """Make a function a command."""

        def decorate(function: Callable[..., Any]) -> click.Command:
            made: click.Command = self.command(name, short_help=short_help, **settings)(function)
            made.params += common_options()
            return made

        return decorate


def _known_backend(_: click.Context, __: click.Parameter, value: str) -> str:
    try:
        require_known(value)
    except BackendError as error:
        raise click.BadParameter(str(error)) from error
    return value


def backend_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--backend`, `--device` and `--threads`, for the commands that run a bundle."""
    for option in (
        click.option(
            "--threads",
            type=click.IntRange(min=0),
            default=0,
            help="Number of CPU threads; 0: the backend's default.",
        ),
        click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", help="Device to run on."),
        click.option(
            "--backend",
            default=DEFAULT_BACKEND,
            callback=_known_backend,
            metavar="[onnxruntime|torch|tensorrt|tensorrt-rtx]",
            help="Library that runs the bundle. `dydit doctor` says which work on this machine; the last two need a "
            "GPU and the engines of `dydit build`.",
        ),
    ):
        command = option(command)
    return command


@contextmanager
def progress_line(title: str) -> Iterator[Progress | None]:
    """Progress for the time of a block: a line on a terminal, now and then a line in a log, None with `--quiet`."""
    if click.get_current_context().ensure_object(Settings).quiet:
        yield None
        return
    line = ProgressLine(title) if sys.stderr.isatty() else ProgressLog(title)
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


def print_json(value: Any) -> None:
    """`value` as JSON on standard output."""
    click.echo(json.dumps(value, indent=2, allow_nan=False))


def recipe_settings() -> str:
    """The settings of a recipe, one a line, with their defaults and meanings."""
    lines = []
    for name, field in Recipe.model_fields.items():
        default = "(set by the recipe)" if field.is_required() else json.dumps(field.default)
        lines.append(f"  {name} {default}{': ' + field.description if field.description else ''}")
    return "\n".join(lines)
