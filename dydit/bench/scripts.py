"""What the scripts in `benchmarks/` share: the command line, child processes, checkpoints, and how a report ends.

A report is a JSON file: a script's own figures, under "bars" every limit as a sentence with whether it holds, and
under "machine" where it was measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dydit.bench.bench import compare_sides
from dydit.bundle.bundle import Bundle
from dydit.files import write_json
from dydit.models.config import ModelConfig
from dydit.reports.bench_report import BenchReport, Comparison, SideResult, repeats_text
from dydit.reports.results import Machine
from dydit.reports.text import aligned, exponent, guidance_text
from dydit.runtime.backends.base import BackendOptions
from dydit.runtime.bulk.run import OutputOptions, sample_to_folder
from dydit.runtime.request import SampleRequest

if TYPE_CHECKING:  # it imports PyTorch, which most processes whose memory is measured do without
    from dydit.checkpoints.checkpoint import Checkpoint
    from dydit.export.settings import ExportConfig

Progress = Callable[[int, int], None]
OPTIONS = {
    "batch": "images in a batch",
    "cfg_scale": "classifier-free guidance scale",
    "flops_ratio": "FLOPs ratio that the random model's routers are set to",
    "images": "images in a batch",
    "jobs": "engines that are built at a time",
    "kills": "kills of each job",
    "max_subnets": "merged subnetworks",
    "preset": "sizes of the random model",
    "repeats": "rounds that count",
    "sampler": "sampler of the runs",
    "samples": "images to sample with each model",
    "seed": "seed of what is drawn at random",
    "steps": "sampling steps",
    "threads": "CPU threads; 0: all",
}
"""Help of the options that several scripts have."""
_PLACES = ("json", "picture", "pictures", "plot", "work")
"""Options that hold files and folders."""
MEMORY_INTERVAL = 0.1
"""Seconds between two looks at the memory of a process and its children."""


def script_parser(
    description: str | None, options: Mapping[str, str] | None = None, **defaults: int | float | str
) -> argparse.ArgumentParser:
    """A parser whose `--help` shows the script's docstring as it stands, with `--json FILE` for the report.

    Each of `defaults` becomes an option with that default and its type; `options` has help texts beside `OPTIONS`.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the report to this file")
    for name, default in defaults.items():
        text = f"{(OPTIONS | dict(options or {}))[name]}  [{default}]"
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help=text)
    return parser


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """The options that influence the figures: all but those that hold files and folders."""
    return {name: value for name, value in vars(options).items() if name not in _PLACES}


@contextlib.contextmanager
def work_folder(path: Path | None) -> Iterator[Path]:
    """The folder `path`, which stays, so that an interrupted script can continue; without one a temporary folder."""
    if path is not None:
        path.mkdir(parents=True, exist_ok=True)
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def kept_part(file: Path, measure: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """The figures in `file`. If there is no such file, they are measured and written, with the load average."""
    if not file.exists():
        write_json(file, {**measure(), "load_average": os.getloadavg()[0]})
    figures: dict[str, Any] = json.loads(file.read_text())
    return figures


def require_settings(work: Path, settings: Mapping[str, Any]) -> None:
    """Refuse a folder whose figures were measured with other settings; `settings.json` in it has them."""
    file = work / "settings.json"
    if not file.exists():
        work.mkdir(parents=True, exist_ok=True)
        write_json(file, settings)
    elif json.loads(file.read_text()) != settings:
        raise SystemExit(f"{work} holds figures of other settings; choose another --work")


def progress(title: str) -> Progress:
    """A line on standard error with what is done, of how much, and the seconds so far."""
    start = time.monotonic()

    def show(done: int, total: int) -> None:
        end = "\n" if done == total else ""
        print(f"\r{title}: {done}/{total}, {time.monotonic() - start:.0f} s", end=end, file=sys.stderr, flush=True)

    return show


def show_limits(limits: Mapping[str, bool]) -> int:
    """Print whether each limit holds; returns the exit code, 1 where one is missed."""
    for sentence, holds in limits.items():
        print("  holds " if holds else "  MISSED", sentence)
    return 0 if all(limits.values()) else 1


def finish(options: argparse.Namespace, report: Mapping[str, Any], limits: Mapping[str, bool]) -> int:
    """`show_limits`, and write the report to `--json`."""
    if options.json:
        write_json(options.json, {**report, "bars": dict(limits), "machine": Machine.here().to_json()})
    return show_limits(limits)


def random_checkpoint(path: Path, config: ModelConfig, flops_ratio: float = 0.5) -> Checkpoint:
    """Write a dynamic model with random weights, whose routers are set to a FLOPs ratio near `flops_ratio`."""
    from dydit.checkpoints.checkpoint import load_checkpoint, save_checkpoint
    from dydit.models.synthetic import synthetic_model

    save_checkpoint(path, synthetic_model(config, seed=0, flops_ratio=flops_ratio), config)
    return load_checkpoint(path)


def static_checkpoint(path: Path, dynamic: Checkpoint) -> Checkpoint:
    """Write the weights of a dynamic model without its routers."""
    from dydit.checkpoints.checkpoint import load_checkpoint, save_checkpoint
    from dydit.checkpoints.fit import expected_shapes

    config = dynamic.config.without_routers()
    save_checkpoint(path, {name: dynamic.state[name] for name in expected_shapes(config)}, config)
    return load_checkpoint(path)


def kept_bundle(path: Path, folder: Path, config: ExportConfig) -> Bundle:
    """The bundle of the checkpoint `path` in `folder`, exported if there is none; another model or run is refused."""
    from dydit.checkpoints.checkpoint import load_checkpoint
    from dydit.export.exporter import export

    checkpoint = load_checkpoint(path)
    if not folder.exists():
        export(checkpoint, folder, config)
    bundle = Bundle.open(folder)
    same = bundle.manifest.checkpoint_sha256 == checkpoint.sha256
    if not same or bundle.manifest.sampling.config != config.sampling(checkpoint.config):
        raise SystemExit(f"{folder} holds another model or another run; choose another --work")
    return bundle


def bundle_bytes(bundle: Bundle) -> int:
    """Bytes of all files of a bundle."""
    return sum(entry.bytes for entry in bundle.manifest.files.values())


def sampled_latents(
    bundle: Bundle, folder: Path, request: SampleRequest, threads: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Sample a request into `folder`, or continue there; returns latents f32 [n, C, S, S] and labels int64 [n]."""
    file = folder.with_suffix(".npz")
    outputs, options = OutputOptions(latents_out=file), BackendOptions(threads=threads)
    sample_to_folder(bundle, request, folder, outputs, options=options, progress=progress(str(bundle.path)))
    with np.load(file) as arrays:
        return arrays["latents"], arrays["labels"]


@dataclass(frozen=True)
class ProcessResult:
    """Wall-clock seconds, peak memory in bytes and standard output of a process that succeeded."""

    seconds: float
    peak_bytes: int
    output: str


def run_process(words: Sequence[str | Path], with_children: bool = False) -> ProcessResult:
    """Run a command. Raises `RuntimeError` where its exit code is not 0.

    Its peak memory is its largest resident set, where a page that it maps twice counts twice. `with_children`: instead
    the largest sum over all of its processes that were alive together, where a page that two of them share counts
    twice.
    """
    start = time.perf_counter()
    command = [str(word) for word in words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with _peak_of_family(process.pid) if with_children else contextlib.nullcontext([0]) as family:
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {process.returncode}")
    peak = family[0] if with_children else usage.ru_maxrss * 1024
    return ProcessResult(time.perf_counter() - start, peak, output)


def run_dydit(*words: str | Path, with_children: bool = False) -> ProcessResult:
    """`run_process` of the command `dydit`."""
    return run_process([sys.executable, "-m", "dydit", *words], with_children)


@contextlib.contextmanager
def _peak_of_family(pid: int) -> Iterator[list[int]]:
    """Yields a list of one number: the most bytes of a process and its descendants together, until the block ends."""
    peak, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(MEMORY_INTERVAL):
            peak[0] = max(peak[0], sum(map(_resident_bytes, _family(pid))))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()


def _family(pid: int) -> list[int]:
    """A process and its descendants."""
    family = [pid]
    for parent in family:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):  # the process has ended
                family += map(int, children.read_text().split())
    return family


def _resident_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def compare(report: BenchReport, name: str, other: str) -> Comparison | None:
    """One contender against another; None unless both were timed."""
    sides = {side.side.name: side for side in report.sides}
    return compare_sides(sides[name], sides[other]) if name in sides and other in sides else None


def bound_of(report: BenchReport, name: str, statics: Sequence[str]) -> Comparison | None:
    """A contender against the one of `statics` whose multiply-adds set a bound on it; None if there is none."""
    pairs = (compare(report, name, other) for other in statics if other != name)
    return next((pair for pair in pairs if pair and pair.achieved is not None), None)


def bench_table(
    report: BenchReport, model: str, dense: Sequence[str], statics: Sequence[str], baseline: SideResult | None
) -> str:
    """All contenders, those named `dense` and then the others, each slowest first, for a terminal.

    Speed-ups are over `baseline`, the fastest dense one; `statics` are those whose multiply-adds set bounds.
    """
    columns = (
        *("contender", "computes", "precision", "ms/step", "min", "max", "GMACs", "img/s*", "first s", "load s"),
        *("peak MB", "disk MB", "speed-up", "of bound", "rel. L2"),
    )
    rows: list[Sequence[str]] = [columns]
    for side in sorted(report.sides, key=lambda side: (side.side.name not in dense, -side.median_ms)):
        name = side.side.name
        over, bound = baseline and compare(report, name, baseline.side.name), bound_of(report, name, statics)
        rows.append(
            (
                name,
                "all" if name in dense else "what is routed",
                side.precision or "-",
                *(f"{ms:.1f}" for ms in (side.median_ms, side.min_ms, side.max_ms)),
                f"{side.macs / 1e9:.3g}",
                f"{side.images_per_second:.3g}",
                *("-" if value is None else f"{value:.1f}" for value in (side.first_seconds, side.load_seconds)),
                *("-" if size is None else f"{size / 1e6:.0f}" for size in (side.peak_bytes, side.disk_bytes)),
                f"{over.median:.2f}" if over else "-",
                f"{bound.achieved:.2f}" if bound and bound.achieved is not None and name not in statics else "-",
                "-" if side.relative_l2 is None else exponent(side.relative_l2),
            )
        )
    machine = report.machine
    lines = [
        f"{model}, batch {report.batch}, {guidance_text(report.cfg_scale)}, threads: {report.threads}",
        f"{machine.cpu} ({', '.join(machine.instruction_sets) or 'its instruction sets are unknown'}), load average "
        f"{report.load_average[0]:.1f}, then {report.load_average[1]:.1f}",
        f"steps measured: {len(report.steps_measured)} of {report.steps}, {report.repeats} times after {report.warmup}"
        f"{', each in a new process' if report.apart else ''}",
        "",
        aligned(rows, right=range(3, len(columns))),
        *(f"{each.name}: not run: {each.reason}" for each in report.not_run),
        "",
        f"* for all {report.steps} steps, extrapolated from those measured; without what is loaded before the first",
        f"first s: from starting the process to the first images of a run of {len(report.steps_measured)} steps",
        "load s: loading what a run has before its first step, and compiling it, of which nothing was cached",
        "ms/step: with the next subnetwork loaded meanwhile, where not all are kept",
        "peak MB: of the process; disk MB: the files that it loads",
        *(
            [f"speed-up: over {baseline.side.name}, the fastest that computes all; median of rounds"]
            if baseline
            else []
        ),
        "of bound: the share of what multiply-adds allow against the static bundle of that backend and precision",
        *(f"{side.side.name}: {repeats_text(side)}" for side in report.sides if side.overflows),
        "rel. L2: of the model's part of one step, from PyTorch in fp32 (masked or static)",
    ]
    return "\n".join(lines)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; cells may hold line breaks and bars."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        f"| {' | '.join(' '.join(text.split()).replace('|', chr(92) + '|') for text in line)} |" for line in lines
    )
