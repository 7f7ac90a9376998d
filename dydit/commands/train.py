"""`dydit train`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from dydit.commands.group import Command
from dydit.commands.options import PATH
from dydit.commands.output import say
from dydit.commands.progress import show_progress
from dydit.commands.suggestions import next_line
from dydit.diffusion.process import NoiseSchedule, Prediction
from dydit.extras import CHECKPOINTS, require
from dydit.training.recipe import RECIPES, Recipe
from dydit.words import counted, duration


def recipe_settings() -> str:
    """The settings of a recipe, one a line, with their defaults and meanings."""
    lines = []
    for name, field in Recipe.model_fields.items():
        default = "(set by the recipe)" if field.is_required() else json.dumps(field.default)
        lines.append(f"  {name} {default}{': ' + field.description if field.description else ''}")
    return "\n".join(lines)


@click.command(
    cls=Command, epilog=f"\b\nSettings and their defaults (a recipe may set other defaults):\n{recipe_settings()}"
)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--recipe",
    type=click.Choice(tuple(RECIPES)),
    required=True,
    help="What to train. digits consists of three runs: a static model, a dynamic model that starts from its weights, "
    "and a last run whose gates decide as they do at inference. digits-static, digits-dynamic and digits-settle are "
    "these runs one by one.",
)
@click.option(
    "--out", type=PATH, required=True, help="Folder for the run. Must be empty or absent, unless --resume is given."
)
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
def command(
    overrides: tuple[str, ...], recipe: str, out: Path, resume: bool, schedule: str | None, prediction: str | None
) -> None:
    """Train a model with a recipe, on the CPU or the GPUs of this machine.

    KEY=VALUE changes a setting, for example iterations=100 or model.depth=4. For a recipe of several runs,
    static.KEY=VALUE, dynamic.KEY=VALUE or settle.KEY=VALUE changes the setting in one run only. Writes
    model.safetensors, train.json, log.jsonl and curves.png.
    """
    require("dydit train", [*CHECKPOINTS, "accelerate", "sklearn", "matplotlib"])
    from dydit.training.recipe import find_recipes
    from dydit.training.sequence import train_sequence

    process = {"schedule": schedule, "prediction": prediction}
    stated = [f"model.process.{name}={value}" for name, value in process.items() if value is not None]
    recipes = find_recipes(recipe, [*overrides, *stated])
    with show_progress("train") as progress:
        results = train_sequence(recipes, out, resume, progress)
    for result in results:
        iterations = counted(result.summary["iterations"], "iteration")
        note = f"; {result.note}" if result.note else ""
        say(f"{result.model}: {iterations} in {duration(result.summary['seconds'])}{note}")
    say(next_line("export", results[-1].model, "--out", "BUNDLE"))
