"""Reads how a model was trained from the settings that its file states, and from what the user states.

Each setting is a claim: it allows some combinations of a noise schedule and a prediction, and may state betas. The
process is what all claims allow. Claims that exclude each other are refused, and so is a setting that programs use in
different senses, until the user says which one is meant. If only a part of the process is stated, the rest is that of
the published models of the architecture, and a note says so. No PyTorch here. Errors do not name the file: the caller
does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pydantic import FiniteFloat, model_validator

from dydit.diffusion.process import TRAIN_STEPS, NoiseSchedule, Prediction, Process
from dydit.errors import CheckpointError, ConfigError
from dydit.models.config import parse_config
from dydit.validation import Strict

LINEAR, SCALED, COSINE = NoiseSchedule.LINEAR, NoiseSchedule.SCALED_LINEAR, NoiseSchedule.COSINE
VP_SDE, FLOW = NoiseSchedule.VP_SDE, NoiseSchedule.FLOW
EPSILON, X0, V, VELOCITY = Prediction.EPSILON, Prediction.X0, Prediction.V, Prediction.VELOCITY
Combination = tuple[NoiseSchedule, Prediction]

ALL: frozenset[Combination] = frozenset(
    (schedule, prediction)
    for schedule in NoiseSchedule
    for prediction in Prediction
    if (schedule is FLOW) == (prediction is VELOCITY)
)
SUPPORTED = (
    f"dydit samples models that predict epsilon, x0 or v over {TRAIN_STEPS:,} steps of linear, scaled-linear or cosine "
    "betas, and flows as SiT trains them, so samples of this one would be wrong"
)
ALONE = "to decide it yourself, save the weights without settings and give --prediction and --schedule"
_DIT = Process()


def combinations(
    schedules: Iterable[NoiseSchedule] = tuple(NoiseSchedule), predictions: Iterable[Prediction] = tuple(Prediction)
) -> frozenset[Combination]:
    """The combinations of these schedules with these predictions."""
    schedules, predictions = set(schedules), set(predictions)
    return frozenset(each for each in ALL if each[0] in schedules and each[1] in predictions)


@dataclass(frozen=True)
class Claim:
    """What a setting says. `text`: the setting and where it is from. `allowed`: the combinations that agree with it.

    `decides`: whether it says what the process is, and not only what it is not. `start`, `end`: betas. `two_kinds`:
    whether programs use its name for linear and for scaled-linear betas. `option`: if the setting has several senses,
    the option by which the user says which one is meant; `senses` explains them.
    """

    text: str
    allowed: frozenset[Combination] = ALL
    decides: bool = True
    start: float | None = None
    end: float | None = None
    two_kinds: bool = False
    option: str | None = None
    senses: str = ""

    @property
    def has_betas(self) -> bool:
        """Whether it states the first or the last beta."""
        return self.start is not None or self.end is not None

    def contradicts(self, other: Claim) -> bool:
        """Whether no process agrees with both."""
        return not self.allowed & other.allowed or _differ(self.start, other.start) or _differ(self.end, other.end)


class ProcessOptions(Strict):
    """What the user states of a process. A flow predicts the velocity, and nothing else does: one implies the other."""

    prediction: Prediction | None = None
    schedule: NoiseSchedule | None = None
    betas: tuple[FiniteFloat, FiniteFloat] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ProcessOptions:
        if self.prediction is not None and self.schedule is not None:
            Process(schedule=self.schedule, prediction=self.prediction)
        if self.betas is not None and "--schedule" in self.settles:
            schedule = self.schedule or FLOW
            Process(schedule=schedule, prediction=VELOCITY if schedule is FLOW else EPSILON, betas=self.betas)
        return self

    @property
    def settles(self) -> set[str]:
        """The options whose values follow from what is stated."""
        settled = set()
        if self.schedule is not None or self.prediction is VELOCITY:
            settled.add("--schedule")
        if self.prediction is not None or self.schedule is FLOW:
            settled.add("--prediction")
        return settled

    def claims(self) -> list[Claim]:
        """What is stated as claims. Their texts are the options."""
        claims = []
        if self.prediction is not None:
            claims.append(Claim(f"--prediction {self.prediction}", combinations(predictions=[self.prediction])))
        if self.schedule is not None:
            claims.append(Claim(f"--schedule {self.schedule}", combinations([self.schedule])))
        if self.betas is not None:
            start, end = self.betas
            claims.append(Claim(f"--betas {start},{end}", combinations([LINEAR, SCALED, VP_SDE]), start=start, end=end))
        return claims


@dataclass(frozen=True)
class Reading:
    """The process, None if nothing states it, and notes for the user about parts of it that nothing states."""

    process: Process | None
    notes: tuple[str, ...] = ()


def own_claims(process: Process | None) -> list[Claim]:
    """The claims of a file in our own format, which states a whole process or nothing."""
    if process is None:
        return []
    claims = [
        Claim(f"it states prediction {process.prediction}", combinations(predictions=[process.prediction])),
        Claim(f"it states schedule {process.schedule}", combinations([process.schedule])),
    ]
    if process.schedule not in (COSINE, FLOW):
        start, end = process.beta_range
        claims.append(Claim(f"it states betas {start:g},{end:g}", start=start, end=end))
    return claims


def read_process(claims: Sequence[Claim], options: ProcessOptions | None = None, usual: Process = _DIT) -> Reading:
    """The process that all `claims` of a file and the user's `options` allow.

    `usual`: of published models of the architecture, for what is not stated. If nothing is stated and it is not DiT's,
    it is part of the result, with a note.
    Raises `CheckpointError` if they contradict each other, or leave open what must not be guessed.
    """
    options = options or ProcessOptions()
    given = options.claims()
    _require_agreement(claims, given)
    for claim in claims:
        if claim.option is not None and claim.option not in options.settles:
            raise _open(claim, claim.senses)
    every = [*claims, *given]
    allowed = ALL.intersection(*(claim.allowed for claim in every))
    if not any(claim.decides for claim in every):
        return Reading(None) if usual == _DIT else Reading(usual, (_assumed(usual),))
    schedule, notes = _schedule({schedule for schedule, _ in allowed}, every, usual)
    predictions = [prediction for each, prediction in allowed if each is schedule]
    prediction = predictions[0] if len(predictions) == 1 else EPSILON
    if len(predictions) > 1:
        notes = (*notes, "assumed that it predicts epsilon; if that is wrong, give --prediction")
    values = {"schedule": schedule, "prediction": prediction, "betas": _betas(schedule, every, options, usual.schedule)}
    try:
        return Reading(parse_config(Process, values), notes)
    except ConfigError as error:
        said = "; ".join(claim.text for claim in every if claim.has_betas)
        raise CheckpointError(f"cannot have been trained with its betas ({said}): {error}") from error


def unsupported(text: str) -> CheckpointError:
    """The error for a setting, by its text, of a model that we cannot sample."""
    return CheckpointError(f"was trained in another way: {text}; {SUPPORTED}")


def _require_agreement(claims: Sequence[Claim], given: Sequence[Claim]) -> None:
    for at, claim in enumerate(claims):
        if other := next((each for each in claims[:at] if each.contradicts(claim)), None):
            raise CheckpointError(f"contradicts itself: {other.text}, but {claim.text}; {ALONE}")
    for claim in given:
        if other := next((each for each in claims if each.contradicts(claim)), None):
            option, _, _ = claim.text.partition(" ")
            raise CheckpointError(f"was trained in another way than {claim.text}: {other.text}; remove {option}")


def _open(claim: Claim, senses: str) -> CheckpointError:
    return CheckpointError(f"leaves open how it was trained: {claim.text}{senses}")


def _assumed(process: Process) -> str:
    return f"assumed {process.schedule_words}; if that is wrong, give --schedule"


def _schedule(
    schedules: set[NoiseSchedule], every: Sequence[Claim], usual: Process
) -> tuple[NoiseSchedule, tuple[str, ...]]:
    if len(schedules) == 1:
        return next(iter(schedules)), ()
    if (either := next((claim for claim in every if claim.two_kinds), None)) is not None:
        senses = ", a name for linear betas in some programs, and for scaled-linear ones in others; give --schedule"
        raise _open(either, senses)
    other = next((claim for claim in every if claim.has_betas and not _of(usual, claim)), None)
    if other is not None:
        raise _open(other, ", but nothing states the noise schedule; give --schedule, such as linear or scaled-linear")
    chosen = usual if usual.schedule in schedules else _DIT
    return chosen.schedule, (_assumed(chosen),)


def _betas(
    schedule: NoiseSchedule, every: Sequence[Claim], options: ProcessOptions, usual_schedule: NoiseSchedule
) -> tuple[float, float] | None:
    """The betas of the schedule, or None for its usual ones."""
    if schedule in (COSINE, FLOW):
        return None
    expected = Process(schedule=schedule).beta_range
    start = next((claim.start for claim in every if claim.start is not None), None)
    end = next((claim.end for claim in every if claim.end is not None), None)
    if start is None and end is None:
        if schedule is SCALED and SCALED not in (options.schedule, usual_schedule):
            states = next(claim for claim in every if claim.allowed <= combinations([SCALED]))
            raise _open(
                states, f", but not its betas; give --betas, {expected[0]},{expected[1]} if they are Stable Diffusion's"
            )
        return None
    if start is None or end is None:
        half = next(claim for claim in every if claim.has_betas)
        if schedule is not LINEAR or not _of(_DIT, half):
            raise _open(half, ", but only one of its two betas; give both with --betas START,END")
        return None
    return None if not _differ(start, expected[0]) and not _differ(end, expected[1]) else (start, end)


def _of(process: Process, claim: Claim) -> bool:
    """Whether the betas that a claim states are those of a process."""
    start, end = process.beta_range
    return not _differ(claim.start, start) and not _differ(claim.end, end)


def _differ(one: float | None, other: float | None) -> bool:
    """Whether two betas are stated and differ by more than rounding."""
    return one is not None and other is not None and not math.isclose(one, other, rel_tol=1e-6)
