"""Two runs that write one output at once: one wins, the other is told, and nothing is half of each."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dydit.bundle.bundle import Bundle

RUN = """
import contextlib, io, json, sys, time
from pathlib import Path
import torch, onnxruntime
from dydit.cli import main
number, meeting, told = int(sys.argv[1]), Path(sys.argv[2]), {}
for name, words in json.loads(sys.argv[3]).items():
    (meeting / f"{name}-{number}").touch()
    while not (meeting / f"{name}-{1 - number}").exists():
        time.sleep(0.001)
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()) as out:
        code = main([*words, "--quiet"])
    told[name] = code, err.getvalue()
print(json.dumps(told))
"""
REFUSALS = ("another process is writing", "exists already", "another process is sampling", "holds a run with other")


@pytest.fixture(scope="module")
def told(make_bundle, make_checkpoint, tmp_path_factory) -> tuple[Path, list[dict[str, tuple[int, str]]]]:
    """Every command, run by two processes at the same time; the folder, and what each was told."""
    folder: Path = tmp_path_factory.mktemp("two")
    bundle, checkpoint = str(make_bundle(steps=2, plan="sliding").path), str(make_checkpoint().path)
    (folder / "meeting").mkdir()

    def words(number: int) -> dict[str, list[str]]:
        sample = ["sample", bundle, "--labels", "1,2", "--out"]
        calibrate = ["calibrate", checkpoint, "--steps", "2", "--samples", "8", "--held-out", "8", "--quantile", "0.5"]
        return {
            "convert": ["convert", checkpoint, "--out", str(folder / "f.safetensors")],
            "export": ["export", checkpoint, "--steps", "2", "--per-step", "--out", str(folder / "bundle")],
            "parity": ["parity", bundle, "--against", checkpoint, "--out", str(folder / "parity")],
            "inspect": ["inspect", bundle, "--out", str(folder / "inspect")],
            "same run": [*sample, str(folder / "same")],
            "other run": [*sample, str(folder / "other"), "--seed", str(number)],
            "same latents": [
                *[*sample, str(folder / f"own-{number}"), "--seed", str(number)],
                *["--latents-out", str(folder / "latents.npz")],
            ],
            "calibrate": [*calibrate, "--batch-size", "4", "--out", str(folder / "c.json")],
        }

    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RUN, str(number), str(folder / "meeting"), json.dumps(words(number))],
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    return folder, [json.loads(process.communicate(timeout=300)[0]) for process in processes]


@pytest.mark.parametrize(
    "name", ["convert", "export", "parity", "inspect", "same run", "other run", "same latents", "calibrate"]
)
def test_one_wins_and_the_other_is_told(told, name: str) -> None:
    codes, lines = zip(*(each[name] for each in told[1]), strict=True)
    if name == "same run" and codes == (0, 0):
        return  # one came when the other was through, and found the run complete
    assert sorted(codes) == [0, 2], lines
    (line,) = [line for line in lines if line]
    assert line.startswith("dydit: error: ") and line.count("\n") == 1
    assert any(words in line for words in REFUSALS), line


def test_the_results_are_the_winners_and_whole(told) -> None:
    folder, answers = told
    Bundle.open(folder / "bundle")
    winner = next(number for number, each in enumerate(answers) if each["same latents"][0] == 0)
    facts = json.loads((folder / f"own-{winner}" / "samples.json").read_text())
    assert facts["settings"]["latents_out"] == str(folder / "latents.npz")
    latents = folder / f"own-{winner}" / "latents.npz"
    assert latents.read_bytes() == (folder / "latents.npz").read_bytes()
    with np.load(folder / "same" / "latents.npz", allow_pickle=False) as file:
        assert file["labels"].tolist() == [1, 2]
    json.loads((folder / "c.json").read_text())
    left = [path.name for path in folder.rglob(".*") if path.name != ".work"]
    assert not [name for name in left if name.endswith(".part") or name.endswith(".work")], left
