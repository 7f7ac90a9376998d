"""What `dydit parity` found, as plain data and in sentences, which terminals, pictures and the HTML report share.

Steps are execution indices (0 is the noisiest).
"""

from __future__ import annotations

from enum import StrEnum

from pydantic import AliasChoices, Field, computed_field, field_serializer

from dydit.bundle.stored_weights import Precision
from dydit.reports.results import Machine, Measured, Result
from dydit.reports.text import decisions_text, exponent, psnr_text
from dydit.words import counted


class Status(StrEnum):
    """The result of a check."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"  # `detail` gives the reason


class Departure(Result):
    """Where the two forms of a check first differ. A field is None if it does not apply."""

    step: int | None = None
    timestep: float | None = None
    block: int | None = None
    where: str = Field(description="the weight, router, or part of the step, in words")


class FlippedImage(Result):
    """An image that routed a token differently, and where that began.

    `step`, `block`: where the first token flipped; from there on the values of the image may jump. `margin`: the
    largest |logit| of the tokens that flipped there, in units of the root mean square of the block's logits; it is tiny
    for a near-tie. `tie`: whether it is a near-tie. `flips`: number of tokens that differ in all steps. `value`: the
    measure of the check in the worst step of the image.
    """

    image: int
    step: int
    timestep: float
    block: int
    margin: Measured
    tie: bool
    flips: int
    value: Measured


class Check(Result):
    """One comparison of two forms of the model.

    `worst`: the largest value over the steps and the images whose decisions agree (of masks and weights: the number of
    bits or elements that differ). Entry k of the arrays by step belongs to `ParityReport.steps_compared[k]`; the run
    has all steps. `per_step`: the largest value over images that agree (None if none does). `per_step_contribution`:
    the same for x_prev - c_x*x, the part that comes from the model (for information, without a tolerance).
    `per_step_flips`: number of tokens that flipped. `per_image`: the largest value of each image over the steps in
    which its decisions agree; of the run, that of its final latents. `per_block`: relative L2 of the residual stream
    after each block, of the departing image in its step, or of the worst image in the worst step if the check passed.
    """

    name: str = Field(description="masks, weights, sliced, step or run")
    title: str
    measure: str
    tolerance: float = Field(validation_alias=AliasChoices("tolerance", "bar"), serialization_alias="bar")
    reason: str = Field(description="the reason for the tolerance")
    status: Status
    detail: str = Field(description="one line: the finding, or the reason for skipping")
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
    decibels: bool = Field(default=False, description="whether the values are errors of pictures, 10^(-PSNR/20)")
    sets_aside: bool = Field(default=True, description="whether images with a flipped token are left out of the values")


class ParityReport(Result):
    """The checks from the reference model to what a backend runs."""

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
    timesteps: tuple[float, ...]
    stale_reasons: tuple[str, ...]
    checks: tuple[Check, ...] = Field(validation_alias=AliasChoices("checks", "hops"), serialization_alias="hops")
    evaluations: int = Field(default=0, description="number of steps that the backend evaluated")
    repeated_steps: int = Field(default=0, description="number of those that ran again because tokens overflowed")
    token_share: tuple[float, ...] = Field(description="per sampling step, share of tokens that entered the MLP")
    flops_ratio: tuple[float, ...] = Field(description="per sampling step, F_dyn / F_static of the reference")
    machine: Machine
    seconds: float

    @computed_field  # type: ignore[prop-decorator]  # mypy does not know decorated properties
    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return self.first_failure is None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def first_failure(self) -> Check | None:
        """The first check that did not pass. In JSON it is the check's name."""
        return next((check for check in self.checks if check.status is not Status.PASSED), None)

    @field_serializer("first_failure")
    def _name_of(self, failed: Check | None) -> str | None:
        return None if failed is None else failed.name

    @computed_field  # type: ignore[prop-decorator]
    @property
    def summary(self) -> str:
        """The verdict; the measured quality of a bundle below fp32 that passed; and the steps that were repeated."""
        failed, run = self.first_failure, _pictures_of_run(self)
        if failed is not None:
            at = f": {failed.departure.where}" if failed.departure else ""
            lines = [f"parity fails at {failed.name}: {failed.detail}{at}"]
        else:
            within = f" within the tolerances of {self.precision}" if _rounded(self) and self.precision else ""
            lines = [f"parity holds{within}: {', '.join(check.name for check in self.checks)}"]
            lines += [] if run is None else [f"{psnr_text(run)} against fp32, {_flips_text(self)}"]
        if self.repeated_steps:
            steps = counted(self.evaluations, "evaluated step")
            lines.append(f"{self.repeated_steps:,} of {steps} ran again at full capacity")
        return "; ".join(lines)

    def check(self, name: str) -> Check:
        """A check by name."""
        return next(check for check in self.checks if check.name == name)


def parity_headline(parity: ParityReport) -> tuple[str, str]:
    """Title and subtitle of the picture. They claim no more than the verdict on this precision."""
    failed = parity.first_failure
    if failed is not None:
        return f"Parity fails at \u201c{failed.title}\u201d", failed.detail
    run = _pictures_of_run(parity)
    flips = sum(check.flips for check in parity.checks)
    if parity.precision is None:
        title = f"{parity.backend} agrees with PyTorch within the tolerances"
    elif _rounded(parity):
        quality = "within the tolerances" if run is None else psnr_text(run)
        title = f"{parity.precision} on {parity.backend}: {quality} against fp32 in PyTorch"
    elif flips:
        decisions = counted(flips, "token decision")
        title = f"{parity.backend} computes what PyTorch computes, except for {decisions} at a near-tie"
    else:
        title = f"{parity.backend} computes what PyTorch computes, to within rounding"
    worst = [
        f"{check.name} {exponent(check.worst)}{_jump(check)}"
        for check in parity.checks
        if check.name in ("sliced", "step", "run") and check.worst is not None
    ]
    details = [
        f"{counted(len(parity.labels), 'image')}, {counted(parity.steps, 'step')}",
        *([f"worst: {', '.join(worst)}"] if worst else []),
        _flips_text(parity),
        *([f"{parity.repeated_steps:,} steps ran again at full capacity"] if parity.repeated_steps else []),
    ]
    return title, "; ".join(details)


def _pictures_of_run(parity: ParityReport) -> float | None:
    """The worst error of the pictures of a whole run; None if pictures were not compared."""
    return next((check.worst for check in parity.checks if check.name == "run" and check.decibels), None)


def _flips_text(parity: ParityReport) -> str:
    """`decisions_text` of all checks."""
    return decisions_text(sum(check.flips for check in parity.checks), sum(check.decisions for check in parity.checks))


def _rounded(parity: ParityReport) -> bool:
    """Whether the bundle stores or computes in less than fp32, so that it is not judged by the rounding of fp32."""
    return parity.precision != Precision.FP32


def _jump(check: Check) -> str:
    """The largest value of an image with a flipped token, if the check excludes such images."""
    if check.sets_aside:
        values = [image.value for image in check.flipped_images if image.value is not None]
        return f" (with a flipped token {exponent(max(values))})" if values else ""
    return ""
