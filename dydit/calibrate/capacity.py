"""Token capacities from token counts: how many MLP slots a row gets in each segment and block. Pure NumPy.

Routed tokens share slots over a batch. A batch of B images of R rows each (R = 2 with guidance) has C*B*R slots in a
block of capacity C, and overflows in step s and block l where

    T(s, l) = sum over its images and rows of the count k(image, s, l, row)  >  C * B * R

From the counts of n images, batches are drawn like those of a user: `GROUPS` or more seeded groups g of B images, drawn
with replacement, so that T_g(s, l) / (B*R) varies as much as for a batch of new images. (Without replacement it would
vary less by the factor 1 - B/n.) Then, for segment j and block l,

    C(j, l) = min(N, ceil_tile((1 + margin) * Q))    Q: quantile of T_g(s, l) / (B*R) over all groups g and steps s of j

where the quantile q of M values is the smallest of them that at least q*M values do not exceed, and ceil_tile rounds up
to a multiple of the tile. With several batch sizes or guidance scales, the largest Q is used.

The images of a group have unrelated classes. A batch of a single class may overflow more often. Its steps are then
repeated at full capacity, so the images are correct and the run takes longer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field, FiniteFloat, field_validator

from dydit.calibrate.tokens import TokenCounts
from dydit.errors import CalibrationError
from dydit.validation import Strict
from dydit.words import counted

Share = Annotated[FiniteFloat, Field(ge=0, le=1)]
GROUPS, MOST_GROUPS = 1000, 10_000
CONFIDENCE = 0.95
_Z = 1.6448536269514722  # the standard normal's quantile of CONFIDENCE


class CapacityConfig(Strict):
    """How capacities are chosen. `batch_sizes` in images; `tile` and capacities in tokens of a row.

    The margin compensates for tokens that the calibration images do not show. The digits model in batches of 20 (250
    steps, 32 subnetworks, guidance 1.5; 128 images to calibrate on, 52 others): 0.10 % of step-blocks overflow without
    it and 0.016 % with 0.01, for MLP multiply-adds, with repeated steps, of 1.090 and 1.093 of those of dynamic
    routing.
    """

    quantile: float = Field(default=0.998, ge=0.5, le=1)
    margin: float = Field(default=0.01, ge=0, le=1, allow_inf_nan=False)
    tile: int = Field(default=1, ge=1)
    batch_sizes: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(16,), min_length=1)

    @field_validator("quantile")
    @classmethod
    def _reachable(cls, quantile: float) -> float:
        if quantile < 1 and groups_for(quantile) > MOST_GROUPS:
            raise ValueError(
                f"too close to 1; use at most {1 - 1 / MOST_GROUPS:g}, or 1 for the largest observed count"
            )
        return quantile

    @field_validator("batch_sizes")
    @classmethod
    def _sizes(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(set(sizes)))

    @property
    def groups(self) -> int:
        """The number of groups to draw: as many as the quantile needs, and at least `GROUPS`."""
        return max(GROUPS, 0 if self.quantile == 1 else groups_for(self.quantile))

    def images_needed(self) -> int:
        """The smallest number n of images for each guidance scale for which the quantile is meaningful.

        It is at least the largest batch; and the rarest group, one image B times, must be rarer than the share that the
        quantile leaves out: n**-B <= 1 - q, so n >= (1 - q)**(-1/B).
        """
        rare = [1.0] if self.quantile == 1 else [(1 - self.quantile) ** (-1 / size) for size in self.batch_sizes]
        return max(max(self.batch_sizes), math.ceil(max(rare) - 1e-9))


def groups_for(quantile: float) -> int:
    """The number of groups of which one lies beyond a quantile below 1."""
    return math.ceil(1 / (1 - quantile) - 1e-9)


def require_samples(config: CapacityConfig, images: int, cfg_scale: float, what: str = "sample") -> None:
    """Raise `CalibrationError`, with the number that is needed, if a guidance scale has too few images."""
    needed = config.images_needed()
    if images < needed:
        raise CalibrationError(
            f"{counted(images, what)} at guidance {cfg_scale:g} {'is' if images == 1 else 'are'} too few for the "
            f"quantile {config.quantile:g} with batches of {', '.join(map(str, config.batch_sizes))}: {needed} are "
            "needed for each guidance scale"
        )


@dataclass(frozen=True)
class Groups:
    """Groups of `batch` images at one guidance scale: `totals` int64 [G, S, L] routed tokens of all their rows."""

    totals: np.ndarray
    batch: int
    rows: int  # rows of an image
    images: int  # number of images that the groups were drawn from

    def per_row(self, first: int, end: int, block: int) -> np.ndarray:
        """Mean tokens of a row in each group, for steps first..end-1 of a block, float64 [G, end - first]."""
        return np.asarray(self.totals[:, first:end, block] / (self.batch * self.rows))


def draw_groups(counts: TokenCounts, batch: int, groups: int, seed: int) -> Groups:
    """Groups of `batch` images, drawn with replacement by Philox with the key (seed, batch).

    Images are ordered by number, so the order in which they were counted does not matter.
    """
    images = len(counts.images)
    raw = np.random.Philox(key=np.array([seed, batch], np.uint64)).random_raw(groups * batch)
    drawn = (raw % np.uint64(images)).astype(np.int64).reshape(groups, batch)
    sums = counts.per_image
    totals = np.empty((groups, *sums.shape[1:]), np.int64)
    for group, members in enumerate(drawn):
        sums[members].sum(axis=0, out=totals[group])
    return Groups(totals, batch, counts.rows, images)


def drawn_for(counts: Sequence[TokenCounts], config: CapacityConfig, seed: int) -> list[Groups]:
    """Groups of every batch size, from the counts of every guidance scale.

    Raises `CalibrationError` if there are no counts, or too few samples (with the number that is needed).
    """
    if not counts:
        raise CalibrationError("there are no token counts to calibrate on; sample more images")
    for each in counts:
        require_samples(config, len(each.images), each.cfg_scale)
    return [draw_groups(each, batch, config.groups, seed) for each in counts for batch in config.batch_sizes]


def choose_capacities(
    groups: Sequence[Groups], bounds: Sequence[int], config: CapacityConfig, tokens: int
) -> np.ndarray:
    """C by segment and block, int64 [segments, L], in 1..`tokens`; formula above. `bounds`: 0 = b_0 < ... < b_k = S."""
    return np.array(
        [
            [
                _capacity(max(_quantile(each.per_row(first, end, block), config.quantile) for each in groups), config)
                for block in range(groups[0].totals.shape[2])
            ]
            for first, end in itertools.pairwise(bounds)
        ],
        np.int64,
    ).clip(1, tokens)


def _quantile(values: np.ndarray, quantile: float) -> float:
    """The smallest of the values that at least a share `quantile` of them do not exceed."""
    rank = max(1, math.ceil(quantile * values.size - 1e-9))
    return float(np.partition(values.reshape(-1), rank - 1)[rank - 1])


def _capacity(per_row: float, config: CapacityConfig) -> int:
    return math.ceil(math.ceil(per_row * (1 + config.margin)) / config.tile) * config.tile


def by_step(capacities: np.ndarray, bounds: Sequence[int]) -> np.ndarray:
    """Capacities [segments, L] for every step, [S, L]."""
    return np.repeat(capacities, np.diff(bounds), axis=0)


class Overflow(Strict):
    """How often the tokens of groups do not fit.

    `rate`: share of step-blocks (group, step, block) in which some token has no slot. `upper`: upper bound of the true
    rate with 95 % confidence. `repeated_steps`: share of steps with such a block, which run again at full capacity.
    """

    rate: Share
    upper: Share
    repeated_steps: Share
    trials: int = Field(ge=1, description="step-blocks of all groups")


def overflow_of(groups: Sequence[Groups], capacities: np.ndarray, bounds: Sequence[int]) -> Overflow:
    """The overflow of the groups at these capacities.

    The bound is Wilson's, one-sided, for m trials: (p + z^2/2m + z*sqrt(p(1-p)/m + z^2/4m^2)) / (1 + z^2/m), z = 1.645.
    Groups share images, and the step-blocks of a group are correlated, so they are not independent trials. With d
    disjoint groups (images // batch) and the variance s^2 over groups of the rate of a group, the effective number of
    trials m gives the variance of the mean of d groups: p(1-p)/m = s^2/d (Kish's effective sample size). It is at most
    d times segments times blocks, where the steps of a segment count as one, because the variance is 0 if nothing
    overflows.
    """
    limits = by_step(capacities, bounds)
    over = [each.totals > limits * (each.batch * each.rows) for each in groups]
    trials = sum(each.size for each in over)
    rate = sum(int(each.sum()) for each in over) / trials
    steps = sum(each.shape[0] * each.shape[1] for each in over)
    repeated = sum(int(each.any(axis=2).sum()) for each in over) / steps
    disjoint = sum(max(1, each.images // each.batch) for each in groups)
    independent: float = disjoint * capacities.size
    variance = float(np.concatenate([each.mean(axis=(1, 2)) for each in over]).var())
    if variance > 0:
        independent = min(independent, disjoint * rate * (1 - rate) / variance)
    return Overflow(rate=rate, upper=wilson_upper(rate, independent), repeated_steps=repeated, trials=trials)


def wilson_upper(rate: float, trials: float) -> float:
    """Upper end of Wilson's one-sided 95 % interval for a share observed in `trials` trials (Wilson, 1927)."""
    square = _Z * _Z / trials
    spread = _Z * math.sqrt(rate * (1 - rate) / trials + square / (4 * trials))
    return min(1.0, (rate + square / 2 + spread) / (1 + square))


def mlp_ratio(
    counts: Sequence[TokenCounts], routed: np.ndarray, capacities: np.ndarray, bounds: Sequence[int], repeated: float
) -> float:
    """MLP multiply-adds by capacity over those by dynamic routing, on the same subnetworks.

    They are proportional to the cost w(s, l) of the groups and to the number of computed tokens. By capacity these are
    C tokens of each row, and N tokens again in every block in the share `repeated` of steps; dynamically they are the
    tokens that the row routes:

        sum over s, l of w * (C + repeated * N)  /  sum over s, l of w * mean count

    `routed` [S, L]: multiply-adds of the routed layers of each step's subnetwork. The mean is over
    guidance scales, with equal weights.
    """
    mean = np.mean([each.mean for each in counts], axis=0)
    computed = by_step(capacities, bounds) + repeated * counts[0].tokens
    needed = float((routed * mean).sum())
    if needed == 0:
        raise CalibrationError("no token entered an MLP, so capacities cannot be compared with dynamic routing")
    return float((routed * computed).sum()) / needed
