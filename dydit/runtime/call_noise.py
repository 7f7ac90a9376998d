"""The noise of a pipeline's call: from a seed or a generator, or given as arrays."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dydit.bundle.manifest import Manifest
from dydit.errors import ConfigError
from dydit.runtime.arguments import float_array, short, whole_number
from dydit.runtime.noise_source import NoiseSource, SeededNoise
from dydit.runtime.request import UINT64, Batch
from dydit.words import counted

SEED_BITS = 53  # of a random seed: programs that read JSON numbers as doubles keep it exactly
Draw = Callable[[], np.ndarray]


@dataclass(frozen=True)
class CallNoise:
    """Noise of a call's images, found by their position: what was given, f32, and `drawn` for what was not.

    `latents` [N, C, S, S]: the starting latents. `noise` [steps, N, C, S, S]: of every execution step. `seed`: that
    of `drawn`, if it has one.
    """

    latents: np.ndarray | None
    noise: np.ndarray | None
    drawn: NoiseSource | None
    seed: int | None

    def initial(self, batch: Batch) -> np.ndarray:
        if self.latents is not None:
            return self.latents[batch.places]
        assert self.drawn is not None
        return self.drawn.initial(batch)

    def step(self, batch: Batch, step: int) -> np.ndarray:
        if self.noise is not None:
            return self.noise[step, batch.places]
        assert self.drawn is not None
        return self.drawn.step(batch, step)


@dataclass
class GeneratedNoise:
    """The noise that a caller's generator gives, found by an image's position.

    `draw` gives the next draw of all images, f32 [N, C, S, S]: first the starting latents, unless `initial_draw` is
    false, then the noise of `steps`, the execution steps that add some, in order. Batches ask for it in another
    order, so draws are kept until the call ends.
    """

    draw: Draw
    steps: Sequence[int]
    initial_draw: bool = True
    _made: list[np.ndarray] = field(default_factory=list)

    def initial(self, batch: Batch) -> np.ndarray:
        return self._part(0, batch)

    def step(self, batch: Batch, step: int) -> np.ndarray:
        return self._part(self.initial_draw + self.steps.index(step), batch)

    def _part(self, place: int, batch: Batch) -> np.ndarray:
        while len(self._made) <= place:
            self._made.append(self.draw())
        return self._made[place][batch.places]


def noise_of_call(
    manifest: Manifest, count: int, seed: Any = None, generator: Any = None, latents: Any = None, noise: Any = None
) -> CallNoise:
    """The noise of `count` images. What `latents` and `noise` do not give is drawn: from `generator`, or from `seed`.

    Without either, a new seed is drawn. Raises `ConfigError`, naming the argument, for what does not fit.
    """
    model, sampling = manifest.model, manifest.sampling
    shape = (count, model.in_channels, model.input_size, model.input_size)
    if seed is not None and generator is not None:
        raise ConfigError("seed and generator are both given; give one of them")
    if latents is not None:
        latents = float_array(latents, "latents", shape)
    if noise is not None:
        noise = float_array(noise, "noise", (sampling.steps, *shape))
    steps = sampling.noisy_steps if noise is None else ()
    if generator is not None:
        _check_generator(generator)
        return CallNoise(latents, noise, GeneratedNoise(_draw(generator, shape), steps, latents is None), None)
    if seed is not None:
        seed = whole_number(seed, "seed", 0, UINT64 - 1)
    elif latents is None:
        seed = secrets.randbits(SEED_BITS)
    elif steps:
        raise ConfigError(
            f"latents are not all the noise: {counted(len(steps), 'step')} of {sampling.sampler} draw more; "
            "give seed, generator or noise as well"
        )
    return CallNoise(latents, noise, None if seed is None else SeededNoise(seed, shape[1:]), seed)


def _draw(generator: Any, shape: tuple[int, ...]) -> Draw:
    """Draws of `shape` from a generator; from a list of generators, one for each image, of [1, *shape[1:]] in order."""
    if not isinstance(generator, list | tuple):
        return lambda: _normals(generator, shape)
    if len(generator) != shape[0]:
        raise ConfigError(
            f"generator is a list of {len(generator)}, but there are {shape[0]} images; give one for each"
        )
    return lambda: np.concatenate([_normals(each, (1, *shape[1:])) for each in generator])


def _normals(generator: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normals f32: `torch.randn(shape, generator=generator)`, or NumPy's `standard_normal(shape, float32)`."""
    if isinstance(generator, np.random.Generator):
        return generator.standard_normal(shape, np.float32)
    torch = sys.modules["torch"]
    array: np.ndarray = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").numpy()
    return array


def _check_generator(generator: Any) -> None:
    """Raise `ConfigError` for what is no generator of PyTorch on the CPU or of NumPy, and no list of them."""
    for each in generator if isinstance(generator, list | tuple) else [generator]:
        torch = sys.modules.get("torch")  # imported by whoever made a generator of it
        if torch is not None and isinstance(each, torch.Generator):
            if each.device.type != "cpu":
                raise ConfigError(
                    f"generator is on {each.device}; use one on the CPU, torch.Generator(), whose numbers are the same "
                    "on every machine"
                )
        elif not isinstance(each, np.random.Generator):
            raise ConfigError(
                "generator must be a torch.Generator, a numpy.random.Generator or a list of them, one for each image, "
                f"not {short(each)}; for a number, use seed"
            )
