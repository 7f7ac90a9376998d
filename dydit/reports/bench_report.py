"""What `dydit bench` measured, as plain data and in sentences, which terminals, pictures and the HTML report share."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Literal

from pydantic import Field

from dydit.reports.results import Machine, Measured, Result
from dydit.words import counted

BUSY = "the machine was busy, so take times with care"


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


def bench_lines(report: BenchReport) -> list[str]:
    """Times, with how much of the run was measured; speed-ups; steps that were repeated; sides that did not run."""
    first, *others = report.sides
    return [
        f"{first.side.name}: {first.median_ms:.1f} ms a step (steps measured: {len(report.steps_measured)} of "
        f"{report.steps})",
        *(f"{side.side.name}: {side.median_ms:.1f} ms a step" for side in others),
        *(
            f"{speed_up_text(pair)}, median of pairs of rounds, {pair.min:.2f} to {pair.max:.2f} ({bound_text(pair)})"
            for pair in report.comparisons
        ),
        *[BUSY.capitalize()] * busy(report),
        *(f"{side.side.name}: {repeats_text(side)}" for side in report.sides if side.overflows),
        *(f"{each.name} was not run: {each.reason}" for each in report.not_run),
    ]


def bound_text(pair: Comparison) -> str:
    """What multiply-adds say of a speed-up, or why they say nothing."""
    if pair.allowed is None:
        return f"no bound by multiply-adds{f', as {pair.no_bound}' if pair.no_bound else ''}"
    return f"multiply-adds alone would give {pair.allowed:.2f}\u00d7"


def speed_up_text(pair: Comparison) -> str:
    """The median ratio of times of a comparison."""
    return f"{pair.median:.2f}\u00d7 speed-up over {pair.other}"


def repeats_text(side: SideResult) -> str:
    """How many steps of a side ran twice because their tokens overflowed; empty where none did."""
    if not side.overflows:
        return ""
    return f"{side.overflows:,} of {counted(side.steps_timed, 'timed step')} ran again at full capacity"


def busy(bench: BenchReport) -> bool:
    """Whether others' work shows in the load average: more than twice as many wanted to run as there are cores."""
    return max(bench.load_average) > 2 * bench.machine.cores
