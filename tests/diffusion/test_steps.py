"""The driver of step loops: each step starts from the state after the one before, and the observer sees each step."""

from __future__ import annotations

import pytest

from dydit.diffusion.steps import State, StateOnly, run_steps


def test_each_step_starts_from_the_state_after_the_one_before():
    def step(index: int, state: State[list[int]]) -> StateOnly[list[int]]:
        return StateOnly(State([*state.x, index], [len(state.x), *(state.history or [])]))

    seen = []
    last = run_steps(step, State([]), range(2, 5), lambda *call: seen.append(call))
    assert last == State([2, 3, 4], [2, 1, 0])
    assert [(index, outcome.state) for index, outcome in seen] == [
        (2, State([2], [0])),
        (3, State([2, 3], [1, 0])),
        (4, State([2, 3, 4], [2, 1, 0])),
    ]


def test_without_steps_the_state_stays():
    state = State("noise", "history")
    assert run_steps(lambda index, state: StateOnly(State(None)), state, ()) is state


def test_the_first_state_has_no_history():
    assert State("noise").history is None


def test_an_error_of_a_step_or_of_the_observer_ends_the_run():
    def observe(index, outcome):
        raise KeyboardInterrupt

    with pytest.raises(ZeroDivisionError):
        run_steps(lambda index, state: StateOnly(State(state.x / index)), State(1.0), range(3))
    with pytest.raises(KeyboardInterrupt):
        run_steps(lambda index, state: StateOnly(state), State(1.0), range(3), observe)
