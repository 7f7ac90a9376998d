"""DiT-XL/2 in fp16 on a laptop: export, plan, sample, and one graph of dynamic width.

    python benchmarks/xl.py --work DIR [--json docs/benchmarks/xl.json]

It makes the figures for DiT-XL/2 on a CPU (docs/benchmarks/xl.json).

Random weights with routers set to a FLOPs ratio near 0.5; 250 DDPM steps, one image with guidance, on onnxruntime.
Whatever memory is measured of runs as a process of its own, most of it as the command that a user would type; its peak
is the largest resident set, where a page of the file that two sessions map counts twice. The parts:

  export    `dydit export --per-step --precision fp16`, and the same with --dynamic-width and with --max-subnets 16
  plan      the optimal plans for every K from 1 to 250
  sample    `dydit sample`, all 250 steps, on the per-step bundle and on the one of dynamic width
  exact     every 25th step of both from the same latents; values are compared where all token decisions agree
  load      the 16 merged subnetworks against the plan of dynamic width, until all is loaded
  step      milliseconds of a step, per-step against dynamic width, taking turns (`dydit.bench.bench`)

DIR keeps the result of each part, so that an interrupted run continues. `LIMITS` lists the limits; exit code 1 where
one is missed. It takes about 25 minutes on two cores and 5 GB of disk, and nothing else should run meanwhile.
--preset S/2 tries the script in minutes; the limits are for XL/2.
"""

from __future__ import annotations

import json
import resource
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dydit.bench.bench import BenchConfig, run_bench
from dydit.bench.scripts import finish, kept_part, random_checkpoint, run_dydit, run_process, script_parser
from dydit.bench.timing import Latents
from dydit.bundle.bundle import Bundle
from dydit.diffusion.steps import State
from dydit.models.dit.config import preset
from dydit.planning.costs import macs_costs
from dydit.planning.plan import optimal_plans
from dydit.reports.bench_report import Side, SideKind
from dydit.runtime.backends.registry import open_backend
from dydit.runtime.loop import StepRunner
from dydit.runtime.resident import ResidentSubnets

PER_STEP, DYNAMIC, MERGED = "per-step", "sliding", "merged"
PLANS = {PER_STEP: ["--per-step"], DYNAMIC: ["--dynamic-width"], MERGED: ["--max-subnets", "16"]}
LABEL, EVERY = 207, 25
Part = dict[str, Any]
LIMITS: tuple[tuple[str, Callable[[Part], float], float], ...] = (
    ("export: seconds", lambda p: p["export"][PER_STEP]["seconds"], 90),
    ("export: peak memory, checkpoints", lambda p: p["export"][PER_STEP]["peak_of_checkpoint"], 1.6),
    ("export: bundle, dense fp16 models", lambda p: p["export"][PER_STEP]["bundle_of_dense"], 1.1),
    ("plan: seconds for every K", lambda p: p["plan"]["seconds"], 10),
    ("sample, per-step: peak memory, GB", lambda p: p["sample"][PER_STEP]["peak_bytes"] / 1e9, 4),
    ("sample, sliding: peak memory, dense fp16 models", lambda p: p["sample"][DYNAMIC]["peak_of_dense"], 1.4),
    ("exact: relative L2, sliding against per-step", lambda p: p["exact"]["worst"], 1e-4),
    ("load: sliding, of 16 merged subnetworks", lambda p: p["load"]["ratio"], 0.2),
    ("step: sliding, of per-step", lambda p: p["step"]["ratio"], 1.05),
)


def in_child(work: Path, function: str, *words: str) -> Part:
    """A function of this script in a process of its own."""
    result = run_process([sys.executable, __file__, "--work", work, "--child", function, *words])
    values: Part = json.loads(result.output.splitlines()[-1])
    return values


def make_checkpoint(work: Path, name: str) -> Part:
    """The model, with random weights; its size, and that of its static form in fp16."""
    from dydit.checkpoints.fit import expected_shapes

    checkpoint = random_checkpoint(work / "xl.safetensors", preset(name))
    static = expected_shapes(checkpoint.config.without_routers())
    numbers = sum(checkpoint.state[each].numel() for each in static)
    return {"bytes": checkpoint.path.stat().st_size, "dense_fp16_bytes": 2 * numbers}


def measure_export(work: Path, done: Part) -> Part:
    """The three bundles."""
    part = {}
    for plan, words in PLANS.items():
        checkpoint, out = work / "xl.safetensors", work / plan
        result = run_dydit("export", checkpoint, "--out", out, *words, "--precision", "fp16", "--json")
        facts = json.loads(result.output)
        part[plan] = {
            "seconds": result.seconds,
            "peak_bytes": result.peak_bytes,
            "peak_of_checkpoint": result.peak_bytes / done["checkpoint"]["bytes"],
            "bundle_bytes": facts["bytes"],
            "bundle_of_dense": facts["bytes"] / done["checkpoint"]["dense_fp16_bytes"],
            "subnets": facts["subnets"],
        }
    return part


def measure_plan(work: Path, done: Part) -> Part:
    """All optimal plans of the bundle's masks."""
    bundle = Bundle.open(work / PER_STEP, verify=False)
    start = time.perf_counter()
    plans = optimal_plans(bundle.masks, macs_costs(bundle.manifest.model))
    seconds, exact = time.perf_counter() - start, plans[-1].cost
    extra = {str(k): plans[k - 1].cost / exact - 1 for k in (8, 16, 32, 64)}
    return {"seconds": seconds, "plans": len(plans), "units": bundle.masks.shape[1], "extra_cost": extra}


def measure_sample(work: Path, done: Part) -> Part:
    """One image through every segment, on both bundles, and how far apart the images are."""
    part: Part = {}
    latents = {}
    for plan in (PER_STEP, DYNAMIC):
        out, file = work / f"sample-{plan}", work / f"latents-{plan}.npz"
        shutil.rmtree(out, ignore_errors=True)  # a part is measured whole
        file.unlink(missing_ok=True)
        label = str(LABEL)
        result = run_dydit("sample", work / plan, "--labels", label, "--out", out, "--latents-out", file, "--json")
        with np.load(file) as arrays:
            latents[plan] = arrays["latents"]
        part[plan] = {
            "seconds": result.seconds,
            "peak_bytes": result.peak_bytes,
            "peak_of_dense": result.peak_bytes / done["checkpoint"]["dense_fp16_bytes"],
            "run": json.loads(result.output),
        }
    first, second = latents.values()
    part["relative_l2_of_the_run"] = float(np.linalg.norm(first - second) / np.linalg.norm(first))
    return part


def compare_steps(work: Path) -> Part:
    """Steps of both plans from the same latents: the worst relative L2 where all decisions agree."""
    rng, labels = np.random.default_rng(0), np.array([LABEL])
    backends = [open_backend("onnxruntime", Bundle.open(work / plan, verify=False)) for plan in (PER_STEP, DYNAMIC)]
    runners = [StepRunner(each, ResidentSubnets(each, 2, debug=True), labels, 4.0) for each in backends]
    steps, values, flips, decisions = [*range(0, 250, EVERY), 249], [], 0, 0
    for step in steps:
        x, noise = (rng.standard_normal((1, 4, 32, 32)).astype(np.float32) for _ in range(2))
        per_step, sliding = (runner.run(step, State(x), noise, labels) for runner in runners)
        differ = int((per_step.tokens != sliding.tokens).sum())
        flips, decisions = flips + differ, decisions + per_step.tokens.size
        if not differ:
            distance = np.linalg.norm(per_step.x_prev - sliding.x_prev) / np.linalg.norm(per_step.x_prev)
            values.append(float(distance))
    return {"steps": steps, "compared": len(values), "worst": max(values), "flips": flips, "decisions": decisions}


def load_plan(work: Path, plan: str) -> Part:
    """Load all that a plan keeps resident, then make one step."""
    bundle, labels = Bundle.open(work / plan, verify=False), np.array([LABEL])
    count = 1 if plan == DYNAMIC else len(bundle.manifest.subnets)
    start = time.perf_counter()
    backend = open_backend("onnxruntime", bundle)
    subnets = ResidentSubnets(backend)
    for index in range(count):
        subnets.get(index)
    loaded = time.perf_counter() - start
    x = np.zeros((1, 4, 32, 32), np.float32)
    StepRunner(backend, subnets, labels, 4.0).run(0, State(x), x, labels)
    first = time.perf_counter() - start - loaded
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"subnets": count, "seconds": loaded, "first_step_seconds": first, "peak_bytes": peak}


def measure_load(work: Path, done: Part) -> Part:
    """The merged subnetworks, then the graph of dynamic width."""
    part = {plan: in_child(work, "load", plan) for plan in (MERGED, DYNAMIC)}
    return {**part, "ratio": part[DYNAMIC]["seconds"] / part[MERGED]["seconds"]}


def measure_step(work: Path, done: Part) -> Part:
    """A step of either plan, taking turns."""
    sides = [Side(name=plan, kind=SideKind.BUNDLE, path=str(work / plan)) for plan in (DYNAMIC, PER_STEP)]
    config = BenchConfig(labels=(LABEL,), steps_measured=4, repeats=5, latents=Latents.NOISE)
    report = run_bench(sides, config)
    return {"ratio": 1 / report.comparison(PER_STEP).median, "report": report.to_json()}


CHILDREN: dict[str, Callable[..., Part]] = {"checkpoint": make_checkpoint, "exact": compare_steps, "load": load_plan}


def main() -> int:
    """Measure the parts that are not there yet, print, and tell by the exit code whether the limits hold."""
    parser = script_parser(__doc__, preset="XL/2")
    parser.add_argument("--work", type=Path, required=True, help="folder for models, bundles and results")
    parser.add_argument("--child", nargs="+", help="(internal) run one function of this script")
    options = parser.parse_args()
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    if options.child:
        print(json.dumps(CHILDREN[options.child[0]](work, *options.child[1:])))
        return 0
    parts: dict[str, Callable[[Path, Part], Part]] = {
        "checkpoint": lambda work, _: in_child(work, "checkpoint", options.preset),
        "export": measure_export,
        "plan": measure_plan,
        "sample": measure_sample,
        "exact": lambda work, _: in_child(work, "exact"),
        "load": measure_load,
        "step": measure_step,
    }
    done: Part = {}
    for name, measure in parts.items():
        done[name] = kept_part(work / f"{name}.json", partial(measure, work, done))
        print(f"{name}: done", flush=True)
    limits = {
        f"{title} {value(done):.3g}, at most {most:g}": bool(value(done) <= most) for title, value, most in LIMITS
    }
    return finish(options, {"parts": done}, limits)


if __name__ == "__main__":
    sys.exit(main())
