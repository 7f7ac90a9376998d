"""An export that is killed at any moment leaves no bundle or a whole one, and the next run clears up after it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from dydit.bundle.bundle import Bundle

# Forks one export after another from a process that has imported all it needs, so that a kill hits the export itself.
DRIVER = """
import json, os, signal, sys, time
from pathlib import Path

import torch

from dydit.bundle.bundle import Bundle
from dydit.export.exporter import export
from dydit.export.settings import ExportConfig
from dydit.checkpoints.checkpoint import load_checkpoint

torch.set_num_threads(1)
checkpoint, out = load_checkpoint(sys.argv[1]), Path(sys.argv[2])
config = ExportConfig.model_validate(json.loads(sys.argv[3]))
outcomes = []

def run(kill_after=None, kill_at=None):
    # Killed after so many seconds from outside, or when so many graphs have been written.
    def progress(done, total):
        if done == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    started = time.monotonic()
    child = os.fork()
    if not child:
        try:
            export(checkpoint, out, config, progress)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    if kill_after is not None:
        time.sleep(max(0.0, kill_after - (time.monotonic() - started)))
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, time.monotonic() - started

def look():
    # Beside its part a killed run leaves its lock, which the next one takes over.
    beside = [path for path in out.parent.iterdir() if path != out]
    parts = [path for path in beside if path.name.endswith(".part")]
    assert len(beside) - len(parts) <= 1, beside
    if out.exists():
        Bundle.open(out)  # raises where it is not whole
    return {"whole": out.exists(), "parts": len(parts), "files": sum(1 for part in parts for _ in part.iterdir())}

status, duration = run()
assert status == 0
os.rename(out, out.parent.parent / "reference")
written = []
for graph in (1, 3):
    status, _ = run(kill_at=graph)
    written.append({"status": status, **look()})
for index in range(3):
    status, _ = run(kill_after=duration * (index + 0.5) / 3)
    outcomes.append({"status": status, **look()})
    if out.exists():
        os.rename(out, out.parent.parent / f"whole-{index}")
status, _ = run()
left = [path.name for path in out.parent.iterdir() if path != out]
print(json.dumps({"written": written, "outcomes": outcomes, "last": status, "after": look(), "left": left}))
"""


def test_killed_at_any_moment(make_bundle, make_checkpoint, tmp_path):
    out = tmp_path / "place" / "out"
    out.parent.mkdir()
    settings = {"steps": 6, "plan": "per-step", "routing": "dynamic"}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "12345"}
    arguments = [str(make_checkpoint().path), str(out), json.dumps(settings)]
    run = subprocess.run(
        [sys.executable, "-c", DRIVER, *arguments], capture_output=True, text=True, env=environment, timeout=600
    )
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout.splitlines()[-1])
    # Two files and the graphs so far. Each run removes what the one before left: one part, not two.
    assert report["written"] == [{"status": -9, "whole": False, "parts": 1, "files": 2 + graph} for graph in (1, 3)]
    for each in report["outcomes"]:
        assert each["status"] in (0, -9) and each["parts"] <= 1
        assert each["whole"] or each["status"] == -9
    assert report["last"] == 0 and report["after"] == {"whole": True, "parts": 0, "files": 0} and not report["left"]
    # And the bytes are those of another process, with other hashes of strings.
    mine = make_bundle(steps=6, plan="per-step").path
    for path in (out, tmp_path / "reference"):
        assert {p.name: p.read_bytes() for p in path.iterdir()} == {p.name: p.read_bytes() for p in mine.iterdir()}
    Bundle.open(out)
