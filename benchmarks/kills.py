"""SIGKILL at random moments of export, training and bulk sampling: what was written stays, and a new run ends right.

    python benchmarks/kills.py --json docs/benchmarks/kills.json

Each job runs once undisturbed. Then it is started again and again, and killed at a moment drawn uniformly from the
time that it takes, until it was killed `--kills` times; a job that comes to its end first starts afresh. After every
kill the folder must hold nothing half-written, and nothing that was there before may be gone or different; after every
end its content must be that of the undisturbed run, byte for byte. Exit code 1 where that fails.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open

from dydit.bundle.bundle import Bundle
from dydit.errors import DyditError
from dydit.files import write_json
from dydit.quickstart.quickstart import ASSETS
from dydit.reports.results import Machine

Content = dict[str, str]
DYNAMIC = ASSETS / "dydit.safetensors"


@dataclass(frozen=True)
class Job:
    """A command that writes the folder `out`; `written` gives what must last, and fails where something is torn."""

    name: str
    command: Sequence[str]
    again: Sequence[str]  # what is added to the command when it goes on after a kill
    at_once: bool  # `out` appears complete or not at all, and the command refuses one that is there
    out: Path
    written: Callable[[Path], Content]


@dataclass
class Tally:
    """What happened to a job."""

    seconds: float
    kills: int = 0
    before_anything: int = 0  # kills that found no folder yet
    ends: int = 0
    faults: int = 0


def sha256(path: Path) -> str:
    """Of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def exported(out: Path) -> Content:
    """A bundle is there whole, or not at all."""
    return {name: entry.sha256 for name, entry in Bundle.open(out).manifest.files.items()}


def trained(out: Path) -> Content:
    """The finished model's weights; before that, the newest complete state must be readable."""
    for state in sorted(out.glob("state-*")):
        for file in state.glob("*.safetensors"):
            with safe_open(file, "np") as opened:
                for name in opened.keys():  # noqa: SIM118  (the handle is no mapping)
                    opened.get_tensor(name)
    model = out / "model.safetensors"
    if not model.is_file():
        return {}
    with safe_open(model, "np") as opened:
        tensors = {name: opened.get_tensor(name) for name in sorted(opened.keys())}
    return {name: hashlib.sha256(tensor.tobytes()).hexdigest() for name, tensor in tensors.items()}


def sampled(out: Path) -> Content:
    """Every picture and archive that has its final name."""
    for file in (out / ".work").glob("*.npz"):
        if not file.name.startswith("."):
            with np.load(file, allow_pickle=False) as arrays:
                assert np.isfinite(arrays["latents"]).all()
    return {path.name: sha256(path) for path in [*out.glob("[!.]*.png"), *out.glob("[!.]*.npz")]}


def jobs(work: Path, threads: str) -> list[Job]:
    """Small ones of each kind, each some seconds long."""
    dydit = [sys.executable, "-m", "dydit"]
    bundle, run, samples = work / "bundle", work / "run", work / "samples"
    ready = work / "ready"
    subprocess.run([*dydit, "-q", "export", DYNAMIC, "--out", ready, "--steps", "40", "--per-step"], check=True)
    small = ["iterations=60", "save_every=5", "log_every=5", "batch_size=16", "model.depth=2", "model.hidden_size=64"]
    sample = [
        *dydit,
        "sample",
        ready,
        "--labels",
        "0-9",
        "--num",
        "60",
        "--batch-size",
        "12",
        "--npz",
        "--out",
        samples,
    ]
    return [
        Job("export", [*dydit, "export", str(DYNAMIC), "--out", str(bundle), "--per-step"], [], True, bundle, exported),
        Job(
            "training",
            [*dydit, "train", "--recipe", "digits-static", "--out", str(run), *small],
            ["--resume"],
            False,
            run,
            trained,
        ),
        Job("bulk sampling", [*map(str, sample), "--threads", threads], [], False, samples, sampled),
    ]


def try_out(job: Job, kills: int, rng: random.Random) -> Tally:
    """Run a job to its end once, then kill it `kills` times."""
    start = time.perf_counter()
    subprocess.run(job.command, check=True, stdout=subprocess.DEVNULL)
    tally = Tally(time.perf_counter() - start)
    expected = job.written(job.out)
    shutil.rmtree(job.out)
    known: Content = {}
    while tally.kills < kills:
        again = job.again if job.out.exists() else ()
        process = subprocess.Popen([*job.command, *again], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            process.wait(rng.uniform(0, tally.seconds))
        except subprocess.TimeoutExpired:
            process.kill()
            tally.kills += 1
        said = process.communicate()[1].decode()
        ended = process.returncode == 0 or (job.at_once and job.out.exists())
        if not ended and process.returncode != -9:
            print(f"{job.name}: exit code {process.returncode}: {said}", file=sys.stderr)
            tally.faults += 1
        tally.before_anything += not job.out.exists()
        known = check(job, tally, known, expected if ended else None)
        if ended:
            tally.ends += 1
            shutil.rmtree(job.out)
            known = {}
        print(f"\r{job.name}: {tally.kills}/{kills} kills, {tally.ends} ends, {tally.faults} faults", end="")
    again = job.again if job.out.exists() else ()
    subprocess.run([*job.command, *again], check=True, stdout=subprocess.DEVNULL)
    check(job, tally, known, expected)
    tally.ends += 1
    print(
        f"\r{job.name}: {tally.kills} kills, {tally.ends} ends, {tally.faults} faults; one takes {tally.seconds:.1f} s"
    )
    return tally


def check(job: Job, tally: Tally, known: Content, expected: Content | None) -> Content:
    """Count what is lost, changed or torn; returns what is there."""
    if not job.out.exists():
        tally.faults += bool(known)
        return {}
    try:
        there = job.written(job.out)
    except (DyditError, OSError, ValueError, AssertionError) as error:
        print(f"\n{job.name}: {error}", file=sys.stderr)
        tally.faults += 1
        return {}
    if lost := [name for name in known if there.get(name) != known[name]]:
        print(f"\n{job.name}: {lost[0]} is lost or changed", file=sys.stderr)
        tally.faults += 1
    if expected is not None and there != expected:
        print(f"\n{job.name}: ended with another result than undisturbed", file=sys.stderr)
        tally.faults += 1
    return there


def main() -> int:
    """Run, print, and say by the exit code whether everything lasted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", default="1")
    parser.add_argument("--json", type=Path, help="file for the figures")
    given = parser.parse_args()
    rng = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as work:
        tallies = {job.name: try_out(job, given.kills, rng) for job in jobs(Path(work), given.threads)}
    if given.json:
        counts = {name: asdict(tally) for name, tally in tallies.items()}
        write_json(given.json, {"seed": given.seed, "jobs": counts, "machine": Machine.here().to_json()})
    return 1 if any(tally.faults for tally in tallies.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
