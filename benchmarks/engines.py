"""Engines built ahead of time by TensorRT for RTX, without a GPU: how long it takes, and in how much memory.

    python benchmarks/engines.py --digits --xl --sliding [--jobs 2] [--json docs/benchmarks/engines.json]

It makes the figures for building engines (docs/benchmarks/engines.json).

--digits: the shipped model with a subnetwork for each distinct mask of its 250 steps, and a model of the same sizes
with random weights, whose masks nearly all differ, so that close to 250 graphs are built. --xl: DiT-XL/2 in fp16 with
16 subnetworks, random weights and routers set to a FLOPs ratio near 0.5. --sliding: the same model as one graph of
dynamic width. All have capacity routing with a slot for every token. `dydit build` builds each bundle in a process of
its own, then a second time with nothing changed. --tiny is a small model for trying the script; it has no limits.

Limits, for two cores: the engines of each digits model in 240 s, those of DiT-XL/2 in 360 s with all processes together
below 12 GB, and 5 s for the second time; the engine of dynamic width in 60 s, its file below 200 MB, which leaves no
room for block weights. Exit code 1 where one is missed. Times are of the whole command, with starting the interpreter
and verifying the bundle. Nothing else should run on the machine; the load average is in the report. Temporary files
need 16 GB of disk.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from dydit.bench.scripts import bundle_bytes, finish, random_checkpoint, run_dydit, script_parser
from dydit.bundle.bundle import Bundle
from dydit.bundle.manifest import DYNAMIC_WIDTH_GRAPH, PlanKind, Routing
from dydit.bundle.stored_weights import Precision
from dydit.checkpoints.checkpoint import load_checkpoint
from dydit.export.exporter import export
from dydit.export.settings import ExportConfig
from dydit.models.dit.config import preset
from dydit.quickstart.quickstart import ASSETS

DIGITS_SECONDS, XL_SECONDS, AGAIN_SECONDS, XL_BYTES = 240.0, 360.0, 5.0, 12_000_000_000
DYNAMIC_WIDTH_SECONDS, DYNAMIC_WIDTH_BYTES = 60.0, 200_000_000
CONFIGS = {
    "digits": ExportConfig(plan=PlanKind.PER_STEP, routing=Routing.CAPACITY),
    "digits-distinct": ExportConfig(plan=PlanKind.PER_STEP, routing=Routing.CAPACITY),
    "xl": ExportConfig(max_subnets=16, routing=Routing.CAPACITY, precision=Precision.FP16),
    "sliding": ExportConfig(plan=PlanKind.DYNAMIC_WIDTH, routing=Routing.CAPACITY, precision=Precision.FP16),
    "tiny": ExportConfig(steps=4, max_subnets=1, routing=Routing.CAPACITY, max_batch=1),
}


Part = dict[str, Any]


def build(bundle: Bundle, jobs: int) -> Part:
    """Build a bundle's engines twice. Raises `RuntimeError` where that fails, or where the second time builds any.

    `peak_bytes`: most memory of all processes of the first build together, the sum of their resident sets, so that a
    page that two of them share counts twice. `sliding_...`: of the engine of dynamic width, where there is one.
    """
    words = ("build", bundle.path, "--flavour", "tensorrt-rtx", "--jobs", str(jobs), "--json")
    first, second = (run_dydit(*words, with_children=True) for _ in range(2))
    report, repeated = json.loads(first.output), json.loads(second.output)
    if repeated["built"] or not report["built"]:
        raise RuntimeError(f"{len(report['built'])} engines were built, and then {len(repeated['built'])} again")
    sliding = next((each for each in report["built"] if each["graph"] == DYNAMIC_WIDTH_GRAPH), {})
    return {
        "steps": bundle.manifest.sampling.steps,
        "subnetworks": len(bundle.manifest.subnets),
        "engines": len(report["built"]),
        "bundle_bytes": bundle_bytes(bundle),
        "engine_bytes": report["bytes"],
        "seconds": first.seconds,
        "slowest_engine_seconds": max(each["seconds"] for each in report["built"]),
        "peak_bytes": first.peak_bytes,
        "again_seconds": second.seconds,
        "sliding_seconds": sliding.get("seconds"),
        "sliding_bytes": sliding.get("bytes"),
    }


def make_bundle(part: str, folder: Path) -> Bundle:
    """Export the bundle of a part into `folder`; all but `digits` have random weights."""
    shipped = load_checkpoint(ASSETS / "dydit.safetensors")
    if part == "digits":
        checkpoint = shipped
    else:
        sizes = shipped.config if part in ("digits-distinct", "tiny") else preset("XL/2")
        sizes = sizes.model_copy(update={"depth": 1}) if part == "tiny" else sizes
        checkpoint = random_checkpoint(folder / "model.safetensors", sizes)
    bundle = export(checkpoint, folder / "bundle", CONFIGS[part])
    (folder / "model.safetensors").unlink(missing_ok=True)
    return bundle


def limits(parts: dict[str, Part]) -> dict[str, bool]:
    """Which limits hold, of the parts that were measured."""
    held = {}
    for name in ("digits", "digits-distinct"):
        if part := parts.get(name):
            held[f"{name}: {part['engines']} engines in {DIGITS_SECONDS:.0f} s"] = part["seconds"] < DIGITS_SECONDS
    if part := parts.get("xl"):
        held[f"xl: {part['subnetworks']} subnetworks in {XL_SECONDS:.0f} s"] = part["seconds"] < XL_SECONDS
        held[f"xl: below {XL_BYTES / 1e9:.0f} GB in all"] = part["peak_bytes"] < XL_BYTES
        held[f"xl: again in {AGAIN_SECONDS:.0f} s"] = part["again_seconds"] < AGAIN_SECONDS
    if (part := parts.get("sliding")) and part["sliding_seconds"] is not None and part["sliding_bytes"] is not None:
        held[f"sliding: its engine in {DYNAMIC_WIDTH_SECONDS:.0f} s"] = part["sliding_seconds"] < DYNAMIC_WIDTH_SECONDS
        held[f"sliding: a plan below {DYNAMIC_WIDTH_BYTES / 1e6:.0f} MB"] = part["sliding_bytes"] < DYNAMIC_WIDTH_BYTES
    return held


def main() -> int:
    """Run, print, and tell by the exit code whether the limits hold."""
    parser = script_parser(__doc__, jobs=2)
    for name in ("digits", "xl", "sliding", "tiny"):
        parser.add_argument(f"--{name}", action="store_true", help=f"measure {name} (see above)")
    options = parser.parse_args()
    chosen = [part for part in CONFIGS if getattr(options, part.removesuffix("-distinct"))]
    if not chosen:
        parser.error("nothing to measure; give --digits, --xl, --sliding or --tiny")
    parts: dict[str, Part] = {}
    load_before = os.getloadavg()[0]
    for name in chosen:
        with tempfile.TemporaryDirectory() as folder:
            parts[name] = part = build(make_bundle(name, Path(folder)), options.jobs)
        print(
            f"{name}: {part['engines']} engines ({part['subnetworks']} subnetworks for {part['steps']} steps, "
            f"{part['engine_bytes'] / 1e6:.0f} MB) in {part['seconds']:.1f} s, at most "
            f"{part['peak_bytes'] / 1e9:.2f} GB; again in {part['again_seconds']:.1f} s",
            flush=True,
        )
    report = {
        "settings": {"jobs": options.jobs},
        "parts": parts,
        "load_average": [load_before, os.getloadavg()[0]],
    }
    return finish(options, report, limits(parts))


if __name__ == "__main__":
    sys.exit(main())
