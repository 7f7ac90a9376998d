"""How runs end: refused, diverged, stopped, on a full disk, or finished and then made longer."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dydit.checkpoints.checkpoint import load_checkpoint
from dydit.errors import CheckpointError, ConfigError, DyditError, OutputError, TrainingError
from dydit.training.recipe import Recipe
from dydit.training.sequence import train_sequence
from dydit.training.state import read_log, states
from dydit.training.trainer import _Run, train

Make = Callable[..., Recipe]
ROOT = Path(__file__).parents[2]
SMALL = ["model.hidden_size=32", "model.depth=2", "model.num_heads=2", "model.patch_size=4", "batch_size=4"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def assert_line(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text and text
    return text


# Refused


@pytest.mark.parametrize(
    ("recipe", "overrides", "words"),
    [
        ("digits-dynamic", [], "starts from a static model; give its checkpoint with init=PATH"),
        ("digits-dynamic", ["init=nothing.safetensors"], "nothing.safetensors"),
        ("digits-dynamic", ["init={init}"], "is a model of other sizes"),
        ("digits-static", ["data=nothing"], "unknown data 'nothing'"),
        ("digits-static", ["model.input_size=8"], "but the model takes"),
        ("digits-static", ["batch_size=3"], "batch_size"),
        ("digits-static", ["nonsense=3"], "unknown setting 'nonsense'"),
        ("digits-static", ["learning_rate=fast"], "learning_rate"),
        ("digits-static", ["--resume"], "holds no run to resume; remove --resume"),
    ],
)
def test_a_refused_start_leaves_nothing_and_a_right_one_works_after_it(
    run: Any, make_checkpoint: Any, tmp_path: Path, recipe: str, overrides: list[str], words: str
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    init = str(make_checkpoint().path)
    call = ["train", "--recipe", recipe, "--out", place / "a" / "out", *(each.format(init=init) for each in overrides)]
    done = run(*call)
    assert done.code == 2 and done.out == "" and words in done.err and done.err.count("\n") == 1, done.err
    assert list(place.iterdir()) == []
    (place / "a").mkdir()
    (place / "a" / "out").mkdir()
    assert run(*call).code == 2
    assert list((place / "a" / "out").iterdir()) == []


def test_after_a_start_without_init_a_right_one_works(tmp_path: Path, small_recipe: Make, dynamic_config: Any) -> None:
    changes = {"stage": "dynamic", "model": dynamic_config, "iterations": 2}
    with pytest.raises(ConfigError, match="init=PATH"):
        train(small_recipe(**changes), tmp_path / "run")
    static = train(small_recipe(iterations=2), tmp_path / "static")
    train(small_recipe(**changes, init=str(static.model)), tmp_path / "run")


def test_one_process_at_a_time_trains_in_a_folder(tmp_path: Path, small_recipe: Make) -> None:
    refused: list[str] = []

    def try_another(done: int, total: int, entry: object) -> None:
        command = [sys.executable, "-m", "dydit", "train", "--recipe", "digits-static", "--resume", "--out"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        other = subprocess.run([*command, str(tmp_path / "run")], capture_output=True, text=True, env=environment)
        refused.append(other.stderr)
        assert other.returncode == 2

    train(small_recipe(iterations=1), tmp_path / "run", progress=try_another)
    (said,) = refused
    assert "another process is training in" in said and said.count("\n") == 1
    assert not (tmp_path / "run" / ".lock").exists()


# Diverged


def poison(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Weights that are NaN after the step of an iteration."""
    original = _Run.step

    def step(self: Any, iteration: int, batches: Any) -> None:
        original(self, iteration, batches)
        if iteration == at:
            with torch.no_grad():
                next(self.model.parameters())[..., 0] = float("nan")

    monkeypatch.setattr(_Run, "step", step)


@pytest.mark.parametrize("at", [0, 2, 3, 5, 10, 11])
def test_weights_that_are_not_finite_end_a_run_and_are_never_written(
    tmp_path: Path, small_recipe: Make, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """In 12 iterations with a line every 3 and a state every 4: before the first state, at one, between, at the end."""
    poison(monkeypatch, at)
    with pytest.raises(TrainingError) as caught:
        train(small_recipe(), tmp_path / "run")
    text = assert_line(caught.value)
    last = 4 * (at // 4)  # iterations of the state before
    assert "the run diverged: " in text and "not finite" in text and "learning_rate" in text
    assert (
        f"the last good state of the run is {tmp_path / 'run' / f'state-{last:08d}'}" if last else "no state was saved"
    ) in text
    saved = states(tmp_path / "run")
    assert [int(path.name[6:]) for path in saved] == ([last] if last else [])
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert not names & {"model.safetensors", "train.json", "curves.png", ".lock"}
    assert all(entry["iteration"] <= at for entry in read_log(tmp_path / "run"))


def test_a_learning_rate_that_is_far_too_high(
    tmp_path: Path, small_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the model computes overflows, so that no gradient is finite and no step is taken any more."""
    monkeypatch.setattr("dydit.training.trainer.HOPELESS", 5)
    with pytest.raises(TrainingError) as caught:
        train(small_recipe(learning_rate=1e6, iterations=50, grad_norm_limit=None, save_every=50), tmp_path / "run")
    assert "learning_rate below 1e+06" in assert_line(caught.value)
    assert not (tmp_path / "run" / "model.safetensors").exists() and states(tmp_path / "run") == []


# Stopped


RUN = """
import sys
from dydit.cli import main
from dydit.training import sequence
original = sequence.train
def slow(recipe, out, resume, progress):
    return original(recipe, out, resume, lambda done, total, entry: print(done, flush=True))
sequence.train = slow
sys.exit(main(sys.argv[1:]))
"""


def test_a_stopped_run_says_how_to_go_on(tmp_path: Path) -> None:
    command = ["train", "--recipe", "digits-static", *SMALL, "iterations=100000", "save_every=5", "--out"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, *command, str(tmp_path / "run")],
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= 7:
            process.send_signal(signal.SIGTERM)
            break
    _, said = process.communicate(timeout=600)
    assert process.returncode == 130, said
    (saved,) = states(tmp_path / "run")
    line = said.splitlines()[-1]
    assert said.count("dydit: error: ") == 1 and "Traceback" not in said, said
    assert "of 100000 iterations; the same command with --resume continues from its last state, iteration" in line
    assert line.endswith(f" {int(saved.name[6:])}") and not (tmp_path / "run" / ".lock").exists()


@pytest.mark.parametrize(("at", "words"), [(3, "from the beginning"), (9, "from its last state, iteration 8")])
def test_an_interrupted_run_says_how_to_go_on(tmp_path: Path, small_recipe: Make, at: int, words: str) -> None:
    def stop(done: int, total: int, entry: object) -> None:
        if done == at:
            raise KeyboardInterrupt

    with pytest.raises(
        KeyboardInterrupt, match=f"interrupted after {at} of 12 iterations; .* --resume continues {words}"
    ):
        train(small_recipe(), tmp_path / "run", progress=stop)
    before = signal.getsignal(signal.SIGTERM)
    train(small_recipe(), tmp_path / "run", resume=True)
    train(small_recipe(), tmp_path / "whole")
    assert signal.getsignal(signal.SIGTERM) is before
    for name in ("model.safetensors", "log.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# A disk that is full


def test_a_disk_that_fills_up_costs_no_state(tmp_path: Path, small_recipe: Make) -> None:
    """A limit on the size of files stands for the disk; then it is lifted."""
    train(small_recipe(iterations=4), tmp_path / "run")
    (state,) = states(tmp_path / "run")
    before = content(state)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises((OSError, OutputError), match="File too large"):
            train(small_recipe(iterations=8), tmp_path / "run", resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert states(tmp_path / "run") == [state] and content(state) == before
    assert not list((tmp_path / "run").glob(".*"))
    train(small_recipe(iterations=8), tmp_path / "run", resume=True)
    train(small_recipe(iterations=8), tmp_path / "whole")
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


def test_what_safetensors_says_of_a_full_disk_is_understood(
    tmp_path: Path, small_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import SafetensorError

    def full(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("dydit.training.state.save_file", full)
    with pytest.raises(OutputError, match=r"no space left on the disk that holds .*state-00000004; free some"):
        train(small_recipe(), tmp_path / "run")
    monkeypatch.undo()
    train(small_recipe(), tmp_path / "run", resume=True)


# Longer


@pytest.mark.parametrize(("first", "log_every"), [(8, 4), (7, 3)])
def test_a_finished_run_gets_longer_to_the_bits_of_an_undisturbed_one(
    tmp_path: Path, small_recipe: Make, first: int, log_every: int
) -> None:
    settings: dict[str, Any] = {"log_every": log_every, "save_every": 5}
    short = train(small_recipe(iterations=first, **settings), tmp_path / "run")
    assert not short.note and short.summary["iterations"] == first
    longer = small_recipe(iterations=12, **settings)
    made = train(longer, tmp_path / "run", resume=True)
    whole = train(longer, tmp_path / "whole")
    for name in ("model.safetensors", "log.jsonl", "recipe.json", "state-00000012/tensors.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert made.summary["made_longer_at"] == [first] and "made_longer_at" not in whole.summary
    equal = "its result equals that of a single run of 12 iterations"
    assert made.note == f"the run was made longer at iteration {first}; {equal}"
    again = train(longer, tmp_path / "run", resume=True, progress=lambda *_: pytest.fail("it ran"))
    assert "finished already" in again.note and again == made
    with pytest.raises(ConfigError, match="can be made longer, not shorter"):
        train(small_recipe(iterations=first, **settings), tmp_path / "run", resume=True)
    with pytest.raises(ConfigError, match=r"differs in .*seed"):
        train(small_recipe(iterations=20, seed=3, **settings), tmp_path / "run", resume=True)
    assert load_checkpoint(made.model).sha256 == load_checkpoint(whole.model).sha256


def test_a_schedule_over_all_iterations_is_said_to_differ(tmp_path: Path, small_recipe: Make) -> None:
    settings = {"learning_rate_schedule": "cosine"}
    train(small_recipe(iterations=4, **settings), tmp_path / "run")
    made = train(small_recipe(iterations=8, **settings), tmp_path / "run", resume=True)
    differs = "so its result differs slightly from that of a single run of 8 iterations"
    assert f"learning_rate_schedule followed the shorter run until then, {differs}" in made.note
    whole = train(small_recipe(iterations=8, **settings), tmp_path / "whole")
    assert made.model.read_bytes() != whole.model.read_bytes()


def test_a_finished_run_without_its_state_is_not_begun_again(tmp_path: Path, small_recipe: Make) -> None:
    """As earlier versions left it, or one whose weights were lost."""
    import shutil

    made = train(small_recipe(iterations=4), tmp_path / "run")
    kept = made.model.read_bytes()
    made.model.write_bytes(kept[:-1])
    assert train(small_recipe(iterations=4), tmp_path / "run", resume=True).model.read_bytes() == kept, "written again"
    shutil.rmtree(states(tmp_path / "run")[-1])
    before = content(tmp_path / "run")
    with pytest.raises(CheckpointError, match="holds a finished run, but not its last state, so it cannot be resumed"):
        train(small_recipe(iterations=8), tmp_path / "run", resume=True)
    assert content(tmp_path / "run") == before


def test_a_sequence_is_checked_before_its_first_run(tmp_path: Path, small_recipe: Make, dynamic_config: Any) -> None:
    def runs(static: int = 2, **changes: Any) -> tuple[Recipe, Recipe]:
        dynamic = {"stage": "dynamic", "model": dynamic_config, "init": None, "iterations": 2, **changes}
        return small_recipe(iterations=static), small_recipe(**dynamic)

    with pytest.raises(OutputError, match="holds no run to resume"):
        train_sequence(runs(), tmp_path / "out", resume=True)
    assert not (tmp_path / "out").exists()
    train_sequence(runs(), tmp_path / "out")
    before = content(tmp_path / "out")
    for other, words in (
        (runs(static=4), "dynamic started from the weights of .*static, which therefore cannot be made longer"),
        (runs(seed=9), "dynamic holds the run of another recipe; it differs in seed"),
    ):
        with pytest.raises(DyditError, match=words):
            train_sequence(other, tmp_path / "out", resume=True)
        assert content(tmp_path / "out") == before
    longer = train_sequence(runs(iterations=4), tmp_path / "out", resume=True)
    assert longer[1].summary["iterations"] == 4 and "finished already" in longer[0].note
