"""Capacity routing on the command line: a bundle whose routing saves nothing says so, and how it would."""

from __future__ import annotations

import itertools
import re
import shlex
import shutil
from pathlib import Path

import pytest

from dydit.bundle.advice import capacity_chain, capacity_chain_of, run_options
from dydit.bundle.bundle import Bundle
from dydit.bundle.stored_weights import Precision
from dydit.cli import cli
from dydit.diffusion.process import NoiseSchedule, Prediction, Process
from dydit.diffusion.samplers import SamplerConfig, Spacing
from dydit.errors import ConfigError
from dydit.export.capacities import keeps_every_token
from dydit.export.settings import ExportConfig
from dydit.models.config import ModelConfig

PLANS = [[], ["--max-subnets", 2], ["--per-step"], ["--dynamic-width"], ["--memory-budget", "50MB"]]


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint, tmp_path_factory) -> Path:
    """One whose path a shell would take apart."""
    path = tmp_path_factory.mktemp("a b") / "my $model.safetensors"
    shutil.copy(make_checkpoint().path, path)
    return path


def commands(text: str) -> list[list[str]]:
    """The commands that a message names, as a shell takes them apart."""
    return [shlex.split(command)[1:] for command in re.findall(r"`(dydit [^`]+)`", text)]


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_export_warns_and_its_commands_work(run, checkpoint: Path, tmp_path: Path, plan: list[object]) -> None:
    done = run("export", checkpoint, "--out", tmp_path / "out", "--steps", 3, *plan, "--routing", "capacity", "--json")
    assert done.code == 0 and done.err.count("\n") == 1 and done.err.startswith("Warning: without --calibration")
    assert done.out.startswith("{"), "what is for programs stays so"
    calibrate, export, build = commands(done.err)
    assert [calibrate[0], export[0], build] == ["calibrate", "export", ["build", export[-1]]]
    assert calibrate[1] == export[1] == str(checkpoint)
    small = ["--samples", 4, "--held-out", 4, "--batch-size", 1, "--quantile", 0.5, "--margin", 0]
    assert run(*calibrate, *small).code == 0
    done = run(*export)
    assert done.code == 0 and not keeps_every_token(Bundle.open(export[-1]).manifest) and "Warning" not in done.err


def test_settings_of_the_export_stay(run, checkpoint: Path, tmp_path: Path) -> None:
    settings = ["--sampler", "ddim", "--precision", "fp16", "--max-batch", 3, "--cfg-channels", 4, "--num-heads", 4]
    done = run("export", checkpoint, "--out", tmp_path / "out", "--steps", 3, "--routing", "capacity", *settings)
    calibrate, export, _ = commands(done.err)
    both = "--steps 3 --sampler ddim --num-heads 4"
    assert " ".join(calibrate[2:-2]) == both
    assert " ".join(export[2:-6]) == f"{both} --precision fp16 --max-batch 3 --cfg-channels 4"


FLOW = Process(schedule=NoiseSchedule.FLOW, prediction=Prediction.VELOCITY)
RUNS = [
    *((Process(), sampler) for sampler in ("ddpm", "ddim", "dpm-solver++")),
    *((FLOW, sampler) for sampler in ("euler", "euler-maruyama", "dpm-solver++")),
    *((Process(schedule=NoiseSchedule.VP_SDE), each) for each in ("euler-maruyama", "ddpm", "ddim", "dpm-solver++")),
]


@pytest.mark.parametrize(("process", "sampler"), RUNS, ids=str)
def test_the_options_of_a_run_give_that_run(
    checkpoint: Path, small_config: ModelConfig, process: Process, sampler: str
) -> None:
    """An option that is left out must be the default for this model, which depends on how it was trained."""
    fitting, model = 0, small_config.model_copy(update={"process": process})
    for steps, spacing, eta in itertools.product((20, 250), (None, *Spacing), (0.0, 0.5)):
        config = SamplerConfig(sampler=sampler, steps=steps, spacing=spacing, eta=eta)
        try:
            config.times(process)
        except ConfigError:
            continue
        words = shlex.split(run_options({}, config, model))
        given = cli.commands["calibrate"].make_context("calibrate", [str(checkpoint), "--out", "CAL.json", *words])
        chosen = {name: given.params[name] for name in ("steps", "sampler", "spacing", "eta")}
        assert ExportConfig(**chosen).sampling(model) == config, words
        fitting += 1
    assert fitting >= 2


def test_others_do_not_warn(run, make_checkpoint, small_config, checkpoint: Path, tmp_path: Path) -> None:
    static = make_checkpoint(small_config.without_routers()).path
    for name, arguments in {
        "static": [static, "--routing", "capacity"],
        "dynamic": [checkpoint],
        "dense": [checkpoint, "--routing", "dense"],
    }.items():
        done = run("export", *arguments, "--out", tmp_path / name, "--steps", 2)
        assert done.code == 0 and done.err == ""


def test_a_calibration_that_keeps_every_token_is_told(run, checkpoint: Path, tmp_path: Path) -> None:
    run_options = ["--steps", 2, "--max-subnets", 1]
    slots = tmp_path / "slots.json"
    small = ["--samples", 2, "--held-out", 2, "--batch-size", 1, "--quantile", 0.5, "--tile", 16]
    assert run("calibrate", checkpoint, "--out", slots, *run_options, *small).code == 0
    routed = ["--routing", "capacity", "--calibration", slots]
    done = run("export", checkpoint, "--out", tmp_path / "out", *run_options, *routed)
    assert done.code == 0 and done.err.startswith("Warning: the calibration keeps a slot for every token")


@pytest.mark.parametrize("precision", Precision)
def test_the_chain_has_options_that_exist(precision: Precision, make_bundle) -> None:
    chains = [capacity_chain("a b", "c'd", "e", precision=precision), capacity_chain_of(make_bundle().manifest)]
    for chain in chains:
        for name, *words in commands(chain):
            known = {option for parameter in cli.commands[name].params for option in parameter.opts}
            assert {word for word in words if word.startswith("--")} <= known
    first, second, *_ = commands(chains[0])
    assert (first[1], first[-1], second[-1]) == ("a b", "c'd", "e")
    assert ("--activations" in first) == precision.is_calibrated
    assert ("dydit build" in chains[0]) == (precision is not Precision.INT8), "which has no engines"
