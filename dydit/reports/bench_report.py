"""What `dydit bench` measured, as plain data and in sentences, which terminals, pictures and the HTML report share."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import Field, computed_field

from dydit.reports.results import Machine, Measured, Result
from dydit.words import counted

BUSY = "the machine was busy with other work, so these times are less reliable"


class SideKind(StrEnum):
    """What a contender of a benchmark is."""

    BUNDLE = "bundle"
    TORCH_MASKED = "torch-masked"  # dense compute with masks, eager, as in the public code
    TORCH_STATIC = "torch-static"  # the same weights without the routers
    SCRIPT = "script"  # a program of the user, which calls `dydit.bench.bench_worker.serve`


class Reference(Result):
    """The form of the checkpoint, in eager PyTorch, that a contender has to agree with.

    `bar`: tolerance for the relative L2 of a step, beyond which nothing is timed; None: the contender is not judged,
    because its precision is lower.
    """

    kind: Literal[SideKind.TORCH_MASKED, SideKind.TORCH_STATIC]
    checkpoint: str
    bar: float | None = None


class Side(Result):
    """One contender of a benchmark. `path`: the folder of a bundle, a checkpoint, or a script; of a
    bundle that was exported for the benchmark alone, its checkpoint.

    `backend` and `packed` apply to bundles. `checkpoint` and `variant` apply to scripts: the checkpoint that they load,
    or the file or folder that was made from it; and in which of its forms the script runs it.
    """

    name: str
    kind: SideKind
    path: str
    backend: str = "onnxruntime"
    packed: bool = Field(default=False, description="see `dydit.runtime.backends.base.BackendOptions`")
    checkpoint: str | None = None
    variant: str = ""
    reference: Reference | None = Field(default=None, description="compared with it before anything is timed")
    optional: bool = Field(default=False, description="left out where it does not run")


class SideResult(Result):
    """The measurements of one contender. Times are wall-clock milliseconds of a step of the whole batch, with guidance
    and conditioning.

    `round_ms`: mean over the steps of a round, one entry per counted round. `step_ms`: median over the rounds, one
    entry per measured step. `peak_bytes`: largest resident size of the contender's process; a page of weights counts
    once for each session that maps it. `settled_bytes`: size after the rounds, with each page counted once (None if the
    system does not report it). `load_seconds`: time to read and compile the `subnets_loaded` subnetworks that a
    run has before its first step: those of the measured steps, or the first where each is loaded while the one before
    it runs. The time of a step includes what is loaded meanwhile. `first_seconds`: from starting the process to the
    first images of a run of the measured steps.
    `disk_bytes`: of the files that it loads. `token_share`, `flops_ratio`: decisions of the model, per measured step.
    `macs`: multiply-adds computed in the blocks for an image, mean over the measured steps, with repeated steps: of a
    bundle, those of its subnetworks as compiled (`dydit.planning.executed`); of the others, all. `precision`: that of
    matrix products, if it is known. `relative_l2`: deviation of the model's part of one step, x_prev - c_x*x, from the
    reference, of the worst image. `psnr`: dB, of the samples of a run over the measured steps from the same
    noise, of the worst image; None without such a reference (`BenchReport.reference`), and where nothing differs.
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
    first_seconds: float | None = None
    disk_bytes: int | None = None
    images_per_second: float = Field(
        description="extrapolated from the measured steps to all sampling steps; without loading before the first"
    )
    overflows: int = Field(description="steps of counted rounds that ran again at full capacity; times include it")
    token_share: tuple[float, ...]
    flops_ratio: tuple[float, ...]
    macs: float
    precision: str | None = None
    relative_l2: Measured = None
    psnr: Measured = None

    @property
    def steps_timed(self) -> int:
        """Number of steps of all counted rounds."""
        return len(self.round_ms) * len(self.step_ms)


class NotRun(Result):
    """A contender that this machine cannot run, and the reason in one line."""

    name: str
    reason: str


class Comparison(Result):
    """A contender (`side`) against a baseline (`other`), round by round of the same run.

    `ratios`: time of the baseline / time of the contender, for each pair of rounds; above 1 the contender is faster.
    `allowed`: multiply-adds of the baseline / of the contender, the speed-up if time were proportional to them.
    `achieved`: median ratio / `allowed`. If a multiply-add takes a different time in both (another backend, precision
    or form of the model), there is no such bound: both are None, and `no_bound` gives the reason.
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
    """All contenders of one run, timed in turn and each in its own process, and the first against each other one."""

    batch: int
    cfg_scale: float = Field(description="1: without guidance, with half the rows")
    latents: str = Field(description="what the measured steps start from: run or noise (`dydit.bench.timing`)")
    threads: int
    repeats: int
    warmup: int
    seed: int
    apart: bool = Field(default=False, description="whether each round ran in a new process, which had warmed up")
    steps: int = Field(description="sampling steps of a whole run")
    steps_measured: tuple[int, ...]
    timesteps: tuple[float, ...]
    sides: tuple[SideResult, ...]
    comparisons: tuple[Comparison, ...] = Field(description="the first configuration compared with each of the others")
    not_run: tuple[NotRun, ...] = ()
    reference: str = Field(default="", description="the contender that the errors of all are measured against, if any")
    load_average: tuple[float, float] = Field(
        description="one-minute load average of the machine before and after, which shows other work"
    )
    machine: Machine
    seconds: float

    def side(self, name: str) -> SideResult:
        """A contender by name."""
        return next(side for side in self.sides if side.side.name == name)

    def comparison(self, other: str) -> Comparison:
        """The comparison of the first contender with another one."""
        return next(pair for pair in self.comparisons if pair.other == other)

    @property
    def lines(self) -> list[str]:
        """Times and the measured share of the run; speed-ups; repeated steps; contenders that did not run."""
        first, *others = self.sides
        return [
            f"{first.side.name}: {first.median_ms:.1f} ms a step (steps measured: {len(self.steps_measured)} of "
            f"{self.steps})",
            *(f"{side.side.name}: {side.median_ms:.1f} ms a step" for side in others),
            *(
                f"{speed_up_text(pair)}, median of pairs of rounds, {pair.min:.2f} to {pair.max:.2f} "
                f"({bound_text(pair)})"
                for pair in self.comparisons
            ),
            *[BUSY.capitalize()] * busy(self),
            *(f"{side.side.name}: {repeats_text(side)}" for side in self.sides if side.overflows),
            *(f"{each.name} was not run: {each.reason}" for each in self.not_run),
        ]

    @computed_field  # type: ignore[prop-decorator]  # mypy does not know decorated properties
    @property
    def summary(self) -> str:
        """All of it in one line."""
        return "; ".join(self.lines)


def bound_text(pair: Comparison) -> str:
    """The bound of a speed-up by multiply-adds, or the reason why there is none."""
    if pair.allowed is None:
        return f"no bound by multiply-adds{f', because {pair.no_bound}' if pair.no_bound else ''}"
    return f"multiply-adds alone would give {pair.allowed:.2f}\u00d7"


def speed_up_text(pair: Comparison) -> str:
    """The median ratio of times of a comparison."""
    return f"{pair.median:.2f}\u00d7 speed-up over {pair.other}"


def repeats_text(side: SideResult) -> str:
    """The number of steps that ran twice because their tokens overflowed."""
    return f"{side.overflows:,} of {counted(side.steps_timed, 'timed step')} ran again at full capacity"


def busy(bench: BenchReport) -> bool:
    """Whether the load average shows other work: more than two runnable processes for each core."""
    return max(bench.load_average) > 2 * bench.machine.cores
