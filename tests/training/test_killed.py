"""Sequences of runs on prepared data that are killed at any moment, and go on to the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dydit.commands.progress import Progress
from dydit.data.prepare import prepare
from dydit.data.prepare_settings import PrepareSettings
from dydit.training.recipe import Stage

ROOT = Path(__file__).parents[2]
BATCH, IMAGES, SAVED_EVERY = 8, 23, 3

# Forks one run after another from a process that has imported all it needs, so that a kill hits the run itself.
DRIVER = """
import json, os, random, signal, sys, time
from pathlib import Path

import torch

torch.set_num_threads(1)  # in each process that is forked, too

import accelerate
import matplotlib.figure

import dydit.models.pixart.model
import dydit.training.trainer
from dydit.training.recipe import Recipe
from dydit.training.sequence import train_sequence
from dydit.training.state import states
from dydit.training.training_folder import has_run

recipes = [Recipe.model_validate(values) for values in json.loads(sys.argv[1])]
out, wanted = Path(sys.argv[2]), int(sys.argv[3])

def run(folder, kill_after=None):
    # The exit code of a run, which is killed some time after so many iterations.
    told, tell = os.pipe()
    child = os.fork()
    if not child:
        try:
            resume = any(has_run(folder / each.stage) for each in recipes)
            train_sequence(recipes, folder, resume, progress=lambda *_: os.write(tell, b"."))
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    os.close(tell)
    if kill_after is not None:
        while kill_after and os.read(told, 1):
            kill_after -= 1
        time.sleep(random.uniform(0, 0.1))  # anywhere: in a step, in writing a state, in drawing curves
        os.kill(child, signal.SIGKILL)
    os.close(told)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

assert run(out / "reference") == 0
random.seed(4)
outcomes, moments, folders = [], [], 0
while outcomes.count(-signal.SIGKILL) < wanted:
    folder, folders = out / f"killed-{folders}", folders + 1
    for _ in range(5):
        outcomes.append(run(folder, random.randrange(18)))
        kept = [(each.stage, path.name) for each in recipes for path in states(folder / each.stage)[-1:]]
        moments.append([kept[-1][0], int(kept[-1][1][6:])] if kept else None)
        if outcomes[-1] == 0 or outcomes.count(-signal.SIGKILL) == wanted:
            break
    assert run(folder) == 0
print(json.dumps({"outcomes": outcomes, "moments": moments, "folders": folders}))
"""


def content(folder: Path) -> dict[str, object]:
    """Every file of a run, without what tells the time that it took."""
    files: dict[str, object] = {}
    for path in sorted(each for each in folder.rglob("*") if each.is_file()):
        name = str(path.relative_to(folder))
        files[name] = path.read_bytes()
        if path.name in ("train.json", "state.json"):
            files[name] = {key: value for key, value in json.loads(path.read_text()).items() if key != "seconds"}
    return files


@pytest.mark.parametrize(
    ("kills", "stages"),
    [(2, (Stage.STATIC, Stage.DYNAMIC)), pytest.param(10, tuple(Stage), marks=pytest.mark.release)],
    ids=["2", "10"],
)
def test_killed_at_any_moment_a_sequence_ends_with_the_same_bytes(
    autoencoder: Any,
    text_encoder: Path,
    pixart_config: Any,
    small_recipe: Callable[..., Any],
    tmp_path: Path,
    kills: int,
    stages: tuple[Stage, ...],
) -> None:
    """Latents that are drawn anew in each epoch, mirrored or not, with one of several captions: all of it random."""
    models = {"vae": str(autoencoder.folder), "text_encoder": str(text_encoder), "text_tokens": 12}
    settings = {"source": "emoji", "limit": IMAGES, "size": 16, "shard_size": 9, "mirror": True, **models}
    prepare(PrepareSettings.model_validate(settings), tmp_path / "data", 1, Progress())
    recipes = []
    for stage in stages:
        model = {**pixart_config.model_dump(mode="json"), "routers": "none" if stage == "static" else "first-on"}
        values = {"model": model, "data": str(tmp_path / "data"), "batch_size": BATCH, "save_every": SAVED_EVERY}
        recipes.append(small_recipe(name=f"small-{stage}", stage=stage.value, iterations=14, **values))
    written = json.dumps([each.model_dump(mode="json") for each in recipes])
    (tmp_path / "runs").mkdir()
    call = [sys.executable, "-c", DRIVER, written, str(tmp_path / "runs"), str(kills)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(call, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["outcomes"].count(-signal.SIGKILL) == kills and set(facts["outcomes"]) <= {0, -signal.SIGKILL}, facts
    killed_at = [at for at, code in zip(facts["moments"], facts["outcomes"], strict=True) if code and at is not None]
    inside = [(stage, done) for stage, done in killed_at if done < 14 and done * BATCH % IMAGES]
    assert inside, f"none was killed in the middle of an epoch, after its first state: {facts}"
    assert kills < 10 or len({stage for stage, _ in killed_at}) > 1, facts
    reference = content(tmp_path / "runs" / "reference")
    assert {f"{stage}/{name}" for stage in stages for name in ("model.safetensors", "log.jsonl")} <= set(reference)
    assert not [name for name in reference if "/." in name]
    for number in range(facts["folders"]):
        assert content(tmp_path / "runs" / f"killed-{number}") == reference
