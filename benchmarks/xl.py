"""DiT-XL/2 in fp16 on a laptop: export, plan, sample, and one graph for every width.

    python benchmarks/xl.py --work DIR [--json docs/benchmarks/xl.json]

Random weights with routers set to a FLOPs ratio near 0.5; 250 DDPM steps, one image with guidance, on onnxruntime. What
takes memory runs as a process of its own, most of it as the command that a user would type; its peak is the largest
resident set (a page of the file that two sessions map counts twice). The parts:

  export    `dydit export --per-step --precision fp16`, and --dynamic-width, and --max-subnets 16
  plan      the optimal plans for every K from 1 to 250
  sample    `dydit sample`, all 250 steps, once on the per-step bundle, once on the sliding one
  exact     every 25th step of both from the same latents, decisions apart from values
  load      the 16 merged subnetworks against the sliding plan: until all is loaded
  step      milliseconds of a step, per-step against sliding, taking turns (`dydit.bench.bench`)

Each part is kept in DIR and not made again, so that a run that was stopped goes on. Bars are those of `BARS`; exit code
1 where one is missed. Takes about 25 minutes on two cores, 5 GB of disk, and nothing else should run beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dydit.bundle.bundle import Bundle
from dydit.files import write_json
from dydit.models.config import preset
from dydit.reports.results import Machine, Side, SideKind

PER_STEP, SLIDING, MERGED = "per-step", "sliding", "merged"
PLANS = {PER_STEP: ["--per-step"], SLIDING: ["--dynamic-width"], MERGED: ["--max-subnets", "16"]}
LABEL, EVERY = 207, 25
Part = dict[str, Any]
BARS: tuple[tuple[str, Callable[[Part], float], float], ...] = (
    ("export: seconds", lambda p: p["export"][PER_STEP]["seconds"], 90),
    ("export: peak memory, checkpoints", lambda p: p["export"][PER_STEP]["peak_of_checkpoint"], 1.6),
    ("export: bundle, dense fp16 models", lambda p: p["export"][PER_STEP]["bundle_of_dense"], 1.1),
    ("plan: seconds for every K", lambda p: p["plan"]["seconds"], 10),
    ("sample, per-step: peak memory, GB", lambda p: p["sample"][PER_STEP]["peak_bytes"] / 1e9, 4),
    ("sample, sliding: peak memory, dense fp16 models", lambda p: p["sample"][SLIDING]["peak_of_dense"], 1.4),
    ("exact: relative L2, sliding against per-step", lambda p: p["exact"]["worst"], 1e-4),
    ("load: sliding, of 16 merged subnetworks", lambda p: p["load"]["ratio"], 0.2),
    ("step: sliding, of per-step", lambda p: p["step"]["ratio"], 1.05),
)


def command(words: list[str]) -> tuple[float, int, str]:
    """Run a command; its seconds, its largest resident set in bytes, and what it printed. Raises where it fails."""
    start = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with exit code {process.returncode}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024, output


def dydit(*words: str | Path) -> tuple[float, int, str]:
    """`command`, of `dydit`."""
    return command([sys.executable, "-m", "dydit", *map(str, words)])


def in_child(work: Path, part: str, *words: str) -> Part:
    """A function of this script in a process of its own."""
    _, _, output = command([sys.executable, __file__, "--work", str(work), "--child", part, *words])
    values: Part = json.loads(output.splitlines()[-1])
    return values


def make_checkpoint(work: Path) -> Part:
    """The model, with random weights; how large it is."""
    from dydit.checkpoints.checkpoint import save_checkpoint
    from dydit.models.synthetic import synthetic_model

    config = preset("XL/2")
    model = synthetic_model(config, seed=0, flops_ratio=0.5)
    save_checkpoint(work / "xl.safetensors", model, config)
    static = sum(
        value.numel() for name, value in model.state_dict().items() if "_rate." not in name and "token_sel" not in name
    )
    return {"bytes": (work / "xl.safetensors").stat().st_size, "dense_fp16_bytes": 2 * static}


def measure_export(work: Path, done: Part) -> Part:
    """The three bundles."""
    made = {}
    for plan, words in PLANS.items():
        seconds, peak, output = dydit(
            *("export", work / "xl.safetensors", "--out", work / plan, *words, "--precision", "fp16", "--json")
        )
        facts = json.loads(output)
        made[plan] = {
            "seconds": seconds,
            "peak_bytes": peak,
            "peak_of_checkpoint": peak / done["checkpoint"]["bytes"],
            "bundle_bytes": facts["bytes"],
            "bundle_of_dense": facts["bytes"] / done["checkpoint"]["dense_fp16_bytes"],
            "subnets": facts["subnets"],
        }
    return made


def measure_plan(work: Path, done: Part) -> Part:
    """All optimal plans of the bundle's masks."""
    from dydit.planning.costs import macs_costs
    from dydit.planning.plan import optimal_plans

    masks = Bundle.open(work / PER_STEP, verify=False).masks
    start = time.perf_counter()
    plans = optimal_plans(masks, macs_costs(preset("XL/2")))
    seconds = time.perf_counter() - start
    exact = plans[-1].cost
    extra = {str(k): plans[k - 1].cost / exact - 1 for k in (8, 16, 32, 64)}
    return {"seconds": seconds, "plans": len(plans), "units": masks.shape[1], "extra_cost": extra}


def measure_sample(work: Path, done: Part) -> Part:
    """One image through every segment, on both bundles, and how far apart they end."""
    made: Part = {}
    latents = {}
    for plan in (PER_STEP, SLIDING):
        out, file = work / f"sample-{plan}", work / f"latents-{plan}.npz"
        shutil.rmtree(out, ignore_errors=True)  # a part is measured whole
        file.unlink(missing_ok=True)
        seconds, peak, output = dydit(
            *("sample", work / plan, "--labels", str(LABEL), "--out", out, "--latents-out", file, "--json")
        )
        with np.load(file) as arrays:
            latents[plan] = arrays["latents"]
        made[plan] = {
            "seconds": seconds,
            "peak_bytes": peak,
            "peak_of_dense": peak / done["checkpoint"]["dense_fp16_bytes"],
            "run": json.loads(output),
        }
    first, second = latents.values()
    made["relative_l2_of_the_run"] = float(np.linalg.norm(first - second) / np.linalg.norm(first))
    return made


def compare_steps(work: Path) -> Part:
    """Steps of both plans from the same latents: the worst relative L2 where all decisions agree."""
    from dydit.runtime.backends.registry import open_backend
    from dydit.runtime.loop import StepRunner
    from dydit.runtime.resident import ResidentSubnets

    rng, labels = np.random.default_rng(0), np.array([LABEL])
    backends = [open_backend("onnxruntime", Bundle.open(work / plan, verify=False)) for plan in (PER_STEP, SLIDING)]
    runners = [StepRunner(each, ResidentSubnets(each, 2, debug=True), labels, 4.0) for each in backends]
    steps, values, flips, decisions = [*range(0, 250, EVERY), 249], [], 0, 0
    for step in steps:
        x, noise = (rng.standard_normal((1, 4, 32, 32)).astype(np.float32) for _ in range(2))
        ours, theirs = (runner.run(step, x, noise, labels) for runner in runners)
        differ = int((ours.tokens != theirs.tokens).sum())
        flips, decisions = flips + differ, decisions + ours.tokens.size
        if not differ:
            distance = np.linalg.norm(ours.x_prev - theirs.x_prev) / np.linalg.norm(ours.x_prev)
            values.append(float(distance))
    return {"steps": steps, "compared": len(values), "worst": max(values), "flips": flips, "decisions": decisions}


def load_plan(work: Path, plan: str) -> Part:
    """Load all that a plan keeps resident, then make one step."""
    from dydit.runtime.backends.registry import open_backend
    from dydit.runtime.loop import StepRunner
    from dydit.runtime.resident import ResidentSubnets

    bundle, labels = Bundle.open(work / plan, verify=False), np.array([LABEL])
    count = 1 if plan == SLIDING else len(bundle.manifest.subnets)
    start = time.perf_counter()
    backend = open_backend("onnxruntime", bundle)
    subnets = ResidentSubnets(backend)
    for index in range(count):
        subnets.get(index)
    loaded = time.perf_counter() - start
    x = np.zeros((1, 4, 32, 32), np.float32)
    StepRunner(backend, subnets, labels, 4.0).run(0, x, x, labels)
    first = time.perf_counter() - start - loaded
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"subnets": count, "seconds": loaded, "first_step_seconds": first, "peak_bytes": peak}


def measure_load(work: Path, done: Part) -> Part:
    """The merged subnetworks, then the one graph."""
    made = {plan: in_child(work, "load", plan) for plan in (MERGED, SLIDING)}
    return {**made, "ratio": made[SLIDING]["seconds"] / made[MERGED]["seconds"]}


def measure_step(work: Path, done: Part) -> Part:
    """A step of either plan, side against side."""
    from dydit.bench.bench import BenchConfig, run_bench
    from dydit.bench.timing import Latents

    sides = [Side(name=plan, kind=SideKind.BUNDLE, path=str(work / plan)) for plan in (SLIDING, PER_STEP)]
    config = BenchConfig(labels=(LABEL,), steps_measured=4, repeats=5, latents=Latents.NOISE)
    report = run_bench(sides, config)
    return {"ratio": 1 / report.comparison(PER_STEP).median, "report": report.to_json()}


PARTS: dict[str, Callable[[Path, Part], Part]] = {
    "checkpoint": lambda work, _: in_child(work, "checkpoint"),
    "export": measure_export,
    "plan": measure_plan,
    "sample": measure_sample,
    "exact": lambda work, _: in_child(work, "exact"),
    "load": measure_load,
    "step": measure_step,
}
CHILDREN: dict[str, Callable[..., Part]] = {
    "checkpoint": make_checkpoint,
    "exact": compare_steps,
    "load": load_plan,
}


def main() -> int:
    """Measure what is not there yet, print, and say by the exit code whether the bars hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for models, bundles and parts")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    if given.child:
        print(json.dumps(CHILDREN[given.child[0]](given.work, *given.child[1:])))
        return 0
    done: Part = {}
    for name, measure in PARTS.items():
        file = given.work / f"{name}.json"
        if not file.exists():
            write_json(file, {**measure(given.work, done), "load_average": os.getloadavg()[0]})
        done[name] = json.loads(file.read_text())
        print(f"{name}: done", flush=True)
    held = {f"{title} {value(done):.3g}, at most {bar:g}": bool(value(done) <= bar) for title, value, bar in BARS}
    for title, holds in held.items():
        print("  holds " if holds else "  MISSED", title)
    if given.json:
        write_json(given.json, {"parts": done, "bars": held, "machine": Machine.here().to_json()})
    return 0 if all(held.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
