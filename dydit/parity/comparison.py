"""The arithmetic of a comparison: relative errors of each image, and token decisions separately from values.

If a token of an image is routed differently, the image makes a jump, and its value says nothing about rounding. Whether
such a flip is acceptable depends on how near to zero the logit of the token is. NumPy only. Shapes: B images, L blocks,
rows = B or 2B, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dydit.diffusion.steps import State


def relative_l2(value: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """||value - reference|| / ||reference|| of each entry of the first axis, float64.

    It is 0 where both are zero, and infinite where `value` is not finite.
    """
    a, b = (array.reshape(len(array), -1).astype(np.float64) for array in (value, reference))
    with np.errstate(divide="ignore", invalid="ignore"):
        difference, size = np.linalg.norm(a - b, axis=1), np.linalg.norm(b, axis=1)
        ratio = np.where(difference == 0, 0.0, difference / size)
    return np.where(np.isfinite(ratio), ratio, np.inf)


PIXEL_SPAN = 2.0
"""The range of values of pixels, which are in [-1, 1]."""


def picture_error(value: np.ndarray, reference: np.ndarray, span: float | None) -> np.ndarray:
    """Root mean square difference of each entry of the first axis, in units of `span`, float64; PSNR = -20 log10 of it.

    `span`: the range of values, `PIXEL_SPAN` for pixels; None: the range of the reference's entry. The result
    is infinite where `value` is not finite.
    """
    a, b = (array.reshape(len(array), -1).astype(np.float64) for array in (value, reference))
    size = np.ptp(b, axis=1) if span is None else span
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.sqrt(np.square(a - b).mean(axis=1))
        error = np.where(error == 0, 0.0, error / size)
    return np.where(np.isfinite(error), error, np.inf)


Measure = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class StepComparison:
    """One sampling step compared with the reference.

    `values` float64 [B]: the measure of the check (relative L2) of x_prev. `contributions` float64 [B]: relative L2 of
    x_prev - c_x*x, the part that comes from the model. `flips` int64 [L, B]: number of tokens routed differently.
    `margins` float64 [L, B]: the largest |logit| among them, in units of the root mean square of the block's logits; 0
    where nothing flipped. `decisions`: number of token decisions compared.
    """

    step: int
    values: np.ndarray
    contributions: np.ndarray
    flips: np.ndarray
    margins: np.ndarray
    decisions: int


@dataclass(frozen=True)
class StepValues:
    """One step of one form of the model: `x` before it and `x_prev` after it, f32 [B, C, S, S]; `tokens` bool
    [L, rows, N], None if the model does not route tokens; `residuals` f32 [L, rows, N, D] if they were requested;
    `next_history` as `x_prev`, if the sampler has one."""

    x: np.ndarray
    x_prev: np.ndarray
    tokens: np.ndarray | None
    residuals: np.ndarray | None = None
    next_history: np.ndarray | None = None

    @property
    def state(self) -> State[np.ndarray]:
        """The state from which the next step starts."""
        return State(self.x_prev, self.next_history)


def compare_step(
    step: int,
    ours: StepValues,
    reference: StepValues,
    c_x: float,
    logits: np.ndarray | None,
    measure: Measure = relative_l2,
    c_history: float = 0.0,
) -> StepComparison:
    """Compare a step with the reference's. `logits` f32 [L, rows, N]: those of the reference (None: a static model).

    `c_history`: the coefficient with which the next step takes `next_history`. What a wrong history adds to that step's
    latents then counts as an error of this step, by the same measure.
    """
    images = len(ours.x)
    values = measure(ours.x_prev, reference.x_prev)
    if c_history:
        assert reference.next_history is not None
        kept = np.zeros_like(ours.x) if ours.next_history is None else ours.next_history
        added = c_history * (kept.astype(np.float64) - reference.next_history)
        values = np.maximum(values, measure(reference.x_prev + added, reference.x_prev))
    parts = [each.x_prev.astype(np.float64) - c_x * each.x for each in (ours, reference)]
    flips, margins, decisions = np.zeros((1, images), np.int64), np.zeros((1, images)), 0
    if logits is not None:
        assert ours.tokens is not None and ours.tokens.shape == logits.shape
        flips, margins = count_flips(ours.tokens, logits, images)
        decisions = int(np.isfinite(logits).sum())
    return StepComparison(step, values, relative_l2(parts[0], parts[1]), flips, margins, decisions)


def count_flips(tokens: np.ndarray, logits: np.ndarray, images: int) -> tuple[np.ndarray, np.ndarray]:
    """(flips, margins) as in `StepComparison`, from [L, rows, N]; the rows of an image, with and without its label, are
    counted together. Tokens that are always routed have infinite logits, which do not count as values."""
    values = np.where(np.isfinite(logits), logits, np.nan)
    size = np.sqrt(np.nanmean(np.square(values, dtype=np.float64), axis=(1, 2), keepdims=True))
    flipped = tokens != (logits > 0)
    margin = np.where(flipped, np.abs(logits) / np.maximum(size, np.finfo(np.float64).tiny), 0.0)
    shape = (len(tokens), -1, images, tokens.shape[2])  # rows are (with and without label, images)
    return flipped.reshape(shape).sum(axis=(1, 3)), margin.reshape(shape).max(axis=(1, 3))
