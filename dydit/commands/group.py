"""The group `dydit` and its commands: found by name, imported on demand, with the options that every command has."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import click

from dydit import __version__


@dataclass
class Settings:
    """What holds for a whole call of `dydit`.

    `debug`: print tracebacks of errors. `quiet`: print no progress and no summary.
    """

    debug: bool = False
    quiet: bool = False


def _set(context: click.Context, option: click.Parameter, value: bool) -> None:
    if value:
        setattr(context.ensure_object(Settings), str(option.name), True)


def common_options() -> list[click.Parameter]:
    """`--quiet` and `--debug`, which `dydit` and every command of it accept."""
    helps = {
        ("-q", "--quiet"): "Print no progress and no summary. Errors and the output of --json are still printed.",
        ("--debug",): "Also print the traceback of an error. DYDIT_DEBUG=1 does the same.",
    }
    return [
        click.Option(names, is_flag=True, is_eager=True, expose_value=False, callback=_set, help=text)
        for names, text in helps.items()
    ]


class Command(click.Command):
    """A command with the common options. Called without arguments, it says in one line which ones it needs."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.params += common_options()

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        required = [each for each in self.params if each.required]
        if required and not args:
            words = [each.make_metavar(ctx) if isinstance(each, click.Argument) else each.opts[0] for each in required]
            raise click.UsageError(f"{ctx.command_path} needs {' and '.join(words)}", ctx)
        return super().parse_args(ctx, args)


class Commands(Mapping[str, click.Command]):
    """The commands by name. A command's module is imported when the command is looked up."""

    def __init__(self, modules: Mapping[str, tuple[str, str]]):
        self._modules = modules

    def __getitem__(self, name: str) -> click.Command:
        module, _ = self._modules[name]
        command: click.Command = importlib.import_module(module).command
        return command

    def __contains__(self, name: object) -> bool:
        return name in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)


class CommandGroup(click.Group):
    """The group `dydit`. `modules`: for each command its module and its line of help, in the order of the help."""

    def __init__(self, modules: Mapping[str, tuple[str, str]], help: str):
        super().__init__(
            "dydit",
            commands=cast(dict[str, click.Command], Commands(modules)),
            help=help,
            context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110, "show_default": True},
        )
        version = click.version_option(__version__, message="dydit %(version)s")
        version(self)
        self.params += common_options()
        self._modules = modules

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # `dydit help sample` is what many people type first.
        return super().parse_args(ctx, [*args[1:], "--help"] if args[:1] == ["help"] else args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._modules)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in self._modules.items()])
