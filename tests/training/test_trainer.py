from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from dydit.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from dydit.diffusion.process import Process
from dydit.errors import ConfigError, OutputError, TrainingError
from dydit.models.config import ModelConfig
from dydit.models.dit.model import DiT
from dydit.models.routers import Static
from dydit.training.draws import BatchSource
from dydit.training.losses import ProcessTensors
from dydit.training.objective import Inputs, Objective, probe
from dydit.training.optimizer import learning_rate, make_optimizer
from dydit.training.recipe import Recipe, Stage
from dydit.training.sequence import train_sequence
from dydit.training.start import starting_model
from dydit.training.state import read_log
from dydit.training.trainer import train

Make = Callable[..., Recipe]
Randomised = Callable[..., DiT]

RUN = """
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
from dydit.training.trainer import train
from dydit.training.recipe import Recipe
*recipes, out = map(Path, sys.argv[1:])
for recipe in recipes:
    train(Recipe.model_validate_json(recipe.read_text()), out, resume=True,
          progress=lambda done, of, entry: print(done, flush=True))
"""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def static_checkpoint(tmp_path: Path, static_config: ModelConfig, randomised: Randomised) -> str:
    path = tmp_path / "static.safetensors"
    save_checkpoint(path, randomised(static_config), static_config)
    return str(path)


@pytest.fixture
def dynamic_recipe(small_recipe: Make, dynamic_config: ModelConfig, static_checkpoint: str) -> Make:
    def make(**changes: object) -> Recipe:
        values = {"stage": "dynamic", "model": dynamic_config, "init": static_checkpoint, "width_bias": 1.0, **changes}
        return small_recipe(**{"token_bias": 1.0, "router_learning_rate": 20.0, **values})

    return make


def test_a_run_learns_and_leaves_what_it_promises(tmp_path: Path, small_recipe: Make) -> None:
    told: list[tuple[int, int, bool]] = []
    recipe = small_recipe(iterations=60, learning_rate=3e-3, log_every=20)
    result = train(
        recipe, tmp_path / "run", progress=lambda done, of, entry: told.append((done, of, entry is not None))
    )
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"recipe.json", "log.jsonl", "model.safetensors", "train.json", "curves.png", "state-00000060"}
    log = read_log(tmp_path / "run")
    assert [entry["iteration"] for entry in log] == [20, 40, 60]
    assert log[-1]["mse"] < 0.8 * log[0]["mse"]
    assert told == [(i, 60, i % 20 == 0) for i in range(1, 61)]
    checkpoint = load_checkpoint(result.model)
    assert checkpoint.config == recipe.model
    assert Recipe.model_validate_json(checkpoint.metadata["recipe"]) == recipe
    assert json.loads((tmp_path / "run" / "train.json").read_text()) == result.summary
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_routers_follow_the_target(tmp_path: Path, dynamic_recipe: Make) -> None:
    recipe = dynamic_recipe(iterations=80, lambda_target=0.4, flops_weight=20.0, ramp_iterations=10, log_every=10)
    train(recipe, tmp_path / "run")
    log = read_log(tmp_path / "run")
    assert log[0]["ratio"] > 0.6 and abs(log[-1]["ratio"] - 0.4) < 0.1
    assert log[0]["target"] == recipe.target(9) and log[-1]["target"] == 0.4
    assert log[-1]["probe_ratio"] < log[0]["probe_ratio"]
    trained = load_checkpoint(tmp_path / "run" / "model.safetensors")
    start = starting_model(recipe).state_dict()
    assert all(not trained.state[name].equal(start[name]) for name in start if name != "pos_embed")


def test_a_dynamic_run_starts_from_the_static_function(dynamic_recipe: Make) -> None:
    recipe = dynamic_recipe(width_bias=30.0, token_bias=35.0)
    assert recipe.init is not None
    static, start = load_checkpoint(recipe.init).model(), starting_model(recipe).eval()
    x, t, y = torch.randn(3, 1, 16, 16), torch.tensor([0, 400, 999]), torch.tensor([1, 2, 3])
    with torch.no_grad():
        torch.testing.assert_close(start(x, t, y), static(x, t, y), rtol=1e-4, atol=1e-5)
        assert static(x, t, y).std() > 0.01
    # The heads really were reordered.
    assert not start.state_dict()["blocks.0.attn.qkv.weight"].equal(static.state_dict()["blocks.0.attn.qkv.weight"])


def test_a_dynamic_checkpoint_is_continued_as_it_is(
    tmp_path: Path, dynamic_recipe: Make, randomised: Randomised
) -> None:
    recipe = dynamic_recipe(init=str(tmp_path / "dynamic.safetensors"))
    model = randomised(recipe.model)
    save_checkpoint(tmp_path / "dynamic.safetensors", model, recipe.model)
    start = starting_model(recipe).state_dict()
    assert all(value.equal(start[name]) for name, value in model.state_dict().items())


def test_a_start_that_does_not_fit_is_refused(dynamic_recipe: Make, dynamic_config: ModelConfig) -> None:
    with pytest.raises(ConfigError, match="init=PATH"):
        starting_model(dynamic_recipe(init=None))
    with pytest.raises(ConfigError, match="other sizes"):
        starting_model(dynamic_recipe(model=dynamic_config.model_copy(update={"depth": 3})))


def test_repeating_a_run_gives_the_same_bytes(tmp_path: Path, dynamic_recipe: Make) -> None:
    train(dynamic_recipe(), tmp_path / "a")
    elsewhere = tmp_path / "elsewhere.safetensors"  # the same weights from another place
    elsewhere.write_bytes((tmp_path / "static.safetensors").read_bytes())
    train(dynamic_recipe(init=str(elsewhere)), tmp_path / "b")
    train(dynamic_recipe(seed=1), tmp_path / "c")
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c
    assert (tmp_path / "a" / "log.jsonl").read_bytes() == (tmp_path / "b" / "log.jsonl").read_bytes()


def spawn(recipes: list[Path], out: Path, **environment: str) -> subprocess.Popen[str]:
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2]), **environment}
    command = [sys.executable, "-c", RUN, *map(str, recipes), str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables)


@pytest.mark.release  # test_killed.py kills sequences in the same way
@pytest.mark.parametrize("kills", [(11,), (8, 26)], ids=["once", "twice"])
def test_a_killed_run_resumes_to_the_same_bytes(tmp_path: Path, dynamic_recipe: Make, kills: tuple[int, ...]) -> None:
    recipe = dynamic_recipe(iterations=30, log_every=4, save_every=3, grad_norm_limit=60.0)
    (tmp_path / "recipe.json").write_text(recipe.model_dump_json())
    whole = train(recipe, tmp_path / "whole")
    chance, killed_at, out = random.Random(0), [], tmp_path / "killed"
    for least in kills:
        run = spawn([tmp_path / "recipe.json"], out)
        assert run.stdout is not None
        done = next((int(line) for line in run.stdout if int(line) >= least), None)
        time.sleep(chance.uniform(0, 0.03))  # anywhere: in a step, in writing a state, in the log
        run.send_signal(signal.SIGKILL)
        run.communicate()
        killed_at.append((done, run.returncode))
    # Where this process gets its turn late, the last one may have ended by itself.
    assert all(done is not None for done, _ in killed_at)
    first, *others = (code for _, code in killed_at)
    assert first == -signal.SIGKILL and all(code in (0, -signal.SIGKILL) for code in others)
    last = spawn([tmp_path / "recipe.json"], out)
    printed, errors = last.communicate(timeout=600)
    assert last.returncode == 0, errors
    assert not printed or int(printed.splitlines()[0]) > kills[-1] - 6  # it did not begin again
    for name in ("model.safetensors", "log.jsonl"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert json.loads((out / "train.json").read_text())["skipped"] == whole.summary["skipped"]


def test_a_finished_run_is_not_run_again(tmp_path: Path, small_recipe: Make) -> None:
    first = train(small_recipe(), tmp_path / "run")
    before = first.model.stat().st_mtime_ns
    again = train(small_recipe(), tmp_path / "run", resume=True, progress=lambda *_: pytest.fail("it ran"))
    assert again == first and again.model.stat().st_mtime_ns == before
    with pytest.raises(OutputError, match="not empty"):
        train(small_recipe(), tmp_path / "run")
    with pytest.raises(ConfigError, match="seed"):
        train(small_recipe(seed=1), tmp_path / "run", resume=True)


def test_steps_over_the_gradient_limit_are_skipped_and_counted(tmp_path: Path, small_recipe: Make) -> None:
    recipe = small_recipe(grad_norm_limit=1e-6)
    result = train(recipe, tmp_path / "run")
    assert result.summary["skipped"] == recipe.iterations
    start = starting_model(recipe).state_dict()
    state = load_checkpoint(result.model).state
    assert all(state[name].equal(start[name]) for name in start)


def test_a_hopeless_run_stops_and_says_why(tmp_path: Path, small_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dydit.training.trainer.HOPELESS", 5)
    with pytest.raises(TrainingError, match=r"5 steps in a row.*grad_norm_limit"):
        train(small_recipe(grad_norm_limit=1e-6), tmp_path / "run")


def test_there_is_one_optimiser_step_an_iteration(
    tmp_path: Path, small_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    original = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a, **k: (steps.append(1), original(self, *a, **k))[1])
    train(small_recipe(clip_norm=0.5), tmp_path / "run")
    assert len(steps) == 12


def test_the_ema_follows_the_weights(tmp_path: Path, small_recipe: Make) -> None:
    """With decay 0 the average is the weights; with a decay it lies between the start and them."""
    runs = {decay: train(small_recipe(ema_decay=decay), tmp_path / str(decay)) for decay in (0.0, 0.5)}
    states = {decay: load_checkpoint(run.model).state for decay, run in runs.items()}
    start = starting_model(small_recipe()).state_dict()
    name = "y_embedder.embedding_table.weight"
    assert 0 < (states[0.5][name] - start[name]).norm() < (states[0.0][name] - start[name]).norm()


def test_warm_up_adds_the_complete_models_loss(dynamic_recipe: Make, randomised: Randomised) -> None:
    recipe = dynamic_recipe(warmup_iterations=5)
    process, model = ProcessTensors.of(Process()), randomised(recipe.model)
    objective = Objective(model, recipe, process)
    x0, noise = torch.rand(4, 1, 16, 16), torch.randn(4, 1, 16, 16)
    batch = Inputs(x0, torch.tensor([0, 300, 600, 999]), torch.tensor([1, 2, 3, 10]), noise, 7, 0)
    during, after = objective(batch, 4), objective(batch, 5)
    assert "complete" in during and "complete" not in after
    plain = Objective(model, recipe.model_copy(update={"stage": Stage.STATIC}), process)(batch, 4)
    torch.testing.assert_close(during["complete"], plain["loss"])
    parts = during["mse"] + during["vb"] + during["flops"] + during["complete"]
    torch.testing.assert_close(during["loss"], parts)
    assert not torch.allclose(during["complete"], during["mse"] + during["vb"])  # gates were closed


def test_routers_have_their_own_learning_rate(dynamic_recipe: Make, randomised: Randomised) -> None:
    recipe = dynamic_recipe(router_learning_rate=7.0)
    model = randomised(recipe.model)
    rest, routers = make_optimizer(model, recipe).param_groups
    assert (rest["multiple"], routers["multiple"]) == (1.0, 7.0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert all("_rate.router" in names[p] or "token_selection" in names[p] for p in routers["params"])
    assert len(routers["params"]) == 2 * (2 + 2 + 4)
    assert len(rest["params"]) + len(routers["params"]) == len(names) - 1  # all but pos_embed


def test_the_learning_rate_warms_up_and_falls(small_recipe: Make) -> None:
    recipe = small_recipe(iterations=1000, learning_rate=1.0, learning_rate_warmup=10, learning_rate_schedule="cosine")
    assert learning_rate(recipe, 0) == pytest.approx(0.1)
    assert learning_rate(recipe, 10) == pytest.approx(1, abs=1e-3)
    assert learning_rate(recipe, 500) == pytest.approx(0.525)
    assert learning_rate(recipe, 999) == pytest.approx(0.05, abs=1e-3)
    constant = small_recipe(iterations=1000, learning_rate=1.0, learning_rate_warmup=10)
    assert learning_rate(constant, 4) == pytest.approx(0.5) and learning_rate(constant, 999) == 1


def test_the_probe_sees_the_gates_of_inference(
    static_config: ModelConfig, dynamic_recipe: Make, randomised: Randomised
) -> None:
    from dydit.data.small_sets import Digits

    batch = Inputs.of(BatchSource(Digits(), 0, 8, 0.1, 10, Process()).probe(32), torch.device("cpu"))
    model = randomised(dynamic_recipe().model)
    seen = probe(model, batch, ProcessTensors.of(Process()))
    assert all(0.1 < seen[key] < 0.9 for key in ("probe_ratio", "probe_heads", "probe_groups", "probe_tokens"))
    assert seen["probe_tokens_std"] > 0
    assert seen == probe(model, batch, ProcessTensors.of(Process()))
    assert set(probe(randomised(static_config), batch, ProcessTensors.of(Process()))) == {"probe_mse"}


def test_a_sequence_hands_its_weights_on(tmp_path: Path, small_recipe: Make, dynamic_recipe: Make) -> None:
    runs = (small_recipe(), dynamic_recipe(init=None))
    first, second = train_sequence(runs, tmp_path / "out")
    assert first.model == tmp_path / "out/static/model.safetensors"
    assert second.summary["recipe"]["init"] == f"sha256:{load_checkpoint(first.model).sha256}"
    assert load_checkpoint(second.model).config.dynamic
    again = train_sequence(runs, tmp_path / "out", resume=True, progress=lambda *_: pytest.fail("it ran"))
    assert again == [first, second]


def test_bf16_trains(tmp_path: Path, small_recipe: Make) -> None:
    (tmp_path / "recipe.json").write_text(small_recipe(precision="bf16").model_dump_json())
    run = spawn(
        [tmp_path / "recipe.json"], tmp_path / "run"
    )  # its own process: accelerate keeps one precision for each
    _, errors = run.communicate(timeout=600)
    assert run.returncode == 0, errors
    train(small_recipe(), tmp_path / "fp32")
    half, full = (load_checkpoint(tmp_path / name / "model.safetensors").state for name in ("run", "fp32"))
    assert all(value.dtype == torch.float32 for value in half.values())
    assert any(not value.equal(full[name]) for name, value in half.items())


def spawn_two(recipes: list[Recipe], folder: Path) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of two processes that train together, one recipe after another."""
    files = [folder / f"recipe-{number}.json" for number in range(len(recipes))]
    for file, recipe in zip(files, recipes, strict=True):
        file.write_text(recipe.model_dump_json())
    with socket.socket() as probe_socket:
        probe_socket.bind(("127.0.0.1", 0))
        port = str(probe_socket.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    runs = [spawn(files, folder / "run", RANK=str(rank), LOCAL_RANK=str(rank), **common) for rank in (0, 1)]
    outputs = [run.communicate(timeout=600) for run in runs]
    return [(run.returncode, *output) for run, output in zip(runs, outputs, strict=True)]


def test_two_processes_train_one_model_or_are_both_refused(tmp_path: Path, dynamic_recipe: Make) -> None:
    """A run, and after it another one in the same place."""
    recipes = [dynamic_recipe(iterations=4, log_every=2, **more) for more in ({}, {"seed": 7})]
    ended = spawn_two(recipes, tmp_path)
    assert [len(printed.splitlines()) for _, printed, _ in ended] == [4, 0]  # the main process alone reports
    summary = json.loads((tmp_path / "run" / "train.json").read_text())
    assert summary["processes"] == 2
    assert [entry["iteration"] for entry in read_log(tmp_path / "run")] == [2, 4]
    for code, _, errors in ended:
        # Neither waits for the other.
        assert code == 1 and "ConfigError" in errors and "it differs in seed" in errors, (code, errors)


def test_the_static_gating_ignores_routers(dynamic_config: ModelConfig, randomised: Randomised) -> None:
    model = randomised(dynamic_config)
    x, t, y = torch.randn(2, 1, 16, 16), torch.tensor([5, 800]), torch.tensor([1, 2])
    with torch.no_grad():
        assert not torch.allclose(model(x, t, y), model(x, t, y, Static()))
