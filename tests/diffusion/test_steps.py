"""The driver of step loops: each step starts from the latents after the one before, and the observer sees each step."""

from __future__ import annotations

import pytest

from dydit.diffusion.steps import LatentsOnly, run_steps


def test_each_step_starts_from_the_latents_after_the_one_before():
    seen = []
    last = run_steps(lambda index, x: LatentsOnly([*x, index]), [], range(2, 5), lambda *call: seen.append(call))
    assert last == [2, 3, 4]
    assert [(index, outcome.x_prev) for index, outcome in seen] == [(2, [2]), (3, [2, 3]), (4, [2, 3, 4])]


def test_without_steps_the_latents_stay():
    assert run_steps(lambda index, x: LatentsOnly(None), "noise", ()) == "noise"


def test_an_error_of_a_step_or_of_the_observer_ends_the_run():
    def observe(index, outcome):
        raise KeyboardInterrupt

    with pytest.raises(ZeroDivisionError):
        run_steps(lambda index, x: LatentsOnly(x / index), 1.0, range(3))
    with pytest.raises(KeyboardInterrupt):
        run_steps(lambda index, x: LatentsOnly(x), 1.0, range(3), observe)
