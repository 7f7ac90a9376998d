"""Whose a folder is: one process at a time works in it, and what is there is the run that is asked for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dydit.errors import CheckpointError, ConfigError, OutputError
from dydit.files import write_json
from dydit.locks import FileLock
from dydit.models.config import ModelConfig
from dydit.training.recipe import Recipe
from dydit.training.training_folder import check_folder, finished_summary, held_folder, identity

Make = Callable[..., Recipe]


def begun(out: Path, recipe: Recipe) -> None:
    """As a run that was begun leaves it."""
    out.mkdir(parents=True)
    write_json(out / "recipe.json", identity(recipe))


def test_a_folder_that_holds_a_run_is_resumed_or_refused(tmp_path: Path, small_recipe: Make) -> None:
    recipe = small_recipe()
    check_folder(tmp_path / "a" / "run", recipe, resume=False)
    assert list(tmp_path.iterdir()) == []
    begun(tmp_path / "a" / "run", recipe)
    with pytest.raises(OutputError, match=r"not empty.*--resume"):
        check_folder(tmp_path / "a" / "run", recipe, resume=False)
    check_folder(tmp_path / "a" / "run", recipe, resume=True)


def test_what_a_killed_write_left_does_not_count(tmp_path: Path, small_recipe: Make) -> None:
    (tmp_path / ".recipe.json.abc.part").write_text("{")
    (tmp_path / ".lock").touch()
    check_folder(tmp_path, small_recipe(), resume=False)


def test_another_recipe_is_refused_naming_what_differs(
    tmp_path: Path, small_recipe: Make, dynamic_config: ModelConfig
) -> None:
    begun(tmp_path / "run", small_recipe())
    other = small_recipe(seed=5, stage="dynamic", model=dynamic_config)
    with pytest.raises(ConfigError) as caught:
        check_folder(tmp_path / "run", other, resume=True)
    text = str(caught.value)
    assert (
        "seed (0 in the folder, 5 requested)" in text
        and "model.routers (none in the folder, first-on requested)" in text
    )
    assert "iterations" not in text


def test_a_run_may_get_longer_and_nothing_else(tmp_path: Path, small_recipe: Make) -> None:
    begun(tmp_path / "run", small_recipe(iterations=12))
    check_folder(tmp_path / "run", small_recipe(iterations=13), resume=True)
    with pytest.raises(
        ConfigError, match="holds a run of 12 iterations, but 11 are requested; a run can be made longer, not"
    ):
        check_folder(tmp_path / "run", small_recipe(iterations=11), resume=True)
    with pytest.raises(
        ConfigError,
        match=r"differs in iterations \(12 in the folder, 13 requested\), seed \(0 in the folder, 1 requested",
    ):
        check_folder(tmp_path / "run", small_recipe(iterations=13, seed=1), resume=True)


def test_a_run_of_before_a_setting_existed_has_its_default(tmp_path: Path, small_recipe: Make) -> None:
    recipe = small_recipe()
    out = tmp_path / "run"
    begun(out, recipe)
    values = json.loads((out / "recipe.json").read_text())
    for name in ("betas", "accumulate", "compile", "trackers", "sample_every"):
        del values[name]
    (out / "recipe.json").write_text(json.dumps(values))
    check_folder(out, recipe, resume=True)
    with pytest.raises(
        ConfigError, match=r"differs in betas \(\[0.9, 0.999\] in the folder, \[0.9, 0.95\] requested\)"
    ):
        check_folder(out, small_recipe(betas=(0.9, 0.95)), resume=True)
    del values["learning_rate"], values["stage"]
    (out / "recipe.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"differs in learning_rate \(0.0001 in the folder.*stage \(None"):
        check_folder(out, recipe, resume=True)


def test_a_start_is_known_by_its_content(tmp_path: Path, small_recipe: Make) -> None:
    for name, content in (("a", "x"), ("b", "x"), ("c", "y")):
        (tmp_path / name).write_text(content)
    begun(tmp_path / "run", small_recipe(init=str(tmp_path / "a")))
    check_folder(tmp_path / "run", small_recipe(init=str(tmp_path / "b")), resume=True)
    with pytest.raises(ConfigError, match="init"):
        check_folder(tmp_path / "run", small_recipe(init=str(tmp_path / "c")), resume=True)
    with pytest.raises(CheckpointError, match=r"gone does not exist, so it is unknown whether the run in .* started"):
        check_folder(tmp_path / "run", small_recipe(init=str(tmp_path / "gone")), resume=True)


@pytest.mark.parametrize("content", ["{", "[]", "", "\udc80"])
def test_a_folder_of_something_else_is_not_resumed(tmp_path: Path, small_recipe: Make, content: str) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(OutputError, match="holds no run"):
        check_folder(tmp_path, small_recipe(), resume=True)
    for name in ("recipe.json", "train.json"):
        (tmp_path / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(OutputError, match=r"recipe\.json is damaged .*; start again in another folder"):
        check_folder(tmp_path, small_recipe(), resume=True)
    with pytest.raises(OutputError, match=r"train\.json is damaged .*; remove it and use --resume to write it again"):
        finished_summary(tmp_path, small_recipe())


def test_a_finished_run_whose_weights_are_not_whole_is_not_finished(tmp_path: Path, small_recipe: Make) -> None:
    recipe = small_recipe()
    summary = {"iterations": recipe.iterations, "model_sha256": "0" * 64}
    write_json(tmp_path / "train.json", summary)
    assert finished_summary(tmp_path, recipe) is None, "there are no weights"
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    assert finished_summary(tmp_path, recipe) is None, "they are others"
    write_json(tmp_path / "train.json", {"iterations": recipe.iterations})  # as earlier versions wrote it
    assert finished_summary(tmp_path, recipe) is not None
    assert finished_summary(tmp_path, small_recipe(iterations=recipe.iterations + 1)) is None


def test_folders_that_were_made_go_where_nothing_is_put_in(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), held_folder(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / ".lock").is_file()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with held_folder(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "file").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["file"]


HOLD = """
import sys, time
from pathlib import Path
from dydit.locks import FileLock
with FileLock(Path(sys.argv[1]), temporary=True).require("busy"):
    print("held", flush=True)
    time.sleep(3600)
"""


def test_a_lock_goes_with_its_process(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    with pytest.raises(OutputError, match="they are busy"), FileLock(lock).require("they are busy"):
        pytest.fail("two hold it")
    with pytest.raises(OutputError, match="another process is training in"), held_folder(tmp_path):
        pytest.fail("two hold it")
    other.send_signal(signal.SIGKILL)
    other.communicate()
    with FileLock(lock, temporary=True).require("busy"):
        assert lock.is_file()
    assert not lock.exists()
