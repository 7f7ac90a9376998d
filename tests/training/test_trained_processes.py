"""Training of models of every diffusion process, and from checkpoints of every process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dydit.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from dydit.data.small_sets import Digits
from dydit.diffusion.process import NoiseSchedule, Prediction, Process
from dydit.diffusion.samplers import Sampler
from dydit.errors import ConfigError
from dydit.export.exporter import export
from dydit.export.settings import ExportConfig
from dydit.models.config import ModelConfig
from dydit.models.dit.model import DiT
from dydit.runtime.pipeline import DyDiTPipeline
from dydit.training.draws import BatchSource
from dydit.training.losses import ProcessTensors
from dydit.training.objective import Inputs, Objective, probe
from dydit.training.recipe import Recipe
from dydit.training.sequence import train_sequence
from dydit.training.state import read_log
from dydit.training.trainer import train

Make = Callable[..., Recipe]
Randomised = Callable[..., DiT]
FLOW = Process(schedule=NoiseSchedule.FLOW, prediction=Prediction.VELOCITY)
PROCESSES = [
    FLOW,
    Process(schedule=NoiseSchedule.VP_SDE),
    Process(schedule=NoiseSchedule.VP_SDE, prediction=Prediction.X0),
    Process(schedule=NoiseSchedule.SCALED_LINEAR),
    Process(schedule=NoiseSchedule.COSINE, prediction=Prediction.V),
    Process(prediction=Prediction.X0),
]
of_processes = pytest.mark.parametrize(
    "process", PROCESSES, ids=[f"{process.schedule}-{process.prediction}" for process in PROCESSES]
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def of(config: ModelConfig, process: Process | None) -> ModelConfig:
    """The model with another process."""
    return config.model_copy(update={"process": process})


@pytest.fixture
def flow_checkpoint(tmp_path: Path, static_config: ModelConfig, randomised: Randomised) -> str:
    config = of(static_config, FLOW)
    save_checkpoint(tmp_path / "flow.safetensors", randomised(config), config)
    return str(tmp_path / "flow.safetensors")


def same_bytes(one: Path, other: Path) -> None:
    for name in ("model.safetensors", "log.jsonl", "recipe.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


class Oracle(nn.Module):
    """Knows image and noise, so that its first C channels are what a model of the process is to predict."""

    def __init__(self, config: ModelConfig, x0: Tensor, noise: Tensor, second: Tensor):
        super().__init__()
        self.config, self.x0, self.noise = config, x0, noise
        self.second = nn.Parameter(second)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, gating: object) -> Tensor:
        alpha, sigma = (
            torch.from_numpy(each)[:, None, None, None].float()
            for each in self.config.diffusion.alpha_sigma(t.double().numpy())
        )
        first = {
            Prediction.EPSILON: self.noise,
            Prediction.X0: self.x0,
            Prediction.V: alpha * self.noise - sigma * self.x0,
            Prediction.VELOCITY: self.x0 - self.noise,
        }[self.config.diffusion.prediction]
        return torch.cat([first, self.second], 1)


@of_processes
def test_an_oracle_has_no_loss_and_its_second_half_is_not_trained(
    small_recipe: Make, static_config: ModelConfig, process: Process
) -> None:
    recipe = small_recipe(model=of(static_config, process))
    batch = Inputs.of(BatchSource(Digits(), 0, 8, 0.1, 10, process).probe(16), torch.device("cpu"))
    oracle: Any = Oracle(recipe.model, batch.x0, batch.noise, torch.ones_like(batch.x0))
    parts = Objective(oracle, recipe, ProcessTensors.of(process))(batch, 0)
    assert float(parts["mse"].detach()) < 1e-12
    parts["loss"].backward()
    has_term = process.discrete and process.prediction is Prediction.EPSILON
    assert bool(parts["vb"] > 0) == bool((oracle.second.grad != 0).any()) == has_term
    assert probe(oracle, batch, ProcessTensors.of(process))["probe_mse"] < 1e-12


@of_processes
def test_a_model_of_any_process_is_trained(
    tmp_path: Path, small_recipe: Make, static_config: ModelConfig, process: Process
) -> None:
    recipe = small_recipe(model=of(static_config, process), iterations=6)
    result = train(recipe, tmp_path / "run")
    assert load_checkpoint(result.model).config == recipe.model
    assert (
        json.loads((tmp_path / "run" / "recipe.json").read_text())["model"]["process"]["schedule"] == process.schedule
    )
    assert all(np.isfinite(entry["mse"]) and np.isfinite(entry["probe_mse"]) for entry in read_log(tmp_path / "run"))


def test_the_second_half_of_a_flow_stays_as_it_was(tmp_path: Path, small_recipe: Make, flow_checkpoint: str) -> None:
    result = train(small_recipe(init=flow_checkpoint), tmp_path / "run")
    before, after = load_checkpoint(flow_checkpoint).state, load_checkpoint(result.model).state
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        one, other = (each[name].unflatten(0, (-1, 2)) for each in (before, after))  # pixels of a patch, channels
        assert one[:, 1].equal(other[:, 1]) and not one[:, 0].equal(other[:, 0])


def test_a_flow_is_trained_interrupted_exported_and_sampled(
    tmp_path: Path, small_recipe: Make, static_config: ModelConfig
) -> None:
    settings = {"iterations": 60, "learning_rate": 3e-3, "log_every": 20, "save_every": 25}
    recipe = small_recipe(model=of(static_config, FLOW), **settings)

    def stop(done: int, total: int, entry: object) -> None:
        if done == 33:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="continues from its last state, iteration 25"):
        train(recipe, tmp_path / "run", progress=stop)
    result = train(recipe, tmp_path / "run", resume=True)
    train(recipe, tmp_path / "whole")
    same_bytes(tmp_path / "run", tmp_path / "whole")
    log = read_log(tmp_path / "run")
    assert log[-1]["mse"] < 0.8 * log[0]["mse"] and log[-1]["probe_mse"] < log[0]["probe_mse"]
    assert all(entry["vb"] == 0 for entry in log)
    assert_samples(result.model, tmp_path / "bundle")


def assert_samples(model: Path, bundle: Path) -> None:
    """Export a flow for Euler's method, and sample with it."""
    export(load_checkpoint(model), bundle, ExportConfig(steps=4, sampler=Sampler.EULER, max_batch=2))
    with DyDiTPipeline.from_bundle(bundle, threads=1) as pipeline:
        latents = pipeline([3, 7], seed=0, output_type="latent").latents
    assert latents.shape == (2, 1, 16, 16) and np.isfinite(latents).all() and latents.std() > 0.1


def test_routers_of_a_flow_follow_the_target(
    tmp_path: Path, small_recipe: Make, dynamic_config: ModelConfig, flow_checkpoint: str
) -> None:
    """The recipe states no process: it is that of the checkpoint."""
    settings = {"width_bias": 1.0, "token_bias": 1.0, "router_learning_rate": 20.0, "flops_weight": 20.0}
    losses = {"token_weight": 0.1, "token_spread": 0.1, "warmup_iterations": 5}
    recipe = small_recipe(
        **{
            "stage": "dynamic",
            "model": dynamic_config,
            "init": flow_checkpoint,
            "iterations": 80,
            "lambda_target": 0.4,
        },
        **{"ramp_iterations": 10, "log_every": 10, **settings, **losses},
    )
    result = train(recipe, tmp_path / "run")
    log = read_log(tmp_path / "run")
    assert log[0]["ratio"] > 0.6 and abs(log[-1]["ratio"] - 0.4) < 0.1
    trained = load_checkpoint(result.model)
    assert trained.config == of(dynamic_config, FLOW)
    assert Recipe.model_validate_json(trained.metadata["recipe"]).process == FLOW
    assert_samples(result.model, tmp_path / "bundle")


# The process of a start


def test_a_run_takes_the_process_of_its_start_and_is_resumed_with_it(
    tmp_path: Path, small_recipe: Make, flow_checkpoint: str, static_config: ModelConfig
) -> None:
    stated = small_recipe(init=flow_checkpoint, model=of(static_config, FLOW))
    train(stated, tmp_path / "stated")
    train(small_recipe(init=flow_checkpoint, iterations=8), tmp_path / "taken")
    train(small_recipe(init=flow_checkpoint), tmp_path / "taken", resume=True)
    same_bytes(tmp_path / "stated", tmp_path / "taken")
    again = train(stated, tmp_path / "taken", resume=True, progress=lambda *_: pytest.fail("it ran"))
    assert "finished already" in again.note


@pytest.mark.parametrize("process", [Process(), Process(prediction=Prediction.V)])
def test_a_recipe_that_contradicts_its_start_is_refused(
    tmp_path: Path, small_recipe: Make, flow_checkpoint: str, static_config: ModelConfig, process: Process
) -> None:
    with pytest.raises(ConfigError) as caught:
        train(small_recipe(init=flow_checkpoint, model=of(static_config, process)), tmp_path / "run")
    text = str(caught.value)
    assert text.startswith(f"recipe small ({process.words}) starts from init {flow_checkpoint}, which was trained in")
    assert f"({FLOW.words})" in text and "\n" not in text
    assert not (tmp_path / "run").exists()


def test_a_start_that_states_nothing_counts_as_that_of_dit(
    tmp_path: Path, small_recipe: Make, static_config: ModelConfig, randomised: Randomised
) -> None:
    path = tmp_path / "plain.safetensors"
    save_checkpoint(path, randomised(static_config), static_config)
    with pytest.raises(ConfigError, match="which was trained in another way"):
        train(small_recipe(init=str(path), model=of(static_config, FLOW)), tmp_path / "run")
    plain = train(small_recipe(init=str(path)), tmp_path / "plain")
    assert load_checkpoint(plain.model).config.process is None
    stated = train(small_recipe(init=str(path), model=of(static_config, Process())), tmp_path / "stated")
    assert load_checkpoint(stated.model).config.process == Process()
    assert (tmp_path / "plain" / "log.jsonl").read_bytes() == (tmp_path / "stated" / "log.jsonl").read_bytes()


def test_a_sequence_has_one_process(
    tmp_path: Path, small_recipe: Make, static_config: ModelConfig, dynamic_config: ModelConfig, flow_checkpoint: str
) -> None:
    """Stated for the first run, or taken from its start; a later run that states another is refused beforehand."""
    dynamic = small_recipe(stage="dynamic", model=dynamic_config, iterations=4)
    starts = {"stated": {"model": of(static_config, FLOW)}, "taken": {"init": flow_checkpoint}}
    for name, start in starts.items():
        runs = small_recipe(iterations=4, **start), dynamic
        results = train_sequence(runs, tmp_path / name)
        assert [load_checkpoint(result.model).config.process for result in results] == [FLOW, FLOW]
        again = train_sequence(runs, tmp_path / name, resume=True, progress=lambda *_: pytest.fail("it ran"))
        assert again == results
        other = small_recipe(stage="dynamic", model=of(dynamic_config, Process()), iterations=4)
        with pytest.raises(ConfigError, match="starts from the model of small, which was trained in another way"):
            train_sequence((runs[0], other), tmp_path / "refused")
        assert not (tmp_path / "refused").exists()


def test_a_folder_of_a_run_with_another_process_is_refused(
    tmp_path: Path, small_recipe: Make, static_config: ModelConfig
) -> None:
    train(small_recipe(model=of(static_config, FLOW), iterations=4), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"differs in model\.process"):
        train(small_recipe(iterations=4), tmp_path / "run", resume=True)


def test_folders_of_before_there_were_processes_are_resumed(tmp_path: Path, small_recipe: Make) -> None:
    train(small_recipe(iterations=8), tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "null")
    recipe = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert "process" not in recipe["model"]
    recipe["model"]["process"] = None
    (tmp_path / "null" / "recipe.json").write_text(json.dumps(recipe))
    for name in ("run", "null"):
        train(small_recipe(), tmp_path / name, resume=True)
    same_bytes(tmp_path / "run", tmp_path / "null")


# The command


def test_the_command_takes_schedule_and_prediction(run: Any, tmp_path: Path) -> None:
    small = ["model.hidden_size=32", "model.depth=2", "model.num_heads=2", "model.patch_size=4", "batch_size=4"]
    call = ["train", "--recipe", "digits-static", *small, "iterations=2"]
    done = run(*call, "--schedule", "flow", "--out", tmp_path / "flow")
    assert done.code == 0, done.err
    assert load_checkpoint(tmp_path / "flow" / "model.safetensors").config.process == FLOW
    done = run(*call, "--prediction", "v", "--schedule", "cosine", "--out", tmp_path / "v")
    assert done.code == 0, done.err
    process = load_checkpoint(tmp_path / "v" / "model.safetensors").config.process
    assert process == Process(schedule=NoiseSchedule.COSINE, prediction=Prediction.V)
    init = f"init={tmp_path / 'flow' / 'model.safetensors'}"
    for words, options in (
        ("cannot be combined with prediction x0", ["--schedule", "flow", "--prediction", "x0"]),
        ("which was trained in another way", ["--prediction", "v", init]),
    ):
        done = run(*call, *options, "--out", tmp_path / "refused")
        assert done.code == 2 and words in done.err and done.err.count("\n") == 1, done.err
        assert not (tmp_path / "refused").exists()
