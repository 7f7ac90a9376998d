"""Noise of a call as diffusers' users give it: what is drawn, in which order and shape, and from what."""

from __future__ import annotations

import types

import numpy as np
import pytest
import torch

from dydit.bundle.manifest import PlanKind
from dydit.errors import ConfigError
from dydit.runtime.backends.base import BackendOptions
from dydit.runtime.call_noise import noise_of_call
from dydit.runtime.noise_source import SeededNoise
from dydit.runtime.pipeline import DyDiTPipeline
from dydit.runtime.request import make_batches
from tests.fixtures.simulated_device import SimulatedDeviceBackend

IMAGE, LABELS, STEPS = (4, 8, 8), [1, 2, 3, 4, 5], 4
SHAPE = (len(LABELS), *IMAGE)
NOISY = STEPS - 1  # of ddpm


@pytest.fixture(scope="module")
def bundle(make_bundle):
    """Five images make three batches."""
    return make_bundle(steps=STEPS, plan=PlanKind.DYNAMIC_WIDTH, max_batch=2)


@pytest.fixture(scope="module", params=["onnxruntime", "device"])
def pipe(request, bundle):
    if request.param == "device":
        with SimulatedDeviceBackend(bundle, BackendOptions(threads=1)) as backend, DyDiTPipeline(backend) as pipe:
            yield pipe
    else:
        with DyDiTPipeline.from_bundle(bundle.path, threads=1) as pipe:
            yield pipe


def call(pipe, **arguments):
    return pipe(LABELS, output_type="latent", **arguments)


def numbers(seed=0):
    """Starting latents and noise that no seed gives."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal(SHAPE, np.float32), rng.standard_normal((STEPS, *SHAPE), np.float32)


def drawn_by_torch():
    generator = torch.Generator().manual_seed(11)
    latents = torch.randn(SHAPE, generator=generator)
    return latents, torch.stack([torch.randn(SHAPE, generator=generator) for _ in range(NOISY)])


def with_last(noise):
    """The noise of all steps: the last adds none, so any will do."""
    return torch.cat([torch.as_tensor(noise), torch.full((1, *SHAPE), 7.0)])


def test_a_torch_generator_gives_the_latents_and_then_the_noise_of_each_step(pipe):
    latents, noise = drawn_by_torch()
    generator = torch.Generator().manual_seed(11)
    made = call(pipe, generator=generator)
    assert made.seed is None
    assert np.array_equal(made.latents, call(pipe, latents=latents, noise=with_last(noise)).latents)
    after = torch.Generator().manual_seed(11)
    for _ in range(1 + NOISY):
        torch.randn(SHAPE, generator=after)
    assert torch.equal(generator.get_state(), after.get_state()), "nothing else is drawn"
    assert not np.array_equal(call(pipe, generator=generator).latents, made.latents), "it goes on"


def test_a_numpy_generator_too(pipe):
    rng = np.random.default_rng(3)
    latents, *noise = (rng.standard_normal(SHAPE, np.float32) for _ in range(1 + NOISY))
    made = call(pipe, generator=np.random.default_rng(3)).latents
    assert np.array_equal(made, call(pipe, latents=latents, noise=with_last(np.stack(noise)).numpy()).latents)


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_a_generator_for_each_image_makes_it_independent_of_the_others(pipe, kind):
    def generators(places):
        if kind == "torch":
            return [torch.Generator().manual_seed(20 + place) for place in places]
        return [np.random.default_rng(20 + place) for place in places]

    made = call(pipe, generator=generators(range(5))).latents
    reordered = pipe([5, 1], generator=tuple(generators([4, 0])), output_type="latent").latents
    assert np.linalg.norm(reordered - made[[4, 0]]) < 1e-4 * np.linalg.norm(made)
    first = generators([0])[0]
    draws = [
        torch.randn((1, *IMAGE), generator=first).numpy()
        if kind == "torch"
        else first.standard_normal(IMAGE, np.float32)
        for _ in range(1 + NOISY)
    ]
    noise = np.stack([np.reshape(each, (1, *IMAGE)) for each in (*draws[1:], draws[0])])
    alone = pipe(1, latents=draws[0].reshape(1, *IMAGE), noise=noise, output_type="latent").latents
    assert np.linalg.norm(alone[0] - made[0]) < 1e-4 * np.linalg.norm(made[0])


def test_deterministic_samplers_draw_latents_alone(pipe):
    choice = {"num_inference_steps": 3, "sampler": "dpm-solver++"}
    generator = torch.Generator().manual_seed(11)
    made = call(pipe, generator=generator, **choice).latents
    latents, _ = drawn_by_torch()
    after = torch.Generator().manual_seed(11)
    torch.randn(SHAPE, generator=after)
    assert torch.equal(generator.get_state(), after.get_state())
    given = call(pipe, latents=latents, **choice)
    assert np.array_equal(given.latents, made) and given.seed is None, "without noise, seed or generator"
    unused = np.random.default_rng(0).standard_normal((3, *SHAPE), np.float32)
    assert np.array_equal(call(pipe, latents=latents, noise=unused, **choice).latents, made)


def test_what_is_given_is_not_drawn(pipe, bundle):
    """Latents, noise, seed and generator in every combination that says all."""
    latents, noise = numbers()
    whole = call(pipe, latents=latents, noise=noise)
    assert whole.seed is None
    assert np.array_equal(call(pipe, latents=latents, noise=noise, seed=1).latents, whole.latents)
    seeded, batches = SeededNoise(5, IMAGE), make_batches(LABELS, range(5), 5)
    x, steps = seeded.initial(batches[0]), np.stack([seeded.step(batches[0], step) for step in range(STEPS)])
    by_seed = call(pipe, seed=5)
    assert np.array_equal(call(pipe, latents=x, noise=steps).latents, by_seed.latents)
    assert np.array_equal(call(pipe, latents=x, seed=5).latents, by_seed.latents)
    half = call(pipe, noise=steps, seed=5)
    assert np.array_equal(half.latents, by_seed.latents) and half.seed == 5
    drawn = call(pipe, noise=steps)
    assert np.array_equal(call(pipe, noise=steps, seed=drawn.seed).latents, drawn.latents)
    initial, later = drawn_by_torch()
    generator = torch.Generator().manual_seed(11)
    torch.randn(SHAPE, generator=generator)
    ours = call(pipe, latents=latents, generator=generator).latents
    assert np.array_equal(ours, call(pipe, latents=latents, noise=with_last(later)).latents), "latents are not drawn"
    ours = call(pipe, noise=noise, generator=torch.Generator().manual_seed(11)).latents
    assert np.array_equal(ours, call(pipe, latents=initial, noise=noise).latents)


def test_arrays_of_every_kind(pipe):
    latents, noise = numbers()
    wanted = call(pipe, latents=latents, noise=noise).latents
    read_only = latents.copy()
    read_only.flags.writeable = False
    gradients = torch.from_numpy(latents.copy()).requires_grad_()
    turned = np.asfortranarray(latents)
    for each in (latents.astype(np.float64), read_only, gradients, turned, torch.from_numpy(latents).double()):
        assert np.array_equal(call(pipe, latents=each, noise=torch.from_numpy(noise)).latents, wanted)
    half = torch.from_numpy(latents).bfloat16()
    ours = call(pipe, latents=half, noise=noise).latents
    assert np.array_equal(ours, call(pipe, latents=half.float(), noise=noise).latents)


def test_what_a_caller_set_in_torch_does_not_matter_to_what_is_drawn(pipe):
    wanted = call(pipe, generator=torch.Generator().manual_seed(1)).latents
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert np.array_equal(call(pipe, generator=torch.Generator("cpu").manual_seed(1)).latents, wanted)
    finally:
        torch.set_default_dtype(torch.float32)


def refused():
    latents, noise = numbers()
    on_gpu = types.SimpleNamespace()
    yield {"seed": 1, "generator": torch.Generator()}, "seed and generator are both given; give one of them"
    yield (
        {"latents": latents},
        "latents are not all the noise: 3 steps of ddpm draw more; give seed, generator or noise",
    )
    yield {"latents": latents[:4], "seed": 1}, r"latents has shape \(4, 4, 8, 8\), expected \(5, 4, 8, 8\)"
    yield {"latents": latents.astype(int), "seed": 1}, "latents is int64, expected floating point"
    yield {"latents": torch.zeros(SHAPE, dtype=torch.int32), "seed": 1}, "latents is int32, expected floating point"
    yield {"latents": latents.tolist(), "seed": 1}, r"latents must be an array of NumPy or PyTorch, not \[\[\[\["
    yield (
        {"latents": latents * np.float32(np.nan), "seed": 1},
        "latents holds values that are NaN, infinite, or outside",
    )
    yield {"latents": latents.astype(np.float64) * 1e300, "seed": 1}, "outside the range of float32"
    yield {"noise": noise[:3]}, r"noise has shape \(3, 5, 4, 8, 8\), expected \(4, 5, 4, 8, 8\)"
    yield {"noise": noise, "num_inference_steps": 3}, r"expected \(3, 5, 4, 8, 8\)"
    yield (
        {"generator": 7},
        "generator must be a torch.Generator, a numpy.random.Generator or a list .*, not 7; for a num",
    )
    yield {"generator": np.random.RandomState(0)}, "generator must be a torch.Generator"
    yield {"generator": [torch.Generator()] * 4}, "generator is a list of 4, but there are 5 images; give one for each"
    yield {"generator": [torch.Generator()] * 4 + [on_gpu]}, "generator must be a torch.Generator"
    yield {"generator": torch.Generator(), "image_indices": range(5)}, "image_indices key the noise of a seed; remove"


@pytest.mark.parametrize(("arguments", "message"), list(refused()))
def test_refusals_name_the_argument_in_one_line(bundle, arguments, message):
    pipe = DyDiTPipeline.from_bundle(bundle.path, threads=1)
    with pipe, pytest.raises(ConfigError, match=message) as caught:
        call(pipe, **arguments)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_generators_of_other_devices_are_refused(bundle, monkeypatch):
    class OnGpu:
        device = torch.device("cuda", 0)

    monkeypatch.setattr(torch, "Generator", OnGpu)
    with pytest.raises(ConfigError, match=r"generator is on cuda:0; use one on the CPU, torch.Generator\(\)"):
        noise_of_call(bundle.manifest, 1, generator=OnGpu())
