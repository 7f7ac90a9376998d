"""How a model was trained: given as options, kept by convert and export, shown, and compared with what files state."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import click
import pytest
import torch

from dydit.bundle.bundle import Bundle
from dydit.checkpoints.checkpoint import load_checkpoint
from dydit.commands.options import parse_betas
from dydit.commands.suggestions import reading_words
from dydit.diffusion.process import Process
from dydit.errors import ConfigError
from dydit.training.start import starting_model

FLOW, V = Process(schedule="flow", prediction="velocity"), Process(prediction="v", schedule="cosine")
AS_V = ["--prediction", "v", "--schedule", "cosine"]
SHORT = ["--steps", 3, "--max-subnets", 2]


@pytest.fixture(scope="module")
def bare(make_checkpoint) -> Path:
    """A checkpoint in our format that does not state how it was trained."""
    return make_checkpoint().path


@pytest.fixture(scope="module")
def sit(make_checkpoint, tmp_path_factory) -> Path:
    """A file as SiT's training writes it."""
    checkpoint, path = make_checkpoint(), tmp_path_factory.mktemp("sit") / "0400000.pt"
    arguments = argparse.Namespace(model="SiT-XL/2", path_type="Linear", prediction="velocity", loss_weight=None)
    torch.save({"model": checkpoint.state, "ema": checkpoint.state, "args": arguments}, path)
    return path


def training_lines(run: Any, *arguments: object) -> list[str]:
    """What `dydit inspect` shows beside `training`: a line, and one more where it is assumed."""
    lines = run("inspect", *arguments).out.splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith("training "))
    count = next(index for index, line in enumerate(lines[first + 1 :], 1) if not line.startswith(" "))
    return [line.removeprefix("training").strip() for line in lines[first : first + count]]


def training_line(run: Any, *arguments: object) -> str:
    (line,) = training_lines(run, *arguments)
    return f"training  {line}"


def assert_refused(done: Any, *words: str) -> None:
    assert done.code == 2 and done.out == "", done
    assert done.err.startswith("dydit: error: ") and done.err.count("\n") == 1, done.err
    for word in words:
        assert word in done.err, done.err


def test_betas() -> None:
    assert parse_betas("0.0001,0.02") == (0.0001, 0.02) and parse_betas(" 1e-4, 2e-2") == (0.0001, 0.02)
    for text in ("", "0.1", "a,b", "1,2,3"):
        with pytest.raises(click.BadParameter, match=r"is not two numbers; write START,END"):
            parse_betas(text)


def test_suggested_commands_repeat_the_options() -> None:
    reading = {"num_heads": None, "prediction": "v", "schedule": "scaled-linear", "betas": (0.0015, 0.0195)}
    words = ["--prediction", "v", "--schedule", "scaled-linear", "--betas", "0.0015,0.0195"]
    assert reading_words(reading) == words


def test_what_nothing_states_is_shown_as_assumed(run, bare: Path, tmp_path: Path) -> None:
    process = "predicts epsilon; linear betas from 0.0001 to 0.02"
    assert training_lines(run, bare) == [
        process,
        "assumed: the file does not state it; change it with --prediction and --schedule",
    ]
    said = json.loads(run("inspect", bare, "--json").out)["model"]
    assert said["process_assumed"] and said["process"] == json.loads(Process().model_dump_json())
    assert "process" not in said["config"]
    assert run("export", bare, *SHORT, "--out", tmp_path / "bundle").code == 0
    assert training_lines(run, tmp_path / "bundle") == [
        process,
        "assumed: its checkpoint did not state it; export again with --prediction and --schedule",
    ]
    assert "process" not in json.loads((tmp_path / "bundle" / "manifest.json").read_text())["model"]


def test_what_is_given_is_shown(run, bare: Path) -> None:
    assert training_line(run, bare, *AS_V).endswith("  predicts v; cosine betas")
    said = json.loads(run("inspect", bare, "--schedule", "flow", "--json").out)["model"]
    assert not said["process_assumed"] and said["process"] == json.loads(FLOW.model_dump_json())
    assert training_line(run, bare, "--schedule", "vp-sde", "--betas", "0.2,10").endswith(
        "VP-SDE with beta from 0.2 to 10"
    )


def test_convert_states_it_for_good(run, bare: Path, tmp_path: Path) -> None:
    stated, again = tmp_path / "v.safetensors", tmp_path / "again.safetensors"
    done = run("convert", bare, *AS_V, "--out", stated)
    assert done.code == 0 and "The model predicts v; cosine betas" in done.out.splitlines()
    assert run("convert", stated, "--prediction", "v", "--out", again).code == 0, "the same may be given again"
    assert load_checkpoint(again).config.process == V
    assert training_line(run, again).endswith("  predicts v; cosine betas")
    for command in (["convert", "--out", tmp_path / "x"], ["inspect"], ["export", "--out", tmp_path / "x"]):
        done = run(command[0], stated, *command[1:], "--prediction", "epsilon")
        assert_refused(
            done, f"{stated}: was trained in another way than --prediction epsilon: it states prediction v; "
        )
    assert not (tmp_path / "x").exists()
    assert_refused(
        run("inspect", bare, "--prediction", "v", "--schedule", "flow"), "cannot be combined with prediction v"
    )
    assert_refused(run("inspect", bare, "--betas", "0.1"), "'0.1' is not two numbers")
    assert_refused(
        run("inspect", bare, "--prediction", "noise"), "'noise' is not one of 'epsilon', 'x0', 'v', 'velocity'"
    )


def test_half_of_it_is_said_to_be_assumed(run, bare: Path, tmp_path: Path) -> None:
    done = run("convert", bare, "--prediction", "x0", "--out", tmp_path / "x0.safetensors")
    note = "assumed linear betas from 0.0001 to 0.02; if that is wrong, give --schedule"
    assert note in done.out.splitlines()
    assert note in run("inspect", tmp_path / "x0.safetensors").out, "convert keeps its notes"


def test_a_sit_is_exported_as_a_flow(run, sit: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    done = run("export", sit, *SHORT, "--out", bundle)
    assert done.code == 0, done.err
    manifest = Bundle.open(bundle).manifest
    assert manifest.model.process == FLOW and manifest.model.learn_sigma
    assert manifest.sampling.sampler == "euler-maruyama" and manifest.sampling.timesteps[0] == 0
    assert training_line(run, bundle).endswith("  predicts velocity; flow matching on the linear path")
    assert run("sample", bundle, "--labels", "0", "--out", tmp_path / "samples").code == 0
    assert run("parity", bundle, "--against", sit, "--out", tmp_path / "parity").code == 0
    assert_refused(
        run("export", sit, *SHORT, "--schedule", "linear", "--out", tmp_path / "other"),
        f"{sit}: was trained in another way than --schedule linear: its training arguments say model SiT-XL/2; remove",
    )


def test_a_bundle_keeps_what_was_given_and_parity_holds_it_to_that(run, bare: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    done = run("export", bare, *SHORT, "--schedule", "flow", "--json", "--out", bundle)
    assert json.loads(done.out)["training"] == "predicts velocity; flow matching on the linear path"
    assert Bundle.open(bundle).manifest.model.process == FLOW
    same = run("parity", bundle, "--against", bare, "--prediction", "velocity", "--out", tmp_path / "same")
    assert same.code == 0, same.out
    for options in ([], AS_V):
        out = tmp_path / f"other{len(options)}"
        done = run("parity", bundle, "--against", bare, *options, "--out", out)
        assert done.code == 1, done
        theirs = "predicts v; cosine betas" if options else "predicts epsilon; linear betas from 0.0001 to 0.02"
        text = f"predicts velocity; flow matching on the linear path in the bundle, {theirs} in the checkpoint"
        assert f"parity fails at masks: the training differs: {text}" in done.out
        assert json.loads((out / "parity.json").read_text())["stale_reasons"] == [f"the training differs: {text}"]
    # The next command that export suggests repeats the option.
    again = run("export", bare, *SHORT, "--prediction", "v", "--out", tmp_path / "v").out.splitlines()[-1]
    assert again == (f"Next: dydit parity {tmp_path / 'v'} --against {bare} --prediction v --out PARITY")


def test_the_option_cannot_change_a_bundle(run, bare: Path, tmp_path: Path) -> None:
    assert run("export", bare, *SHORT, "--out", tmp_path / "bundle").code == 0
    for option in (["--prediction", "v"], ["--schedule", "cosine"], ["--betas", "0.001,0.02"]):
        done = run("inspect", tmp_path / "bundle", *option)
        assert_refused(done, f"{option[0]} cannot change a bundle; give it to `dydit export`")


def test_a_calibration_is_for_one_process(run, bare: Path, tmp_path: Path) -> None:
    plan = [*SHORT, "--prediction", "v"]
    small = ["--samples", 8, "--held-out", 8, "--batch-size", 2, "--quantile", 0.9]
    file, capacity = tmp_path / "c.json", ["--routing", "capacity", "--calibration", tmp_path / "c.json"]
    done = run("calibrate", bare, *plan, *small, "--out", file)
    assert done.code == 0 and f"export {bare} --steps 3 --max-subnets 2 --prediction v --routing" in done.out, done
    assert_refused(
        run("export", bare, *SHORT, *capacity, "--out", tmp_path / "epsilon"),
        "calibration is for a model that predicts v; linear betas from 0.0001 to 0.02, not for one that predicts eps",
    )
    assert run("export", bare, *plan, *capacity, "--out", tmp_path / "v").code == 0


def test_a_run_starts_from_a_model_of_its_own_process(run, tmp_path: Path) -> None:
    from dydit.checkpoints.checkpoint import save_checkpoint
    from tests.fixtures.training import STATIC, make_random, make_recipe

    path = tmp_path / "init.safetensors"
    save_checkpoint(path, make_random(STATIC).state_dict(), STATIC.model_copy(update={"process": V}))
    with pytest.raises(ConfigError, match="was trained in another way than recipe small trains: predicts v; cosine"):
        starting_model(make_recipe(init=str(path)))
    starting_model(make_recipe(init=str(path), model=STATIC.model_copy(update={"process": V})))
