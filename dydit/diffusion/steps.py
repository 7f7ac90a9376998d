"""The driver of every walk over sampling steps: sampling, calibration, tracing, parity and benchmarks call it.

It knows neither PyTorch nor NumPy: latents are whatever a step takes and gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

X = TypeVar("X")
X_co = TypeVar("X_co", covariant=True)


class StepOutcome(Protocol[X_co]):
    """What a step returns: the latents after it, and whatever else an observer may want to see."""

    @property
    def x_prev(self) -> X_co:
        """The latents after the step, from which the next one starts."""


R = TypeVar("R", bound=StepOutcome[Any])


@dataclass(frozen=True)
class LatentsOnly(Generic[X]):
    """The outcome of a step that has nothing to show but the latents after it."""

    x_prev: X


def run_steps(
    step: Callable[[int, X], R], x: X, steps: Iterable[int], on_step: Callable[[int, R], None] | None = None
) -> X:
    """Run sampling steps one after another, each from the latents after the one before; returns the last latents.

    `steps`: execution indices (0 is the noisiest), in the order in which they run. `step(index, x)` runs one of them
    from the latents `x`. `on_step(index, outcome)` is called after each step with what it returned.
    """
    for index in steps:
        outcome = step(index, x)
        x = outcome.x_prev
        if on_step is not None:
            on_step(index, outcome)
    return x
