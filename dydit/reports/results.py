"""What parity and bench found, as plain data: frozen models that go to JSON and back, and that reports render.

Steps are execution indices (0 is the noisiest). A measured value is None where it is not a finite number, which JSON
cannot hold and which no bar allows. `to_json` gives plain dictionaries and lists; `parse` reads them back.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable
from datetime import UTC, datetime
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field

from dydit.models.config import Strict
from dydit.reports.sentences import bench_lines, parity_lines
from dydit.runtime.backends.cores import available_cores

PACKAGES = (
    *("diffusers", "dydit", "numpy", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu", "onnxscript", "polygraphy"),
    *("tensorrt", "tensorrt-rtx-cu13", "torch"),
)

Measured = float | None


def measured(value: float) -> Measured:
    """A number that JSON can hold: None in place of NaN and infinities."""
    value = float(value)
    return value if math.isfinite(value) else None


def measured_all(values: Iterable[float]) -> tuple[Measured, ...]:
    """`measured` of each."""
    return tuple(measured(value) for value in values)


class Result(Strict):
    """Base of everything here."""

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries, lists, strings and numbers."""
        return self.model_dump(mode="json")

    @classmethod
    def parse(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_json`."""
        return cls.model_validate(values)


class Machine(Result):
    """Where something was measured."""

    cpu: str
    cores: int
    system: str
    python: str
    packages: dict[str, str]
    date: str = Field(description="UTC, ISO 8601")

    @classmethod
    def here(cls) -> Machine:
        """This machine, now."""
        packages = {}
        for package in PACKAGES:
            try:
                packages[package] = version(package)
            except PackageNotFoundError:
                continue
        return cls(
            cpu=_cpu_name(),
            cores=available_cores(),
            system=platform.platform(),
            python=platform.python_version(),
            packages=packages,
            date=datetime.now(UTC).isoformat(timespec="seconds"),
        )


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


class Status(StrEnum):
    """How a hop ended."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"  # `detail` says why


class Departure(Result):
    """Where two sides of a hop first part. Each field is None where the question does not arise."""

    step: int | None = None
    timestep: int | None = None
    block: int | None = None
    where: str = Field(description="in words: which weight, router, or part of the step")


class FlippedImage(Result):
    """An image that routed a token differently, and where it began.

    `step` and `block` are where the first token flipped (from where the image's values may jump); `margin` the largest
    |logit| of the tokens that flipped there, in root mean squares of that block's logits: tiny for a tie; `flips` the
    tokens that differ in all its steps; `value` the relative L2 of what the hop compares, of its worst step.
    """

    image: int
    step: int
    timestep: int
    block: int
    margin: Measured
    tie: bool
    flips: int
    value: Measured


class Hop(Result):
    """One comparison of two forms of the model.

    `worst`: the largest value over steps and over images whose decisions agree (masks, weights: how many bits, elements
    differ). Of the arrays, the entry k belongs to `ParityReport.steps_compared[k]`, except for the run, which has all
    steps: `per_step` the largest value over images that agree (None where none does), `per_step_contribution` the same
    measured on x_prev - c_x*x, the part that comes from the model (information, no bar), `per_step_flips` the tokens
    that flipped. `per_image`: each image's largest value over the steps in which its decisions agree; of the run, its
    final latents. `per_block`: the relative L2 of the residual stream after each block, of the departing image in its
    step; where the hop passed, of the worst image in the worst step.
    """

    name: str = Field(description="masks, weights, sliced, step or run")
    title: str
    measure: str
    bar: float
    reason: str = Field(description="why this bar")
    status: Status
    detail: str = Field(description="one line: what was found, or why it was skipped")
    worst: Measured = None
    worst_step: int | None = None
    worst_image: int | None = None
    departure: Departure | None = None
    per_step: tuple[Measured, ...] = ()
    per_step_contribution: tuple[Measured, ...] = ()
    per_step_flips: tuple[int, ...] = ()
    per_image: tuple[Measured, ...] = ()
    per_block: tuple[Measured, ...] = ()
    decisions: int = Field(default=0, description="token routing decisions compared")
    flips: int = Field(default=0, description="how many of them differ")
    flipped_images: tuple[FlippedImage, ...] = ()
    decibels: bool = Field(default=False, description="the values are errors of pictures, 10^(-PSNR/20)")
    sets_aside: bool = Field(default=True, description="whether images with a flipped token are in no other value")

    @property
    def agreement(self) -> float:
        """Share of the token routing decisions that agree; 1 where there are none."""
        return 1 - self.flips / self.decisions if self.decisions else 1.0


class ParityReport(Result):
    """Hop by hop from the reference model to what a backend runs."""

    bundle: str
    checkpoint: str
    backend: str
    threads: int
    device: str
    labels: tuple[int, ...]
    seed: int
    cfg_scale: float = Field(description="1: without guidance")
    steps: int
    sampler: str
    routing: str | None
    precision: str | None = Field(default=None, description="of the bundle; null in reports of older versions")
    steps_compared: tuple[int, ...]
    timesteps: tuple[int, ...]
    stale_reasons: tuple[str, ...]
    hops: tuple[Hop, ...]
    evaluations: int = Field(default=0, description="steps that the backend evaluated")
    repeated_steps: int = Field(default=0, description="those whose routed tokens overflowed, so that they ran again")
    token_share: tuple[float, ...] = Field(description="per sampling step, share of tokens that entered the MLP")
    flops_ratio: tuple[float, ...] = Field(description="per sampling step, of the reference (PAPER: F_dyn / F_static)")
    machine: Machine
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether every hop passed."""
        return all(hop.status is Status.PASSED for hop in self.hops)

    @property
    def first_failure(self) -> Hop | None:
        """The first hop that did not pass."""
        return next((hop for hop in self.hops if hop.status is not Status.PASSED), None)

    def hop(self, name: str) -> Hop:
        """A hop by name."""
        return next(hop for hop in self.hops if hop.name == name)

    @property
    def summary(self) -> str:
        """The verdict, in one line."""
        return "; ".join(parity_lines(self))

    def to_json(self) -> dict[str, Any]:
        """Plain data, with the verdict."""
        failed = self.first_failure
        return super().to_json() | {
            "ok": self.ok,
            "first_failure": failed.name if failed else None,
            "summary": self.summary,
        }

    @classmethod
    def parse(cls, values: dict[str, Any]) -> ParityReport:
        """The inverse of `to_json`; the verdict is derived again."""
        return cls.model_validate({k: v for k, v in values.items() if k not in ("ok", "first_failure", "summary")})


class SideKind(StrEnum):
    """What a side of a benchmark runs."""

    BUNDLE = "bundle"
    TORCH_MASKED = "torch-masked"  # dense compute times masks, eager: what the public code does
    TORCH_STATIC = "torch-static"  # the same weights, routers ignored
    SCRIPT = "script"  # a program of the caller's, which calls `dydit.bench.bench_worker.serve`


class Reference(Result):
    """What a side has to compute: what this form of the checkpoint computes in eager PyTorch.

    `bar`: largest relative L2, beyond which nothing is timed; None for a side of lower precision, which is not judged.
    """

    kind: Literal[SideKind.TORCH_MASKED, SideKind.TORCH_STATIC]
    checkpoint: str
    bar: float | None = None


class Side(Result):
    """One side of a benchmark: `path` is a bundle's folder, a checkpoint or a script.

    `backend` and `packed` are for bundles, `checkpoint` for scripts: what they load.
    """

    name: str
    kind: SideKind
    path: str
    backend: str = "onnxruntime"
    packed: bool = Field(default=False, description="see `dydit.runtime.backends.base.BackendOptions`")
    checkpoint: str | None = None
    reference: Reference | None = Field(default=None, description="compared with this before anything is timed")


class SideResult(Result):
    """What one side took. Times are wall-clock milliseconds of a step: whole batch, guidance and conditioning included.

    `round_ms`: mean over the round's steps, one entry per counted round; `step_ms`: median over the rounds, per step
    measured. `peak_bytes`: largest resident size of the side's process, where a page of weights counts once for each
    session that maps it; `settled_bytes`: after the rounds, each page once (None where the system does not tell).
    `load_seconds`: to read and compile all that the measured steps need, `subnets_loaded` of them. `token_share`,
    `flops_ratio`: per measured step, what the model decided; `macs`: multiply-adds of an image's blocks that were
    computed, mean over the measured steps, repetitions among them: of a bundle, those of its subnetworks as they are
    compiled (`dydit.planning.executed`), of the others all. `precision`: of matrix products, where it is known.
    `relative_l2`: of the model's part of one step, x_prev - c_x*x, from the side's reference; its worst image.
    """

    side: Side
    load_seconds: float
    subnets_loaded: int
    round_ms: tuple[float, ...]
    step_ms: tuple[float, ...]
    median_ms: float
    min_ms: float
    max_ms: float
    peak_bytes: int
    settled_bytes: int | None = None
    images_per_second: float = Field(
        description="extrapolated to all sampling steps from those measured; loading apart"
    )
    overflows: int = Field(description="steps of counted rounds that ran again at full capacity; the times include it")
    token_share: tuple[float, ...]
    flops_ratio: tuple[float, ...]
    macs: float
    precision: str | None = None
    relative_l2: Measured = None

    @property
    def steps_timed(self) -> int:
        """Steps of all counted rounds."""
        return len(self.round_ms) * len(self.step_ms)


class NotRun(Result):
    """A side that this machine cannot run, and why, in one line."""

    name: str
    reason: str


class Comparison(Result):
    """A side against another, round by round of the same run.

    `ratios` = time of `other` / time of `side`, pair by pair (above 1: `side` is faster); `allowed` = multiply-adds of
    `other` / of `side`, the speed-up that they alone would give; `achieved` = median ratio / allowed. Where a
    multiply-add costs each side another time (another backend, precision or form of the model), there is no such bound:
    both are None, and `no_bound` says why.
    """

    side: str
    other: str
    ratios: tuple[float, ...]
    median: float
    min: float
    max: float
    allowed: float | None = None
    achieved: float | None = None
    no_bound: str = ""


class BenchReport(Result):
    """All sides of one run, which took turns, each in its own process; and every pair of them compared."""

    batch: int
    cfg_scale: float = Field(description="1: without guidance, at half the rows")
    latents: str = Field(description="what the steps were measured on: run or noise (`dydit.bench.timing`)")
    threads: int
    repeats: int
    warmup: int
    seed: int
    steps: int = Field(description="sampling steps of a whole run")
    steps_measured: tuple[int, ...]
    timesteps: tuple[int, ...]
    sides: tuple[SideResult, ...]
    comparisons: tuple[Comparison, ...] = Field(description="the first side against each other one")
    not_run: tuple[NotRun, ...] = ()
    load_average: tuple[float, float] = Field(
        description="of the machine, one minute, before and after: others' work shows"
    )
    machine: Machine
    seconds: float

    def side(self, name: str) -> SideResult:
        """A side by name."""
        return next(side for side in self.sides if side.side.name == name)

    def comparison(self, other: str) -> Comparison:
        """The first side against another one."""
        return next(pair for pair in self.comparisons if pair.other == other)

    @property
    def lines(self) -> list[str]:
        """What was found, a sentence each."""
        return bench_lines(self)

    @property
    def summary(self) -> str:
        """All of it in one line."""
        return "; ".join(self.lines)

    def to_json(self) -> dict[str, Any]:
        """Plain data, with the summary."""
        return super().to_json() | {"summary": self.summary}

    @classmethod
    def parse(cls, values: dict[str, Any]) -> BenchReport:
        """The inverse of `to_json`."""
        return cls.model_validate({k: v for k, v in values.items() if k != "summary"})
