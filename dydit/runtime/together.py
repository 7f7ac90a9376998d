"""Sampling for callers that see, and may change, the latents after every step: all batches do a step, then the next.

It goes step by step on every backend, those that run whole runs on a device included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dydit.bundle.manifest import Manifest
from dydit.diffusion.steps import State, StateOnly, run_steps
from dydit.errors import ConfigError
from dydit.runtime.arguments import float_array
from dydit.runtime.loop import Progress, StepRunner, as_one_run, require_finite
from dydit.runtime.noise_source import NoiseSource
from dydit.runtime.request import Batch

LATENTS = "latents"
OnStep = Callable[[int, np.ndarray], np.ndarray]
"""`on_step(step, latents)`: called after an execution step with the latents of all images of the run in order,
f32 [N, C, S, S]. Returns those to go on with, alike."""


def sample_together(
    runner: StepRunner,
    batches: Sequence[Batch],
    noise: NoiseSource,
    on_step: OnStep,
    progress: Progress | None = None,
) -> np.ndarray:
    """Run every batch to its end; returns the final latents, f32 [N, C, S, S].

    `progress(done, total)` counts steps of a batch. An error of `on_step` ends the run. Raises what
    `dydit.runtime.loop.sample` raises.
    """
    return as_one_run(runner.backend, lambda: _sample(runner, batches, noise, on_step, progress))


def _sample(
    runner: StepRunner, batches: Sequence[Batch], noise: NoiseSource, on_step: OnStep, progress: Progress | None
) -> np.ndarray:
    manifest = runner.backend.bundle.manifest
    segments, steps = manifest.plan.segments, manifest.sampling.steps
    starts = {segment.first: index for index, segment in enumerate(segments)}
    runs = [(batch, runner.steps_of(batch, noise)) for batch in batches]
    runner.images = runner.images or max(len(batch.images) for batch in batches)
    done = 0

    def step(index: int, state: State[np.ndarray]) -> StateOnly[np.ndarray]:
        nonlocal done
        if (segment := starts.get(index)) is not None:
            runner.subnets.get(segments[segment].subnet)
            if segment + 1 < len(segments):
                runner.subnets.prefetch(segments[segment + 1].subnet)
        after = []
        for batch, run in runs:
            after.append(run(index, state.part(batch.places)).state)
            require_finite(after[-1].x, batch, f"step {index}")
            done += 1
            if progress:
                progress(done, len(runs) * steps)
        histories = [each.history for each in after if each.history is not None]
        x = on_step(index, np.concatenate([each.x for each in after]))
        return StateOnly(State(x, np.concatenate(histories) if histories else None))

    initial = State(np.concatenate([noise.initial(batch) for batch in batches]))
    x: np.ndarray = run_steps(step, initial, range(steps)).x
    return x


def step_callback(pipe: Any, callback: Any, names: Any, manifest: Manifest) -> OnStep:
    """A caller's `callback_on_step_end`, as diffusers defines it, as an `OnStep`.

    It is called as `callback(pipe, step, timestep, {name: value})` for the `names` of values that it wants. Of the
    dictionary that it returns, `latents` replace the present ones; None or an empty one changes nothing. Raises
    `ConfigError` for a callback or names that are not so, and when it returns something else.
    """
    if not callable(callback):
        raise ConfigError(f"callback_on_step_end must be a function, not {type(callback).__name__}")
    if isinstance(names, str) or any(name != LATENTS for name in names):
        raise ConfigError(f"callback_on_step_end_tensor_inputs {names!r} must be ('{LATENTS}',), or empty")
    given, timesteps = tuple(names), manifest.sampling.timesteps
    whole = manifest.model.diffusion.discrete

    def on_step(step: int, latents: np.ndarray) -> np.ndarray:
        timestep = int(timesteps[step]) if whole else timesteps[step]
        answer = callback(pipe, step, timestep, {name: latents.copy() for name in given})
        if answer is not None and not isinstance(answer, Mapping):
            raise ConfigError(f"callback_on_step_end returned {type(answer).__name__}, expected a dictionary")
        if not answer or LATENTS not in answer:
            return latents
        return float_array(answer[LATENTS], "latents of callback_on_step_end", latents.shape).copy()

    return on_step
