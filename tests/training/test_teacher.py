"""A teacher: what its loss is, that it is not trained, what it changes, and which teachers are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dydit.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from dydit.data.small_sets import Digits
from dydit.diffusion.process import NoiseSchedule, Prediction, Process
from dydit.errors import CheckpointError, ConfigError
from dydit.models.config import ModelConfig
from dydit.models.dit.model import DiT
from dydit.models.registry import architecture_of
from dydit.training.draws import BatchSource
from dydit.training.dry_run import StepTime, describe, memory
from dydit.training.losses import ProcessTensors, add_noise
from dydit.training.objective import Inputs, Objective
from dydit.training.recipe import Recipe, Stage
from dydit.training.sequence import train_sequence
from dydit.training.state import read_log
from dydit.training.teacher import Teacher, teacher_config
from dydit.training.trainer import train

Make = Callable[..., Recipe]
Randomised = Callable[..., DiT]
PROCESS = ProcessTensors.of(Process())


def batch_of(images: int) -> Inputs:
    return Inputs.of(BatchSource(Digits(), 0, images, 0.1, 10, Process()).probe(images), torch.device("cpu"))


@pytest.fixture
def teacher(tmp_path: Path, static_config: ModelConfig, randomised: Randomised) -> str:
    save_checkpoint(tmp_path / "teacher.safetensors", randomised(static_config, seed=5, scale=0.2), static_config)
    return str(tmp_path / "teacher.safetensors")


@pytest.fixture
def taught(small_recipe: Make, dynamic_config: ModelConfig, teacher: str) -> Make:
    def make(**changes: object) -> Recipe:
        return small_recipe(
            **{"stage": "dynamic", "model": dynamic_config, "init": teacher, "teacher": teacher, **changes}
        )

    return make


@pytest.mark.parametrize("stage", ["static", "dynamic", "settle"])
@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_the_loss_is_the_distance_of_the_predictions(
    stage: str, weight: float, taught: Make, static_config: ModelConfig, randomised: Randomised
) -> None:
    changes = {"model": static_config} if stage == "static" else {}
    recipe = taught(stage=stage, teacher_weight=weight, **changes)
    model, batch = randomised(recipe.model), batch_of(8)
    known = Teacher.of(recipe, torch.device("cpu"))
    assert known is not None
    parts = Objective(model, recipe, PROCESS, known)(batch, 3)
    without = Objective(model, recipe, PROCESS)(batch, 3)
    assert set(parts) == {*without, "teacher"}
    torch.testing.assert_close(parts["loss"], without["loss"] + parts["teacher"])
    parts["teacher"].backward()
    assert all(parameter.grad is None for parameter in known.model.parameters())
    if stage == "static":  # without gates, the model's output is known
        x_t = add_noise(PROCESS, batch.x0, batch.t, batch.noise)
        ours, theirs = (
            each(x_t, batch.t, batch.y)[:, :1] for each in (model, load_checkpoint(Path(recipe.init or "")).model())
        )
        torch.testing.assert_close(parts["teacher"], weight * (ours - theirs).square().mean())
    trained = {name for name, each in model.named_parameters() if each.grad is not None and each.grad.any()}
    assert trained
    # The rows of the last layer that are the variance have no part in it.
    variance = model.final_layer.linear.weight.grad.view(-1, 2, model.config.hidden_size)[:, 1]
    assert not variance.any()


def test_the_teacher_is_no_weight_of_the_run(taught: Make, randomised: Randomised) -> None:
    recipe = taught()
    objective = Objective(randomised(recipe.model), recipe, PROCESS, Teacher.of(recipe, torch.device("cpu")))
    assert set(objective.state_dict()) == {f"model.{name}" for name in objective.model.state_dict()}


def test_a_model_comes_closer_to_its_teacher(tmp_path: Path, taught: Make, teacher: str) -> None:
    student = {"stage": "static", "init": None, "iterations": 40, "learning_rate": 3e-3, "ema_decay": 0.0}
    student["model"] = load_checkpoint(Path(teacher)).config
    results = {
        name: train(taught(**student, **settings), tmp_path / name)
        for name, settings in (("alone", {"teacher": None}), ("taught", {"teacher_weight": 10.0}))
    }
    batch = batch_of(32)
    x_t = add_noise(PROCESS, batch.x0, batch.t, batch.noise)

    def output(path: Path) -> torch.Tensor:
        with torch.no_grad():
            return load_checkpoint(path).model().eval()(x_t, batch.t, batch.y)[:, :1]

    wanted = output(Path(teacher))
    distance = {name: float((output(each.model) - wanted).square().mean()) for name, each in results.items()}
    assert distance["taught"] < 0.5 * distance["alone"]
    assert all(line["teacher"] > 0 for line in read_log(tmp_path / "taught"))
    assert all("teacher" not in line for line in read_log(tmp_path / "alone"))


def test_a_run_knows_its_teacher_by_its_bytes(tmp_path: Path, taught: Make, teacher: str) -> None:
    first = train(taught(iterations=8), tmp_path / "run")
    assert first.summary["recipe"]["teacher"] == f"sha256:{load_checkpoint(Path(teacher)).sha256}"
    elsewhere = tmp_path / "elsewhere.safetensors"
    elsewhere.write_bytes(Path(teacher).read_bytes())
    longer = train(taught(iterations=12, teacher=str(elsewhere)), tmp_path / "run", resume=True)
    assert longer.model.read_bytes() == train(taught(iterations=12), tmp_path / "whole").model.read_bytes()
    with pytest.raises(ConfigError, match="it differs in teacher "):
        train(taught(iterations=12, teacher=None), tmp_path / "run", resume=True)


@pytest.mark.parametrize("kind", ["uvit", "pixart"])
def test_other_architectures_have_teachers(
    kind: str, tmp_path: Path, small_recipe: Make, pixart_config: ModelConfig
) -> None:
    """A model that is its own teacher has nothing to learn from it, but for what its gates close."""
    from dydit.models.synthetic import synthetic_model
    from dydit.models.text import TextRows
    from dydit.models.uvit.config import UViTConfig

    uvit = UViTConfig(hidden_size=48, depth=3, num_heads=3, input_size=8, patch_size=2, in_channels=4, num_classes=7)
    config: Any = pixart_config if kind == "pixart" else uvit
    static = config.without_routers()
    save_checkpoint(tmp_path / "own.safetensors", synthetic_model(static), static)
    own = str(tmp_path / "own.safetensors")
    recipe = small_recipe(model=static, batch_size=4, label_dropout=0, teacher=own)
    y: Any = torch.tensor([0, 1, 2, 3])
    if config.text is not None:
        y = TextRows(torch.randn(4, 6, 16), torch.arange(6) < torch.tensor([[1], [3], [5], [6]]))
    times = torch.tensor([0, 300, 600, 999])
    batch = Inputs(torch.randn(4, 4, 8, 8), times, y, torch.randn(4, 4, 8, 8), 7, 0)
    process, model = ProcessTensors.of(recipe.process), load_checkpoint(Path(own)).model()
    own_parts = Objective(model, recipe, process, Teacher.of(recipe, torch.device("cpu")))(batch, 0)
    assert float(own_parts["teacher"].detach()) < 1e-10
    gated = architecture_of(config).masked(config)
    gated.load_state_dict(synthetic_model(config, flops_ratio=0.5).state_dict())
    recipe = recipe.model_copy(update={"stage": Stage.SETTLE, "model": config})
    assert Objective(gated, recipe, process, Teacher.of(recipe, torch.device("cpu")))(batch, 0)["teacher"] > 1e-6


def test_teachers_that_do_not_fit_are_refused(
    tmp_path: Path, taught: Make, static_config: ModelConfig, randomised: Randomised
) -> None:
    others = {
        "num_classes 12, not 10": static_config.with_classes(12),
        "input_size 8, not 16": static_config.model_copy(update={"input_size": 8}),
        "trained in another way": static_config.model_copy(
            update={"process": Process(schedule=NoiseSchedule.FLOW, prediction=Prediction.VELOCITY)}
        ),
    }
    for number, (words, config) in enumerate(others.items()):
        path = tmp_path / f"{number}.safetensors"
        save_checkpoint(path, randomised(config), config)
        with pytest.raises(ConfigError, match=words):
            train(taught(teacher=str(path)), tmp_path / "run")
        with pytest.raises(ConfigError, match=words):
            train_sequence([taught(), taught(stage="settle", teacher=str(path))], tmp_path / "run")
        with pytest.raises(ConfigError, match=words):
            describe([taught(teacher=str(path))], lambda _: StepTime(1e-3, 2, 100, "nothing"))
    with pytest.raises(CheckpointError, match="missing"):
        train(taught(teacher=str(tmp_path / "missing.safetensors")), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    larger = static_config.model_copy(update={"hidden_size": 64, "depth": 3})
    save_checkpoint(tmp_path / "larger.safetensors", randomised(larger), larger)
    assert teacher_config(taught(teacher=str(tmp_path / "larger.safetensors"))) == larger


def test_a_weight_needs_a_teacher(taught: Make) -> None:
    with pytest.raises(ValueError, match="teacher_weight 8 needs a teacher; set teacher to a checkpoint"):
        taught(teacher=None, teacher_weight=8.0)


def test_classes_are_those_of_the_teacher_by_name(tmp_path: Path, taught: Make, static_config: ModelConfig) -> None:
    """Label 3 means the same to both, or the run is refused."""
    names = tuple("abcdefghij")
    for teachers, fits in ((names, True), (None, True), (names[::-1], False)):
        config = static_config.model_copy(update={"class_names": teachers})
        path = tmp_path / f"{fits}-{teachers is None}.safetensors"
        save_checkpoint(path, DiT(config), config)
        model = taught().model.model_copy(update={"class_names": names})
        recipe = taught(model=model, teacher=str(path))
        if fits:
            assert teacher_config(recipe) == config
        else:
            with pytest.raises(ConfigError, match="class_names"):
                teacher_config(recipe)


def test_a_dry_run_takes_the_teachers_that_training_takes(
    tmp_path: Path, taught: Make, static_config: ModelConfig, randomised: Randomised
) -> None:
    """The process is that of the checkpoint that the run starts from."""
    flow = static_config.model_copy(
        update={"process": Process(schedule=NoiseSchedule.FLOW, prediction=Prediction.VELOCITY)}
    )
    path = str(tmp_path / "flow.safetensors")
    save_checkpoint(Path(path), randomised(flow), flow)
    recipes = [
        taught(init=path, teacher=path, iterations=2),
        taught(stage="settle", init=None, teacher=path, iterations=2),
    ]
    assert f"teacher {path}" in describe(recipes, lambda _: StepTime(1e-3, 2, 100, "nothing"))
    assert len(train_sequence(recipes, tmp_path / "run")) == 2


@pytest.mark.parametrize("change", [{"precision": "bf16"}, {"accumulate": 2}, {"checkpointing": True}])
def test_settings_of_speed_go_with_a_teacher(tmp_path: Path, taught: Make, change: dict[str, Any]) -> None:
    recipes = [taught(iterations=3, **each) for each in ({}, change)]
    plain, other = (
        read_log(train(recipe, tmp_path / str(number)).model.parent) for number, recipe in enumerate(recipes)
    )
    assert other[0]["teacher"] == pytest.approx(plain[0]["teacher"], rel=0.05)


def test_a_teacher_that_is_gone_or_in_a_folder(
    tmp_path: Path, taught: Make, teacher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resuming reads it again, so the run knows it by its weights, wherever they lie."""
    train(taught(iterations=4), tmp_path / "run")
    home = tmp_path / "home"
    home.mkdir()
    Path(teacher).rename(home / "moved.safetensors")
    with pytest.raises(CheckpointError, match=r"teacher .* does not exist, so it is unknown"):
        train(taught(iterations=8, init=str(home / "moved.safetensors")), tmp_path / "run", resume=True)
    monkeypatch.setenv("HOME", str(home))
    init = str(home / "moved.safetensors")
    longer = train(taught(iterations=8, init=init, teacher="~/moved.safetensors"), tmp_path / "run", resume=True)
    assert longer.summary["iterations"] == 8


def test_the_command_takes_a_teacher(run: Any, tmp_path: Path, teacher: str) -> None:
    words = ["train", "--recipe", "digits-static", "iterations=1", "batch_size=8"]
    done = run(*words, "--out", tmp_path / "run", f"teacher={teacher}")
    assert done.code == 0, done.err
    done = run(*words, "--out", tmp_path / "other", f"teacher={tmp_path / 'missing.safetensors'}")
    assert done.code == 2 and "missing.safetensors" in done.err and len(done.err.splitlines()) == 1


def test_a_dry_run_counts_the_teacher(taught: Make) -> None:
    with_, without = taught(), taught(teacher=None)
    assert memory(with_).total - memory(without).total == memory(with_).teacher > 0
    step = StepTime(1e-3, 2, with_.model.macs, "nothing")
    assert step.of(with_) == pytest.approx(step.of(without) * 4 / 3)
    assert f"teacher {with_.teacher}" in describe([with_], lambda _: step)
