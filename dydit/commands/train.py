"""`dydit train`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from dydit.commands.group import Command
from dydit.commands.options import PATH
from dydit.commands.output import say
from dydit.commands.progress import show_progress
from dydit.commands.suggestions import after_training
from dydit.diffusion.process import NoiseSchedule, Prediction
from dydit.extras import CHECKPOINTS, require
from dydit.training.recipe import Precision, Recipe
from dydit.training.recipe_files import descriptions, find_recipes, recipe_text
from dydit.words import counted, duration


def recipe_settings() -> str:
    """The settings of a recipe, one a line, with their defaults and meanings."""
    lines = []
    for name, field in Recipe.model_fields.items():
        default = "(set by the recipe)" if field.is_required() else json.dumps(field.default)
        lines.append(f"  {name} {default}{': ' + field.description if field.description else ''}")
    return "\n".join(lines)


class _UnlessDry(click.Option):
    """An option that is required, unless --dry-run is given."""

    def process_value(self, ctx: click.Context, value: Any) -> Any:
        if ctx.params.get("dry_run") and self.value_is_missing(value):
            return None
        return super().process_value(ctx, value)


def _list_recipes(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked:
        lines = descriptions()
        width = max(map(len, lines))
        for name, line in lines.items():
            click.echo(f"{name:{width}}  {line}")
        ctx.exit()


def _show_recipe(ctx: click.Context, _: click.Parameter, name: str | None) -> None:
    if name is not None:
        click.echo(recipe_text(name), nl=False)
        ctx.exit()


@click.command(
    cls=Command, epilog=f"\b\nSettings and their defaults (a recipe may set other defaults):\n{recipe_settings()}"
)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--recipe",
    required=True,
    metavar="NAME|FILE",
    help="What to train: a recipe of dydit (see --list-recipes), or a TOML file, whose path has a / or ends in .toml. "
    "A recipe may consist of several runs: digits trains a static model, a dynamic model that starts from its weights, "
    "and in a last run the same with gates that decide as they do at inference. digits-static, digits-dynamic and "
    "digits-settle are these runs one by one.",
)
@click.option(
    "--out",
    cls=_UnlessDry,
    type=PATH,
    required=True,
    help="Folder for the run. Must be empty or absent, unless --resume is given.",
)
@click.option("--data", metavar="NAME|FOLDER", help="Data to train on, the same as data=...")
@click.option("--init", metavar="CHECKPOINT", help="Checkpoint to start from, the same as init=...")
@click.option(
    "--resume",
    is_flag=True,
    help="Continue the run in --out from its last saved state. A larger iterations=N makes the run longer.",
)
@click.option(
    "--schedule",
    type=click.Choice([each.value for each in NoiseSchedule]),
    help="How noise is added in training, the same as model.process.schedule=... Default: that of the checkpoint init, "
    "or of published models: linear for a DiT, vp-sde for a U-ViT. flow is the flow matching of SiT.",
)
@click.option(
    "--prediction",
    type=click.Choice([each.value for each in Prediction]),
    help="What the model predicts, the same as model.process.prediction=... Default: that of the checkpoint init, or "
    "epsilon. A flow predicts velocity.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    is_eager=True,
    help="Print the data, the model, the schedule, and estimates of memory and time, and write nothing. The time is "
    "estimated from a few steps of a small part of the model on this machine.",
)
@click.option(
    "--list-recipes",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_list_recipes,
    help="List the recipes of dydit, and exit.",
)
@click.option(
    "--show-recipe",
    is_eager=True,
    expose_value=False,
    callback=_show_recipe,
    metavar="NAME",
    help="Print the file of a recipe, to be copied and changed, and exit.",
)
def command(
    overrides: tuple[str, ...],
    recipe: str,
    out: Path | None,
    data: str | None,
    init: str | None,
    resume: bool,
    schedule: str | None,
    prediction: str | None,
    dry_run: bool,
) -> None:
    """Train a model with a recipe, on the CPU or the GPUs of this machine.

    KEY=VALUE changes a setting, for example iterations=100 or model.depth=4. For a recipe of several runs,
    static.KEY=VALUE, dynamic.KEY=VALUE or settle.KEY=VALUE changes the setting in one run only. Writes
    model.safetensors, train.json, log.jsonl and curves.png.
    """
    require("dydit train", [*CHECKPOINTS, "accelerate", "sklearn", "matplotlib"])
    stated = _as_overrides(
        {"data": data, "init": init, "model.process.schedule": schedule, "model.process.prediction": prediction}
    )
    recipes = find_recipes(recipe, [*overrides, *stated], data_needed=not dry_run)
    if dry_run:
        from dydit.training.dry_run import describe

        click.echo("\n".join(filter(None, [*describe(recipes), _speed_note(recipes)])))
        return
    assert out is not None
    from dydit.training.sequence import train_sequence
    from dydit.training.start import start_note

    with show_progress("train") as progress:
        for note in (start_note(recipes[0]), _speed_note(recipes)):
            if note:
                progress.note(note)
        results = train_sequence(recipes, out, resume, progress)
    for result in results:
        iterations = counted(result.summary["iterations"], "iteration")
        note = f"; {result.note}" if result.note else ""
        say(f"{result.model}: {iterations} in {duration(result.summary['seconds'])}{note}")
    say(*after_training(results[-1].model, recipes[-1]))


def _speed_note(recipes: Sequence[Recipe]) -> str:
    """What is slow about a run in bf16 where there is only a CPU without instructions for it; empty otherwise."""
    import torch

    from dydit.runtime.backends.instruction_sets import multiplies

    is_bf16 = any(each.precision is Precision.BF16 for each in recipes)
    if not is_bf16 or torch.cuda.is_available() or multiplies("bfloat16"):
        return ""
    return "this CPU has no instructions for bf16: steps can take many times as long as with precision=fp32"


def _as_overrides(values: Mapping[str, str | None]) -> list[str]:
    return [f"{name}={value}" for name, value in values.items() if value is not None]
