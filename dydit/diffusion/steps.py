"""The driver of every walk over sampling steps: sampling, calibration, tracing, parity and benchmarks call it.

It knows neither PyTorch nor NumPy: latents are whatever a step takes and gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

X_co = TypeVar("X_co", covariant=True)


@dataclass(frozen=True)
class State(Generic[X_co]):
    """What one step hands to the next: the latents `x` [B, C, S, S], and a multistep solver's `history`, alike.

    `history` None: the first step, or a sampler without history. It counts as zeros.
    """

    x: X_co
    history: X_co | None = None

    def history_or(self, zeros: Callable[[Any], Any]) -> X_co:
        """The history; where there is none, `zeros(x)`: NumPy's or PyTorch's `zeros_like`."""
        kept: X_co = zeros(self.x) if self.history is None else self.history
        return kept

    def part(self, images: slice) -> State[Any]:
        """The state of some images."""
        x: Any = self.x
        history: Any = self.history
        return State(x[images], None if history is None else history[images])


class StepOutcome(Protocol[X_co]):
    """What a step returns: the state after it, and whatever else an observer may want to see."""

    @property
    def state(self) -> State[X_co]:
        """The state from which the next step starts."""


R = TypeVar("R", bound=StepOutcome[Any])


@dataclass(frozen=True)
class StateOnly(Generic[X_co]):
    """The outcome of a step that has nothing to show but the state after it."""

    state: State[X_co]


def run_steps(
    step: Callable[[int, State[Any]], R],
    state: State[Any],
    steps: Iterable[int],
    on_step: Callable[[int, R], None] | None = None,
) -> State[Any]:
    """Run sampling steps one after another, each from the state after the one before; returns the last state.

    `steps`: execution indices (0 is the noisiest), in the order in which they run. `step(index, state)` runs one of
    them. `on_step(index, outcome)` is called after each step with what it returned.
    """
    for index in steps:
        outcome = step(index, state)
        state = outcome.state
        if on_step is not None:
            on_step(index, outcome)
    return state
