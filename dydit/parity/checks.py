"""The verdict on a hop: its comparisons, judged by the table of tolerances. NumPy only.

Values and decisions are judged apart (`dydit.parity.comparison`). An image that routes a token differently is set
aside: where steps stand alone for that step, in a whole run from there on. K steps compared, B images, L blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dydit.parity.comparison import StepComparison, StepValues, relative_l2
from dydit.parity.tolerances import AGREEMENT_FROM, RESIDUAL, Tolerance
from dydit.reports.parity_report import Departure, FlippedImage, Hop, Status
from dydit.reports.results import Measured, measured, measured_all
from dydit.reports.text import decisions_text
from dydit.words import counted


@dataclass(frozen=True)
class Verdict:
    """A hop, and the (step, image) to look into: where it departs, else its worst; None where all is set aside."""

    hop: Hop
    step: int | None
    image: int | None


@dataclass(frozen=True)
class _Evidence:
    rule: Tolerance
    steps: list[int]
    timesteps: np.ndarray  # [S], of all steps
    values: np.ndarray  # [K, B]; infinite where not finite
    contributions: np.ndarray  # [K, B]
    flips: np.ndarray  # [K, L, B]
    margins: np.ndarray  # [K, L, B]
    decisions: int
    run: bool

    def agreeing(self, values: np.ndarray) -> np.ndarray:
        """`values` [K, B] with NaN for what is set aside."""
        if self.rule.tie is None:
            return values
        agrees = ~self.flips.any(axis=1)
        if self.run:
            agrees = np.logical_and.accumulate(agrees, axis=0)
        return np.where(agrees, values, np.nan)

    @property
    def held(self) -> np.ndarray:
        return self.agreeing(self.values)

    @property
    def judged(self) -> np.ndarray:
        """What the bar applies to: every step, or the end of the run."""
        return self.held[-1:] if self.run else self.held


def judge(rule: Tolerance, compared: Sequence[StepComparison], timesteps: np.ndarray) -> Verdict:
    """The verdict on a hop by its rule; `timesteps` [S] of all steps. The hop "run" is one whole run."""
    evidence = _Evidence(
        rule=rule,
        steps=[each.step for each in compared],
        timesteps=timesteps,
        values=np.stack([each.values for each in compared]),
        contributions=np.stack([each.contributions for each in compared]),
        flips=np.stack([each.flips for each in compared]),
        margins=np.stack([each.margins for each in compared]),
        decisions=sum(each.decisions for each in compared),
        run=rule.hop == "run",
    )
    flipped = _flipped_images(evidence)
    faults = _faults(evidence, flipped)
    judged, worst_spot = evidence.judged, _largest(evidence, evidence.held)
    judged_spot = _largest(evidence, judged)
    hop = Hop(
        **_header(evidence.rule),
        status=Status.FAILED if faults else Status.PASSED,
        detail="; ".join(faults) or _praise(evidence, flipped),
        worst=measured(np.nanmax(judged)) if judged_spot else None,
        worst_step=worst_spot[0] if worst_spot else None,
        worst_image=judged_spot[1] if judged_spot else None,
        per_step=_row_maxima(evidence.held),
        per_step_contribution=_row_maxima(evidence.agreeing(evidence.contributions)),
        per_step_flips=tuple(map(int, evidence.flips.sum(axis=(1, 2)))),
        per_image=_row_maxima(judged.T),
        decisions=evidence.decisions,
        flips=int(evidence.flips.sum()),
        flipped_images=tuple(flipped),
    )
    spot = _departure(evidence, flipped) if faults else worst_spot
    return Verdict(hop, *(spot or (None, None)))


def _flipped_images(evidence: _Evidence) -> list[FlippedImage]:
    """Each image that flipped a token, with the flip that counts: of a run its first, as later ones may follow from it;
    of steps that stand alone, each has a first one, and the earliest that is no tie is told before any other."""
    found = []
    for image in range(evidence.values.shape[1]):
        flips = evidence.flips[:, :, image]
        where = np.flatnonzero(flips.any(axis=1))
        if not len(where):
            continue
        first_blocks = {int(k): int(np.flatnonzero(flips[k])[0]) for k in where}
        tie = np.inf if evidence.rule.tie is None else evidence.rule.tie
        margins = {k: float(evidence.margins[k, block, image]) for k, block in first_blocks.items()}
        candidates = list(margins)[:1] if evidence.run else list(margins)
        k = next((k for k in candidates if not margins[k] <= tie), candidates[0])
        found.append(
            FlippedImage(
                image=image,
                step=evidence.steps[k],
                timestep=int(evidence.timesteps[evidence.steps[k]]),
                block=first_blocks[k],
                margin=measured(margins[k]),
                tie=margins[k] <= tie,
                flips=int(flips.sum()),
                value=measured(evidence.values[where, image].max()),
            )
        )
    return found


def _faults(evidence: _Evidence, flipped: list[FlippedImage]) -> list[str]:
    """What is wrong, a line each; nothing where the hop passes."""
    rule, judged, faults = evidence.rule, evidence.judged, []
    over = judged[judged > rule.bar]  # NaN, what is set aside, is not above
    if over.size:
        reached, bar = _told(rule, measured(over.max())), _told(rule, rule.bar)
        faults.append(f"{_noun(rule)} reaches {reached}, the bar is {bar}")
    wrong = [each for each in flipped if not each.tie]
    if wrong:
        first = min(wrong, key=lambda each: each.step)
        logit = "not finite" if first.margin is None else f"{first.margin:.2g} of the usual size"
        faults.append(
            f"{len(wrong)} of {counted(evidence.values.shape[1], 'image')} route{'s' if len(wrong) == 1 else ''} a "
            f"token differently that is no tie (image {first.image}, step {first.step}, block {first.block}: its logit "
            f"is {logit}, a tie is up to {rule.tie:g})"
        )
    flips = int(evidence.flips.sum())
    if evidence.decisions >= AGREEMENT_FROM and flips > (1 - rule.agreement) * evidence.decisions:
        faults.append(f"{decisions_text(flips, evidence.decisions)}, the bar is {1 - rule.agreement:.2%}")
    return faults


def _praise(evidence: _Evidence, flipped: list[FlippedImage]) -> str:
    judged, rule = evidence.judged, evidence.rule
    nothing = np.isnan(judged).all()
    largest = "" if nothing else _told(rule, measured(np.nanmax(judged)))
    worst = "no image kept all its decisions" if nothing else f"{_noun(rule)} at most {largest}"
    if rule.tie is None:
        flips = int(evidence.flips.sum())
        return worst + (f"; {decisions_text(flips, evidence.decisions)}" if flips else "")
    if not flipped:
        return worst
    jumps = [each.value for each in flipped]
    largest = "not finite" if None in jumps else _shown(max(value for value in jumps if value is not None))
    return f"{worst}; {counted(len(flipped), 'image')} flipped a token at a tie (there at most {largest})"


def _noun(rule: Tolerance) -> str:
    return rule.measure.partition(",")[0].removesuffix(" per image")


def _told(rule: Tolerance, value: Measured) -> str:
    """A value of the rule's measure, a picture's error with its PSNR."""
    if not rule.decibels or not value:
        return _shown(value)
    return f"{_shown(value)} (PSNR {-20 * math.log10(value):.1f} dB)"


def _shown(value: Measured) -> str:
    return "a value that is not finite" if value is None else f"{value:.2g}"


def _largest(evidence: _Evidence, values: np.ndarray) -> tuple[int, int] | None:
    """(step, image) of the largest of [K or 1, B]; None where all are set aside."""
    if np.isnan(values).all():
        return None
    row, image = np.unravel_index(int(np.nanargmax(values)), values.shape)
    return evidence.steps[int(row)], int(image)


def _departure(evidence: _Evidence, flipped: list[FlippedImage]) -> tuple[int, int] | None:
    """(step, image) at which a failed hop first leaves its bar or flips inexcusably; else its first flip."""
    over = np.argwhere(evidence.held > evidence.rule.bar)
    spots = [(evidence.steps[int(row)], int(image)) for row, image in over[:1]]
    spots += [(each.step, each.image) for each in flipped if not each.tie]
    return min(spots or [(each.step, each.image) for each in flipped], default=None)


def _row_maxima(values: np.ndarray) -> tuple[Measured, ...]:
    return measured_all(np.nanmax(row) if not np.isnan(row).all() else np.nan for row in values)


def locate(verdict: Verdict, ours: StepValues, reference: StepValues, timestep: int) -> Hop:
    """The hop with `per_block`, and where it failed with the block at which its image departs in its step.

    Both sides were run on that step, with their residuals.
    """
    hop, step, image, images = verdict.hop, verdict.step, verdict.image, len(ours.x)
    assert step is not None and image is not None and ours.residuals is not None and reference.residuals is not None
    per_block = relative_l2(ours.residuals[:, image::images], reference.residuals[:, image::images])
    hop = hop.model_copy(update={"per_block": measured_all(per_block)})
    if hop.status is Status.PASSED:
        return hop
    block, what = None, "after the last block: final layer, guidance or the sampler's formula"
    parted = np.flatnonzero(per_block > RESIDUAL)
    if len(parted):
        block = int(parted[0])
        what = f"block {block}: the residual stream after it differs by {_shown(measured(per_block[block]))}"
    if ours.tokens is not None and reference.tokens is not None:
        flips = (ours.tokens != reference.tokens)[:, image::images].any(axis=(1, 2))
        if flips.any() and (block is None or np.argmax(flips) <= block):
            block = int(np.argmax(flips))
            what = f"block {block}: a token is routed differently"
    where = f"step {step} (timestep {timestep}), image {image}, {what}"
    return hop.model_copy(update={"departure": Departure(step=step, timestep=timestep, block=block, where=where)})


def locate_in_run(verdict: Verdict, timesteps: np.ndarray) -> Hop:
    """The run's hop with the step of its departure. Blocks are not compared: both sides have other latents by then."""
    hop, step, image = verdict.hop, verdict.step, verdict.image
    if hop.status is Status.PASSED or step is None:
        return hop
    flip = next((each for each in hop.flipped_images if (each.image, each.step) == (image, step)), None)
    block = flip.block if flip else None
    what = f"block {block}: a token is routed differently" if flip else "its latents leave the bar"
    timestep = int(timesteps[step])
    where = f"step {step} (timestep {timestep}), image {image}, {what}"
    return hop.model_copy(update={"departure": Departure(step=step, timestep=timestep, block=block, where=where)})


def exact_hop(
    rule: Tolerance, differing: int, detail: str, departure: Departure | None, per_step: Sequence[int] = ()
) -> Hop:
    """The verdict on a hop that allows no difference at all; it failed where there is a departure."""
    return Hop(
        **_header(rule),
        status=Status.FAILED if departure else Status.PASSED,
        detail=detail,
        worst=float(differing),
        worst_step=departure.step if departure else None,
        departure=departure,
        per_step=measured_all(per_step),
    )


def skipped(rule: Tolerance, why: str) -> Hop:
    """A hop that could not be made, which counts as not passed."""
    return Hop(**_header(rule), status=Status.SKIPPED, detail=why)


def _header(rule: Tolerance) -> dict[str, Any]:
    return {
        **{"name": rule.hop, "title": rule.title, "measure": rule.measure, "bar": rule.bar, "reason": rule.reason},
        **{"decibels": rule.decibels, "sets_aside": rule.tie is not None},
    }
