"""SIGKILL at random moments of export, training and bulk sampling: what was written stays, and a new run ends right.

    python benchmarks/kills.py [--kills 20] [--json docs/benchmarks/kills.json]

It makes the figures for killed commands (docs/benchmarks/kills.json).

Each job runs once without interruption. Then it is started again and again and killed at a moment drawn uniformly from
the time that it takes, until it has been killed `--kills` times; where it comes to its end first, it starts afresh.
After every kill the folder must hold nothing half-written, and nothing that was there before may be gone or different;
after every end its content must equal that of the uninterrupted run, byte for byte. Exit code 1 where that fails.
"""

from __future__ import annotations

import hashlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open

from dydit.bench.scripts import finish, run_dydit, script_parser
from dydit.bundle.bundle import Bundle
from dydit.errors import DyditError
from dydit.files import sha256_of
from dydit.quickstart.quickstart import ASSETS
from dydit.training.training_folder import has_run

Content = dict[str, str]
"""What must last, by name: SHA-256 sums."""
DYNAMIC = ASSETS / "dydit.safetensors"


@dataclass(frozen=True)
class Job:
    """A command that writes the folder `out`; `content` reads what must last, and raises where something is torn.

    `atomic`: `out` appears complete or not at all, and the command refuses an `out` that is there.
    """

    name: str
    words: tuple[str, ...]
    out: Path
    content: Callable[[Path], Content]
    atomic: bool = False

    def command(self) -> list[str]:
        """The command to start or to continue; training refuses `--resume` where no run was begun."""
        resume = ["--resume"] if self.words[0] == "train" and has_run(self.out) else []
        return [sys.executable, "-m", "dydit", *self.words, *resume]


@dataclass
class Tally:
    """What happened to a job. `before_anything`: kills at which the folder did not exist yet."""

    seconds: float
    kills: int = 0
    before_anything: int = 0
    ends: int = 0
    faults: int = 0


def exported(out: Path) -> Content:
    """The files of a bundle, which is there completely or not at all."""
    return {name: entry.sha256 for name, entry in Bundle.open(out).manifest.files.items()}


def trained(out: Path) -> Content:
    """The weights of the finished model; before that, complete states must be readable."""
    for file in sorted(out.glob("state-*/*.safetensors")):
        tensor_sums(file)
    return tensor_sums(out / "model.safetensors") if (out / "model.safetensors").is_file() else {}


def tensor_sums(file: Path) -> Content:
    """SHA-256 of each tensor of a file."""
    with safe_open(file, "np") as opened:
        return {name: hashlib.sha256(opened.get_tensor(name).tobytes()).hexdigest() for name in sorted(opened.keys())}


def sampled(out: Path) -> Content:
    """Every picture and archive that has its final name; latents of unfinished batches must be readable."""
    for file in (out / ".work").glob("[!.]*.npz"):
        with np.load(file, allow_pickle=False) as arrays:
            assert np.isfinite(arrays["latents"]).all()
    return {path.name: sha256_of(path) for path in [*out.glob("[!.]*.png"), *out.glob("[!.]*.npz")]}


def jobs(work: Path, threads: int) -> list[Job]:
    """Small jobs of each kind, each some seconds long."""
    bundle, run, samples, ready = (work / name for name in ("bundle", "run", "samples", "ready"))
    run_dydit("-q", "export", DYNAMIC, "--out", ready, "--steps", "40", "--per-step")
    small = ("iterations=60", "save_every=5", "log_every=5", "batch_size=16", "model.depth=2", "model.hidden_size=64")
    export = ("export", str(DYNAMIC), "--out", str(bundle), "--per-step")
    train = ("train", "--recipe", "digits-static", "--out", str(run), *small)
    images = ("--labels", "0-9", "--num", "60", "--batch-size", "12", "--npz", "--threads", str(threads))
    return [
        Job("export", export, bundle, exported, atomic=True),
        Job("training", train, run, trained),
        Job("bulk sampling", ("sample", str(ready), "--out", str(samples), *images), samples, sampled),
    ]


def try_out(job: Job, kills: int, rng: random.Random) -> Tally:
    """Run a job to its end once, then kill it `kills` times, then let it end."""
    start = time.perf_counter()
    subprocess.run(job.command(), check=True, stdout=subprocess.DEVNULL)
    tally = Tally(time.perf_counter() - start)
    expected = job.content(job.out)
    shutil.rmtree(job.out)
    known: Content = {}
    while tally.kills < kills:
        process = subprocess.Popen(job.command(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            process.wait(rng.uniform(0, tally.seconds))
        except subprocess.TimeoutExpired:
            process.kill()
            tally.kills += 1
        errors = process.communicate()[1].decode()
        ended = process.returncode == 0 or (job.atomic and job.out.exists())
        if not ended and process.returncode != -9:
            fault(job, tally, f"exit code {process.returncode}: {errors}")
        tally.before_anything += not job.out.exists()
        known = check(job, tally, known, expected if ended else None)
        if ended:
            tally.ends += 1
            shutil.rmtree(job.out)
            known = {}
        print(f"\r{job.name}: {tally.kills}/{kills} kills, {tally.ends} ends, {tally.faults} faults", end="")
    subprocess.run(job.command(), check=True, stdout=subprocess.DEVNULL)
    check(job, tally, known, expected)
    tally.ends += 1
    counts = f"{tally.kills} kills, {tally.ends} ends, {tally.faults} faults"
    print(f"\r{job.name}: {counts}; a run takes {tally.seconds:.1f} s")
    return tally


def fault(job: Job, tally: Tally, text: str) -> None:
    """Count and print a fault."""
    tally.faults += 1
    print(f"\n{job.name}: {text}", file=sys.stderr)


def check(job: Job, tally: Tally, known: Content, expected: Content | None) -> Content:
    """Count what is lost, changed or torn; returns what is in the folder. `expected`: after an end."""
    if not job.out.exists():
        if known:
            fault(job, tally, f"{job.out} is gone")
        return {}
    try:
        content = job.content(job.out)
    except (DyditError, OSError, ValueError, AssertionError) as error:
        fault(job, tally, str(error))
        return {}
    if lost := [name for name in known if content.get(name) != known[name]]:
        fault(job, tally, f"{lost[0]} is lost or changed")
    if expected is not None and content != expected:
        fault(job, tally, "ended with another result than without interruption")
    return content


def main() -> int:
    """Run, print, and tell by the exit code whether everything lasted."""
    parser = script_parser(__doc__, kills=20, seed=0, threads=1)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as work:
        tallies = {job.name: try_out(job, options.kills, rng) for job in jobs(Path(work), options.threads)}
    report = {"seed": options.seed, "jobs": {name: asdict(tally) for name, tally in tallies.items()}}
    return finish(options, report, {f"{name}: no faults": not tally.faults for name, tally in tallies.items()})


if __name__ == "__main__":
    sys.exit(main())
