"""Any number of processes trains the same model: two of them, by gloo, against one; with weights whole and split."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from dydit.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from dydit.data.small_sets import Digits
from dydit.errors import ConfigError
from dydit.models.config import ModelConfig
from dydit.models.dit.model import DiT
from dydit.training.draws import BatchSource
from dydit.training.losses import ProcessTensors
from dydit.training.objective import Inputs, Objective
from dydit.training.recipe import Recipe
from dydit.training.spread import spread_of
from dydit.training.state import read_log
from dydit.training.trainer import train

ROOT = Path(__file__).parents[2]
STEPS = 20

GRADIENTS = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from torch import distributed
from dydit.checkpoints.checkpoint import load_checkpoint
from dydit.training.recipe import Recipe
from tests.training.test_processes import gradients
torch.set_num_threads(1)
distributed.init_process_group("gloo")
recipe = Recipe.model_validate_json(Path(sys.argv[1]).read_text())
found = gradients(load_checkpoint(Path(recipe.init)).model(), recipe, distributed.get_rank(), 2)
for value in found.values():
    distributed.all_reduce(value)
    value /= 2
if distributed.get_rank() == 0:
    save_file(found, sys.argv[2])
distributed.destroy_process_group()
"""
RUNS = """
import sys, torch
from pathlib import Path
from dydit.training.recipe import Recipe
from dydit.training.trainer import train
torch.set_num_threads(1)
for file, out in zip(sys.argv[1::2], sys.argv[2::2]):
    train(Recipe.model_validate_json(Path(file).read_text()), Path(out), resume=Path(out).exists())
"""
SPLIT = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
"""What `accelerate launch --use_fsdp --fsdp_version 2` sets."""


def two_processes(script: str, *arguments: object, **environment: str) -> None:
    """Run a script in two processes of one group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    common = {**os.environ, **group, **environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    runs = [
        subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env={**common, "RANK": rank, "LOCAL_RANK": rank}
        )
        for rank in ("0", "1")
    ]
    ended = [(run.communicate(timeout=600)[1], run.returncode) for run in runs]
    assert [code for _, code in ended] == [0, 0], ended


def gradients(model: torch.nn.Module, recipe: Recipe, process: int, processes: int) -> dict[str, torch.Tensor]:
    """Gradients of the loss of a process' share of iteration 3."""
    source = BatchSource(Digits(), recipe.seed, recipe.batch_size, 0.1, 10, recipe.process, process, processes)
    objective = Objective(model, recipe, ProcessTensors.of(recipe.process))  # type: ignore[arg-type]
    objective(Inputs.of(source.batch(3), torch.device("cpu")), 3)["loss"].backward()
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


@pytest.fixture
def dynamic_recipe(
    tmp_path: Path,
    small_recipe: Callable[..., Recipe],
    dynamic_config: ModelConfig,
    randomised: Callable[..., DiT],
) -> Recipe:
    """A run with every loss that is not a mean over images, and shares of six images, not a multiple of four."""
    save_checkpoint(tmp_path / "start.safetensors", randomised(dynamic_config), dynamic_config)
    return small_recipe(
        stage="dynamic",
        model=dynamic_config,
        init=str(tmp_path / "start.safetensors"),
        batch_size=12,
        iterations=STEPS,
        log_every=10,
        save_every=STEPS,
        flops_weight=20.0,
        token_weight=10.0,
        token_spread=0.2,
        warmup_iterations=5,
    )


def test_the_mean_gradient_of_two_processes_is_that_of_the_whole_batch(tmp_path: Path, dynamic_recipe: Recipe) -> None:
    (tmp_path / "recipe.json").write_text(dynamic_recipe.model_dump_json())
    two_processes(GRADIENTS, tmp_path / "recipe.json", tmp_path / "gradients.safetensors")
    together = load_file(tmp_path / "gradients.safetensors")
    assert dynamic_recipe.init is not None
    checkpoint = load_checkpoint(Path(dynamic_recipe.init))
    whole = gradients(checkpoint.model(), dynamic_recipe, 0, 1)
    assert whole.keys() == together.keys()
    for name, value in whole.items():
        torch.testing.assert_close(together[name], value, rtol=1e-4, atol=1e-5 * float(value.abs().max() + 1e-3))
    # One process alone has another gradient, because the squared means are those of fewer images.
    part = gradients(checkpoint.model(), dynamic_recipe, 0, 2)
    name = "blocks.0.token_selection.mlp_head.2.bias"
    assert not torch.allclose(part[name], whole[name], rtol=1e-2)


@pytest.mark.parametrize("environment", [{}, SPLIT], ids=["whole", "split"])
def test_two_processes_give_the_losses_of_one(
    tmp_path: Path, small_recipe: Callable[..., Recipe], dynamic_recipe: Recipe, environment: dict[str, str]
) -> None:
    recipes = {"dynamic": dynamic_recipe}
    recipes |= {} if environment else {"static": small_recipe(iterations=STEPS, log_every=10, save_every=STEPS)}
    arguments: list[object] = []
    for name, recipe in recipes.items():
        (tmp_path / f"{name}.json").write_text(recipe.model_dump_json())
        arguments += [tmp_path / f"{name}.json", tmp_path / f"{name}-two"]
        train(recipe, tmp_path / f"{name}-one")
    two_processes(RUNS, *arguments, **environment)
    for name in recipes:
        one, two = (read_log(tmp_path / f"{name}-{count}") for count in ("one", "two"))
        assert len(one) == len(two) == STEPS // 10
        for left, right in zip(one, two, strict=True):
            assert right == pytest.approx(left, rel=1e-5, abs=1e-5), (name, left["iteration"])
        assert name == "static" or ({"flops", "token", "ratio"} <= one[0].keys() and 0.1 < one[-1]["ratio"] < 0.95)


@pytest.mark.parametrize("first", ["split", pytest.param("whole", marks=pytest.mark.release)])
def test_a_run_of_split_weights_is_resumed_with_whole_ones_and_the_other_way(
    tmp_path: Path, dynamic_recipe: Recipe, first: str
) -> None:
    """And so is a run of two processes by one."""
    recipe = dynamic_recipe.model_copy(update={"iterations": 8, "log_every": 2, "save_every": 4, "sample_every": 4})
    begun = recipe.model_copy(update={"iterations": 4})
    for name, each in (("whole", recipe), ("short", begun)):
        (tmp_path / f"{name}.json").write_text(each.model_dump_json())
    train(recipe, tmp_path / "one")
    if first == "split":
        two_processes(RUNS, tmp_path / "short.json", tmp_path / "run", **SPLIT)
        train(recipe, tmp_path / "run", resume=True)
    else:
        train(begun, tmp_path / "run")
        two_processes(RUNS, tmp_path / "whole.json", tmp_path / "run", **SPLIT)
    assert read_log(tmp_path / "run")[-1] == pytest.approx(read_log(tmp_path / "one")[-1], rel=1e-5, abs=1e-5)
    state = load_checkpoint(tmp_path / "run" / "model.safetensors").state
    for key, value in load_checkpoint(tmp_path / "one" / "model.safetensors").state.items():
        torch.testing.assert_close(state[key], value, rtol=1e-4, atol=1e-5)
    assert (tmp_path / "run" / "samples-00000004.png").is_file()


@pytest.mark.parametrize(
    ("kind", "environment", "compiled", "message"),
    [
        ("DEEPSPEED", {}, False, "configured for DEEPSPEED, which is not supported; use FSDP"),
        ("FSDP", {"FSDP_VERSION": "1"}, False, "version 1 of FSDP; use version 2"),
        ("FSDP", {"FSDP_OFFLOAD_PARAMS": "true"}, False, "keep weights on the CPU"),
        ("FSDP", {}, True, "compile=true does not work with FSDP"),
    ],
)
def test_what_is_not_supported_is_refused(
    monkeypatch: pytest.MonkeyPatch, kind: str, environment: dict[str, str], compiled: bool, message: str
) -> None:
    for name, value in ({**SPLIT, **environment} if kind == "FSDP" else environment).items():
        monkeypatch.setenv(name, value)
    accelerator = SimpleNamespace(distributed_type=SimpleNamespace(value=kind), num_processes=2)
    with pytest.raises(ConfigError, match=message):
        spread_of(accelerator, compiled)
    accelerator.num_processes = 1
    if kind == "FSDP":
        assert not spread_of(accelerator, compiled).split, "one process has all weights"
