"""Values that options do not take are refused in plain words that name the option as it was typed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

import dydit
from dydit.cli import cli
from dydit.training.recipe import Recipe
from dydit.training.recipe_files import TEXTS

DIGITS = Path(dydit.__file__).parent / "assets" / "digits" / "dydit.safetensors"
PRIVATE = re.compile(r"Input|should|Value error|Config\b|Request\b|pydantic|validation error|\w_\w")
# What each command needs besides the option that is wrong, so that the value is judged.
BASE: dict[str, list[str]] = {
    "quickstart": [],
    "convert": ["MODEL"],
    "calibrate": ["MODEL"],
    "export": ["MODEL"],
    "sample": ["BUNDLE", "--labels", "0"],
    "parity": ["BUNDLE", "--against", "MODEL"],
    "bench": ["BUNDLE"],
    "inspect": ["MODEL"],
    "build": ["BUNDLE", "--flavour", "tensorrt-rtx"],
    "train": ["--recipe", "digits"],
}
WITH = {
    "--percentile": ["--activations", "percentile"],
    "--target-psnr": ["--activations", "minmax"],
    "--target-fd-ratio": ["--activations", "minmax", "--reference", "MODEL"],
    "--search-images": ["--activations", "minmax", "--target-psnr", "30"],
    "--search-steps": ["--activations", "minmax", "--target-psnr", "30"],
    "--vae-tile": ["--vae", "FOLDER"],
}
NO_NUMBERS = (click.Path, click.types.BoolParamType)


def bad_values() -> Iterator[tuple[str, str, str]]:
    """(command, option, a value that it does not take) for every option of every command that takes a value."""
    for name, command in cli.commands.items():
        for option in command.params:
            if isinstance(option, click.Option) and not option.is_flag and not isinstance(option.type, NO_NUMBERS):
                is_number = isinstance(option.type, click.types.IntParamType | click.types.FloatParamType)
                is_text = isinstance(option.type, click.types.StringParamType)
                values = ["-1", "many", "", "1e999"] if is_number else [] if is_text else ["nonsense", ""]
                values += ["nan"] * isinstance(option.type, click.types.FloatParamType)
                values = [value for value in values if (option.name, value) != ("vae_shift", "-1")]
                yield from ((name, max(option.opts, key=len), value) for value in values)


@pytest.fixture(scope="session")
def digits_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from dydit.cli import main

    out = tmp_path_factory.mktemp("digits") / "bundle"
    assert main(["export", str(DIGITS), "--steps", "2", "--out", str(out), "--quiet"]) == 0
    return out


def test_there_is_a_value_for_every_kind_of_option() -> None:
    tried = {(command, option) for command, option, _ in bad_values()}
    assert {command for command, _ in tried} == set(cli.commands) - {"doctor"} and len(tried) > 60
    assert {("sample", "--cfg-scale"), ("calibrate", "--tile"), ("export", "--precision")} <= tried


@pytest.mark.parametrize("command", BASE)
def test_a_bad_value_is_refused_with_the_option_that_has_it(run, digits_bundle, tmp_path: Path, command: str) -> None:
    places = {"MODEL": DIGITS, "BUNDLE": digits_bundle, "FOLDER": tmp_path}
    for name, option, value in bad_values():
        if name == command:
            out = [] if command == "build" else ["--out", tmp_path / "out.json"]
            words = [places.get(word, word) for word in (*BASE[command], *WITH.get(option, []))]
            done = run(command, *words, f"{option}={value}", *out)
            case = f"{command} {option}={value}: {done}"
            assert done.code == 2 and done.out == "" and done.err.count("\n") == 1, case
            assert option in done.err and not PRIVATE.search(done.err), case
            assert not (tmp_path / "out.json").exists(), case


@pytest.mark.parametrize("name", [name for name in Recipe.model_fields if name not in (*TEXTS, "name")])
def test_a_bad_setting_of_a_recipe_is_called_what_it_was_called(run, tmp_path: Path, name: str) -> None:
    value = "{}" if name in ("betas", "trackers") else "[]"  # a list is wrong for all others
    done = run("train", "--recipe", "digits-static", f"{name}={value}", "--out", tmp_path / "out")
    assert done.code == 2 and done.err.count("\n") == 1, done
    assert re.search(rf"\b{name} must be", done.err) and not re.search("Input|should|Recipe", done.err), done.err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["sample", "x", "--labels", "0", "--cfg-scale", "-1"], "--cfg-scale must be at least 0, not -1"),
        (["parity", "x", "--against", "y", "--cfg-scale", "inf"], "--cfg-scale must be a finite number, not inf"),
        (["calibrate", "x", "--tile", "0"], "--tile must be at least 1, not 0"),
        (["calibrate", "x", "--batch-size", "4", "--batch-size", "0"], "--batch-size must be at least 1, not 0"),
        (
            ["calibrate", "x", "--activations", "mse", "--target-psnr", "-4"],
            "--target-psnr must be greater than 0, not -4",
        ),
        (["calibrate", "x", "--margin", "-1", "--tile", "0"], "--margin must be at least 0, not -1; --tile must be"),
    ],
)
def test_words(run, tmp_path: Path, arguments: list[Any], text: str) -> None:
    done = run(*arguments, "--out", tmp_path / "out.json")
    assert done.code == 2 and done.err.startswith(f"dydit: error: {text}")
