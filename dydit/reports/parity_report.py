"""What `dydit parity` found, as plain data and in sentences, which terminals, pictures and the HTML report share.

Steps are execution indices (0 is the noisiest).
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from pydantic import Field

from dydit.bundle.stored_weights import Precision
from dydit.reports.results import Machine, Measured, Result
from dydit.reports.text import decisions_text, exponent, psnr_text
from dydit.words import counted


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


def parity_lines(parity: ParityReport) -> list[str]:
    """The verdict; for a passed bundle below fp32 what it was measured to keep; and steps that were repeated."""
    failed, run = parity.first_failure, next((hop for hop in parity.hops if hop.name == "run"), None)
    lines = []
    if failed is not None:
        at = f": {failed.departure.where}" if failed.departure else ""
        lines.append(f"parity fails at {failed.name}: {failed.detail}{at}")
    else:
        within = f" within the bars of {parity.precision}" if _rounded(parity) and parity.precision else ""
        lines.append(f"parity holds{within}: {', '.join(hop.name for hop in parity.hops)}")
        if run is not None and run.decibels and run.worst is not None:
            lines.append(f"{psnr_text(run.worst)} against fp32, {flips_text(parity)}")
    if parity.repeated_steps:
        lines.append(
            f"{parity.repeated_steps:,} of {counted(parity.evaluations, 'evaluated step')} ran again at full capacity"
        )
    return lines


def parity_headline(parity: ParityReport) -> tuple[str, str]:
    """Title and subtitle of the picture: no more than what the verdict says of this precision."""
    failed = parity.first_failure
    if failed is not None:
        return f"Parity fails at \u201c{failed.title}\u201d", failed.detail
    run = next((hop for hop in parity.hops if hop.name == "run"), None)
    flips = sum(hop.flips for hop in parity.hops)
    if parity.precision is None:
        title = f"{parity.backend} stays within its bars of PyTorch"
    elif _rounded(parity):
        kept = psnr_text(run.worst) if run and run.decibels and run.worst is not None else "within its bars"
        title = f"{parity.precision} on {parity.backend}: {kept} against fp32 in PyTorch"
    elif flips:
        title = f"{parity.backend} computes what PyTorch computes, but for {counted(flips, 'token decision')} at a tie"
    else:
        title = f"{parity.backend} computes what PyTorch computes, to within rounding"
    worst = [
        f"{hop.name} {exponent(hop.worst)}{_jump(hop)}"
        for hop in parity.hops
        if hop.name in ("sliced", "step", "run") and hop.worst is not None
    ]
    details = [
        f"{counted(len(parity.labels), 'image')}, {counted(parity.steps, 'step')}",
        *([f"worst: {', '.join(worst)}"] if worst else []),
        flips_text(parity),
        *([f"{parity.repeated_steps:,} steps ran again at full capacity"] if parity.repeated_steps else []),
    ]
    return title, "; ".join(details)


def flips_text(parity: ParityReport) -> str:
    """`decisions_text` of all hops."""
    return decisions_text(sum(hop.flips for hop in parity.hops), sum(hop.decisions for hop in parity.hops))


def _rounded(parity: ParityReport) -> bool:
    """Whether the bundle stores or computes less than fp32, so that nothing is judged to within rounding of that."""
    return parity.precision != Precision.FP32


def _jump(hop: Hop) -> str:
    """What images came to that routed a token differently, where such are set aside."""
    if hop.sets_aside:
        values = [image.value for image in hop.flipped_images if image.value is not None]
        return f" (with a flipped token {exponent(max(values))})" if values else ""
    return ""
