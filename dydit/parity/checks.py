"""The verdict on a check: its comparisons, judged by the table of tolerances. NumPy only.

Values and routing decisions are judged separately (`dydit.parity.comparison`). An image that routes a token differently
is excluded from the values: for this step if each step starts from the reference's latents, and from this step on in a
whole run. Shapes: K compared steps, B images, L blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dydit.parity.comparison import StepComparison, StepValues, relative_l2
from dydit.parity.tolerances import AGREEMENT_FROM, RESIDUAL, Tolerance
from dydit.reports.parity_report import Check, Departure, FlippedImage, Status
from dydit.reports.results import Measured, measured, measured_all
from dydit.reports.text import decisions_text
from dydit.words import counted


@dataclass(frozen=True)
class Verdict:
    """A check, and the (step, image) to examine: where it departs, else its worst; None if all images are excluded."""

    check: Check
    step: int | None
    image: int | None


@dataclass(frozen=True)
class _Evidence:
    tolerance: Tolerance
    steps: list[int]
    timesteps: np.ndarray  # [S], of all steps
    values: np.ndarray  # [K, B]; infinite where not finite
    contributions: np.ndarray  # [K, B]
    flips: np.ndarray  # [K, L, B]
    margins: np.ndarray  # [K, L, B]
    decisions: int
    run: bool

    def agreeing(self, values: np.ndarray) -> np.ndarray:
        """`values` [K, B] with NaN for excluded images."""
        if self.tolerance.near_tie is None:
            return values
        agrees = ~self.flips.any(axis=1)
        if self.run:
            agrees = np.logical_and.accumulate(agrees, axis=0)
        return np.where(agrees, values, np.nan)

    @property
    def counted(self) -> np.ndarray:
        """The values [K, B] of images that agree, NaN for the others."""
        return self.agreeing(self.values)

    @property
    def judged(self) -> np.ndarray:
        """The values that the tolerance applies to: those of every step, or of the end of the run."""
        return self.counted[-1:] if self.run else self.counted


def judge(tolerance: Tolerance, compared: Sequence[StepComparison], timesteps: np.ndarray) -> Verdict:
    """The verdict on a check; `timesteps` [S] of all steps. The check "run" is one whole run."""
    evidence = _Evidence(
        tolerance=tolerance,
        steps=[each.step for each in compared],
        timesteps=timesteps,
        values=np.stack([each.values for each in compared]),
        contributions=np.stack([each.contributions for each in compared]),
        flips=np.stack([each.flips for each in compared]),
        margins=np.stack([each.margins for each in compared]),
        decisions=sum(each.decisions for each in compared),
        run=tolerance.check == "run",
    )
    flipped = _flipped_images(evidence)
    faults = _faults(evidence, flipped)
    judged, worst_spot = evidence.judged, _largest(evidence, evidence.counted)
    judged_spot = _largest(evidence, judged)
    check = Check(
        **_header(tolerance),
        status=Status.FAILED if faults else Status.PASSED,
        detail="; ".join(faults) or _summary(evidence, flipped),
        worst=measured(np.nanmax(judged)) if judged_spot else None,
        worst_step=worst_spot[0] if worst_spot else None,
        worst_image=judged_spot[1] if judged_spot else None,
        per_step=_row_maxima(evidence.counted),
        per_step_contribution=_row_maxima(evidence.agreeing(evidence.contributions)),
        per_step_flips=tuple(map(int, evidence.flips.sum(axis=(1, 2)))),
        per_image=_row_maxima(judged.T),
        decisions=evidence.decisions,
        flips=int(evidence.flips.sum()),
        flipped_images=tuple(flipped),
    )
    spot = _departure(evidence, flipped) if faults else worst_spot
    step, image = spot or (None, None)
    return Verdict(check, step, image)


def _flipped_images(evidence: _Evidence) -> list[FlippedImage]:
    """Each image that flipped a token, with the flip to report.

    Of a run it is the first flip, as later ones may follow from it. Of single steps, each step has a first flip, and
    the earliest one that is not a near-tie is preferred.
    """
    flipped = []
    for image in range(evidence.values.shape[1]):
        flips = evidence.flips[:, :, image]
        where = np.flatnonzero(flips.any(axis=1))
        if not len(where):
            continue
        first_blocks = {int(k): int(np.flatnonzero(flips[k])[0]) for k in where}
        near_tie = np.inf if evidence.tolerance.near_tie is None else evidence.tolerance.near_tie
        margins = {k: float(evidence.margins[k, block, image]) for k, block in first_blocks.items()}
        candidates = list(margins)[:1] if evidence.run else list(margins)
        k = next((k for k in candidates if not margins[k] <= near_tie), candidates[0])
        flipped.append(
            FlippedImage(
                image=image,
                step=evidence.steps[k],
                timestep=float(evidence.timesteps[evidence.steps[k]]),
                block=first_blocks[k],
                margin=measured(margins[k]),
                tie=margins[k] <= near_tie,
                flips=int(flips.sum()),
                value=measured(evidence.values[where, image].max()),
            )
        )
    return flipped


def _faults(evidence: _Evidence, flipped: list[FlippedImage]) -> list[str]:
    """What is wrong, a sentence each; empty if the check passes."""
    tolerance, judged, faults = evidence.tolerance, evidence.judged, []
    over = judged[judged > tolerance.limit]  # NaN, which stands for excluded images, is not above
    if over.size:
        reached, limit = _value_text(tolerance, measured(over.max())), _value_text(tolerance, tolerance.limit)
        faults.append(f"{_noun(tolerance)} reaches {reached}, the tolerance is {limit}")
    faulty = [each for each in flipped if not each.tie]
    if faulty:
        first = min(faulty, key=lambda each: each.step)
        logit = (
            "not finite"
            if first.margin is None
            else f"{first.margin:.2g} times the root mean square of the block's logits"
        )
        faults.append(
            f"{len(faulty)} of {counted(evidence.values.shape[1], 'image')} route{'s' if len(faulty) == 1 else ''} a "
            f"token differently, and the decision is not a near-tie (image {first.image}, step {first.step}, block "
            f"{first.block}: the router's logit is {logit}; a near-tie is at most {tolerance.near_tie:g} times)"
        )
    flips = int(evidence.flips.sum())
    if evidence.decisions >= AGREEMENT_FROM and flips > (1 - tolerance.agreement) * evidence.decisions:
        faults.append(f"{decisions_text(flips, evidence.decisions)}, the tolerance is {1 - tolerance.agreement:.2%}")
    return faults


def _summary(evidence: _Evidence, flipped: list[FlippedImage]) -> str:
    """What a check that passed came to."""
    judged, tolerance = evidence.judged, evidence.tolerance
    if np.isnan(judged).all():
        worst = "every image has a token that is routed differently, so no value was compared with the tolerance"
    else:
        worst = f"{_noun(tolerance)} at most {_value_text(tolerance, measured(np.nanmax(judged)))}"
    if tolerance.near_tie is None:
        flips = int(evidence.flips.sum())
        return worst + (f"; {decisions_text(flips, evidence.decisions)}" if flips else "")
    if not flipped:
        return worst
    jumps = [each.value for each in flipped]
    largest = "not finite" if None in jumps else _shown(max(value for value in jumps if value is not None))
    ties = f"{counted(len(flipped), 'image')} flipped a token at a near-tie"
    return f"{worst}; {ties} (largest value of these images: {largest})"


def _noun(tolerance: Tolerance) -> str:
    return tolerance.measure.partition(",")[0].removesuffix(" per image")


def _value_text(tolerance: Tolerance, value: Measured) -> str:
    """A value of the measure; that of a picture's error with its PSNR."""
    if not tolerance.decibels or not value:
        return _shown(value)
    return f"{_shown(value)} (PSNR {-20 * math.log10(value):.1f} dB)"


def _shown(value: Measured) -> str:
    return "a value that is not finite" if value is None else f"{value:.2g}"


def _largest(evidence: _Evidence, values: np.ndarray) -> tuple[int, int] | None:
    """(step, image) of the largest of the values [K or 1, B]; None if all are excluded."""
    if np.isnan(values).all():
        return None
    row, image = np.unravel_index(int(np.nanargmax(values)), values.shape)
    return evidence.steps[int(row)], int(image)


def _departure(evidence: _Evidence, flipped: list[FlippedImage]) -> tuple[int, int] | None:
    """(step, image) where a failed check first exceeds its tolerance or flips beyond a near-tie; or its first flip."""
    over = np.argwhere(evidence.counted > evidence.tolerance.limit)
    spots = [(evidence.steps[int(row)], int(image)) for row, image in over[:1]]
    spots += [(each.step, each.image) for each in flipped if not each.tie]
    return min(spots or [(each.step, each.image) for each in flipped], default=None)


def _row_maxima(values: np.ndarray) -> tuple[Measured, ...]:
    return measured_all(np.nanmax(row) if not np.isnan(row).all() else np.nan for row in values)


def locate(verdict: Verdict, ours: StepValues, reference: StepValues, timestep: float) -> Check:
    """The check with `per_block`; if it failed, also with the block at which its image departs in its step.

    `ours` and `reference`: that step, run with residuals.
    """
    check, step, image, images = verdict.check, verdict.step, verdict.image, len(ours.x)
    assert step is not None and image is not None and ours.residuals is not None and reference.residuals is not None
    per_block = relative_l2(ours.residuals[:, image::images], reference.residuals[:, image::images])
    check = check.model_copy(update={"per_block": measured_all(per_block)})
    if check.status is Status.PASSED:
        return check
    block, what = None, "after the last block: in the final layer, guidance or the sampler's formula"
    differing = np.flatnonzero(per_block > RESIDUAL)
    if len(differing):
        block = int(differing[0])
        what = f"block {block}: the residual stream after it differs by {_shown(measured(per_block[block]))}"
    if ours.tokens is not None and reference.tokens is not None:
        flips = (ours.tokens != reference.tokens)[:, image::images].any(axis=(1, 2))
        if flips.any() and (block is None or np.argmax(flips) <= block):
            block = int(np.argmax(flips))
            what = f"block {block}: a token is routed differently"
    return _departing(check, step, timestep, image, block, what)


def locate_in_run(verdict: Verdict, timesteps: np.ndarray) -> Check:
    """The check of the whole run with the step of its departure. Blocks are not compared: by then latents differ."""
    check, step, image = verdict.check, verdict.step, verdict.image
    if check.status is Status.PASSED or step is None:
        return check
    flip = next((each for each in check.flipped_images if (each.image, each.step) == (image, step)), None)
    block = flip.block if flip else None
    what = f"block {block}: a token is routed differently" if flip else "its latents exceed the tolerance"
    return _departing(check, step, float(timesteps[step]), image, block, what)


def _departing(check: Check, step: int, timestep: float, image: int | None, block: int | None, what: str) -> Check:
    where = f"step {step} (timestep {timestep:g}), image {image}, {what}"
    return check.model_copy(update={"departure": Departure(step=step, timestep=timestep, block=block, where=where)})


def exact_check(
    tolerance: Tolerance, differing: int, detail: str, departure: Departure | None, per_step: Sequence[int] = ()
) -> Check:
    """A check that allows no difference at all. It failed if there is a departure."""
    return Check(
        **_header(tolerance),
        status=Status.FAILED if departure else Status.PASSED,
        detail=detail,
        worst=float(differing),
        worst_step=departure.step if departure else None,
        departure=departure,
        per_step=measured_all(per_step),
    )


def skipped(tolerance: Tolerance, reason: str) -> Check:
    """A check that could not be made. It counts as not passed."""
    return Check(**_header(tolerance), status=Status.SKIPPED, detail=reason)


def _header(tolerance: Tolerance) -> dict[str, Any]:
    return {
        "name": tolerance.check,
        "title": tolerance.title,
        "measure": tolerance.measure,
        "tolerance": tolerance.limit,
        "reason": tolerance.reason,
        "decibels": tolerance.decibels,
        "sets_aside": tolerance.near_tie is not None,
    }
