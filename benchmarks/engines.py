"""Engines built ahead of time by TensorRT for RTX, with no GPU: how long it takes, in how much memory.

    python benchmarks/engines.py --digits --xl --sliding [--jobs 2] [--json docs/benchmarks/engines.json]

--digits: the shipped model with a subnetwork for each distinct mask of its 250 steps, and a model of its shape with
random weights, whose masks nearly all differ, so that close to 250 graphs are built. --xl: DiT-XL/2 in fp16 on 16
subnetworks, random weights with routers set to a FLOPs ratio near 0.5. --sliding: the same model, one graph for every
width. All have capacity routing with a slot for every token. Each bundle is built by `dydit build` in a process of its
own, then again with nothing changed.

Bars, for two cores: the digits' graphs in 240 s each time, DiT-XL/2 in 360 s with all processes together below 12 GB,
and again in 5 s; the sliding engine in 60 s, its plan below 200 MB, which leaves no room for block weights. Exit code 1
where one is missed. Times are of the whole command, interpreter and verification of the bundle included. Run it on a
machine that does nothing else; the load average is in the report. Needs 16 GB of disk where temporary files go.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from dydit.bundle.bundle import Bundle
from dydit.bundle.manifest import SLIDING, PlanKind, Routing
from dydit.bundle.stored_weights import Precision
from dydit.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from dydit.export.exporter import export
from dydit.export.settings import ExportConfig
from dydit.files import write_json
from dydit.models.config import ModelConfig
from dydit.models.dit.config import preset
from dydit.models.synthetic import synthetic_model
from dydit.quickstart.quickstart import ASSETS
from dydit.reports.results import Machine

DIGITS_SECONDS, XL_SECONDS, AGAIN_SECONDS, XL_BYTES = 240.0, 360.0, 5.0, 12_000_000_000
DIGITS = ExportConfig(plan=PlanKind.PER_STEP, routing=Routing.CAPACITY)
XL = ExportConfig(max_subnets=16, routing=Routing.CAPACITY, precision=Precision.FP16)
SLIDING_SECONDS, SLIDING_BYTES = 60.0, 200_000_000
SLIDE = ExportConfig(plan=PlanKind.SLIDING, routing=Routing.CAPACITY, precision=Precision.FP16)
SAMPLE_SECONDS = 0.1  # between two looks at the memory


@dataclass(frozen=True)
class Built:
    """A bundle that was built, and again.

    `peak_bytes`: most memory of all processes of the build together, the sum of their resident sets, so that a page
    that two share counts twice. `again_seconds`: the same command when nothing had changed. `sliding_seconds`,
    `sliding_bytes`: of the one engine that serves every width, where there is one.
    """

    steps: int
    subnetworks: int
    engines: int
    bundle_bytes: int
    engine_bytes: int
    seconds: float
    slowest_engine_seconds: float
    peak_bytes: int
    again_seconds: float
    sliding_seconds: float | None
    sliding_bytes: int | None


def build(bundle: Bundle, jobs: int) -> Built:
    """Build a bundle's engines, twice. Raises `RuntimeError` where that fails, or the second time builds anything."""
    seconds, peak, report = _command(bundle.path, jobs)
    again, _, second = _command(bundle.path, jobs)
    if second["built"] or not report["built"]:
        raise RuntimeError(f"{len(report['built'])} engines were built, and then {len(second['built'])} again")
    manifest = bundle.manifest
    sliding = next((each for each in report["built"] if each["graph"] == SLIDING), {})
    return Built(
        steps=manifest.sampling.steps,
        subnetworks=len(manifest.subnets),
        engines=len(report["built"]),
        bundle_bytes=sum(entry.bytes for entry in manifest.files.values()),
        engine_bytes=report["bytes"],
        seconds=seconds,
        slowest_engine_seconds=max(each["seconds"] for each in report["built"]),
        peak_bytes=peak,
        again_seconds=again,
        sliding_seconds=sliding.get("seconds"),
        sliding_bytes=sliding.get("bytes"),
    )


def _command(path: Path, jobs: int) -> tuple[float, int, dict]:
    """Run `dydit build`; its seconds, the peak memory of its processes in bytes, and its report."""
    words = [sys.executable, "-m", "dydit", "build", str(path), "--flavour", "tensorrt-rtx", "--jobs", str(jobs)]
    started = time.perf_counter()
    process = subprocess.Popen([*words, "--json"], stdout=subprocess.PIPE, text=True)
    with _Watch(process.pid) as watch:
        output, _ = process.communicate()
    seconds = time.perf_counter() - started
    if process.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with exit code {process.returncode}")
    return seconds, watch.peak, json.loads(output)


class _Watch:
    """Looks at the memory of a process and all that it started, until the block ends."""

    def __init__(self, pid: int):
        self.peak, self._pid, self._over = 0, pid, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            self.peak = max(self.peak, sum(map(_resident_bytes, _family(self._pid))))


def _family(pid: int) -> list[int]:
    """A process and its descendants."""
    family = [pid]
    for parent in family:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                family += map(int, children.read_text().split())
            except OSError:  # it has ended
                continue
    return family


def _resident_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def export_shipped(folder: Path) -> Bundle:
    """The shipped digits model, a subnetwork for each distinct mask."""
    return export(load_checkpoint(ASSETS / "dydit.safetensors"), folder, DIGITS)


def export_distinct(folder: Path) -> Bundle:
    """A model of the digits' shape whose masks nearly all differ."""
    return export_random(load_checkpoint(ASSETS / "dydit.safetensors").config, DIGITS, folder)


def export_xl(folder: Path) -> Bundle:
    """DiT-XL/2 in fp16 on 16 subnetworks."""
    return export_random(preset("XL/2"), XL, folder)


def export_sliding(folder: Path) -> Bundle:
    """DiT-XL/2 in fp16 on one graph for every width."""
    return export_random(preset("XL/2"), SLIDE, folder)


def export_random(model: ModelConfig, settings: ExportConfig, folder: Path) -> Bundle:
    """A model with random weights, exported."""
    checkpoint = folder.with_suffix(".safetensors")
    save_checkpoint(checkpoint, synthetic_model(model, flops_ratio=0.5), model)
    bundle = export(load_checkpoint(checkpoint), folder, settings)
    checkpoint.unlink()
    return bundle


def bars(parts: dict[str, Built]) -> dict[str, bool]:
    """Which of the bars hold, of the parts that were measured."""
    held = {}
    for name in ("digits", "digits-distinct"):
        if part := parts.get(name):
            held[f"{name}: {part.engines} engines in {DIGITS_SECONDS:.0f} s"] = part.seconds < DIGITS_SECONDS
    if part := parts.get("xl"):
        held[f"xl: {part.subnetworks} subnetworks in {XL_SECONDS:.0f} s"] = part.seconds < XL_SECONDS
        held[f"xl: below {XL_BYTES / 1e9:.0f} GB in all"] = part.peak_bytes < XL_BYTES
        held[f"xl: again in {AGAIN_SECONDS:.0f} s"] = part.again_seconds < AGAIN_SECONDS
    if (part := parts.get("sliding")) and part.sliding_seconds is not None and part.sliding_bytes is not None:
        held[f"sliding: its engine in {SLIDING_SECONDS:.0f} s"] = part.sliding_seconds < SLIDING_SECONDS
        held[f"sliding: a plan below {SLIDING_BYTES / 1e6:.0f} MB"] = part.sliding_bytes < SLIDING_BYTES
    return held


PARTS: dict[str, tuple[Callable[[Path], Bundle], ...]] = {
    "digits": (export_shipped, export_distinct),
    "xl": (export_xl,),
    "sliding": (export_sliding,),
}
NAMES = {export_shipped: "digits", export_distinct: "digits-distinct", export_xl: "xl", export_sliding: "sliding"}


def main() -> int:
    """Run, print, and say by the exit code whether the bars hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in PARTS:
        parser.add_argument(f"--{name}", action="store_true", help=f"measure {name}")
    parser.add_argument("--jobs", type=int, default=2, help="engines built at a time")
    parser.add_argument("--json", type=Path, help="file for the figures")
    given = parser.parse_args()
    chosen = [each for name, exports in PARTS.items() if getattr(given, name) for each in exports]
    if not chosen:
        parser.error(f"nothing to measure; give {' or '.join(f'--{name}' for name in PARTS)}")
    parts: dict[str, Built] = {}
    load_before = os.getloadavg()[0]
    for make in chosen:
        with tempfile.TemporaryDirectory() as work:
            parts[NAMES[make]] = part = build(make(Path(work) / "bundle"), given.jobs)
        print(
            f"{NAMES[make]}: {part.engines} engines ({part.subnetworks} subnetworks for {part.steps} steps, "
            f"{part.engine_bytes / 1e6:.0f} MB) in {part.seconds:.1f} s, at most {part.peak_bytes / 1e9:.2f} GB; again "
            f"in {part.again_seconds:.1f} s",
            flush=True,
        )
    held = bars(parts)
    for name, holds in held.items():
        print("  holds " if holds else "  MISSED", name)
    if given.json:
        report = {
            "settings": {"jobs": given.jobs},
            "parts": {name: asdict(part) for name, part in parts.items()},
            "bars": held,
            "load_average": [load_before, os.getloadavg()[0]],
            "machine": Machine.here().to_json(),
        }
        write_json(given.json, report)
    return 0 if all(held.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
