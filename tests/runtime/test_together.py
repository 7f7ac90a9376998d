"""A callback after every step sees all images, changes them, and leaves everything else as it is."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from dydit.bundle.manifest import PlanKind
from dydit.diffusion.noise import image_noise
from dydit.diffusion.steps import State
from dydit.errors import BackendError, ConfigError
from dydit.runtime.backends.base import BackendOptions
from dydit.runtime.backends.registry import open_backend
from dydit.runtime.loop import StepRunner
from dydit.runtime.pipeline import DyDiTPipeline
from dydit.runtime.resident import ResidentSubnets
from tests.fixtures.host_device import HostDeviceBackend

LABELS = [1, 2, 3, 4, 5]
OPENERS = {
    "onnxruntime": lambda bundle: open_backend("onnxruntime", bundle, BackendOptions(threads=2)),
    "torch": lambda bundle: open_backend("torch", bundle, BackendOptions(threads=1)),
    "device": lambda bundle: HostDeviceBackend(bundle, BackendOptions(threads=1)),
}


@pytest.fixture(params=OPENERS)
def pipe(request, make_bundle):
    """Five images make three batches."""
    bundle = make_bundle(steps=4, plan=PlanKind.DYNAMIC_WIDTH, max_batch=2)
    with OPENERS[request.param](bundle) as backend, DyDiTPipeline(backend) as pipe:
        yield pipe


def call(pipe, callback=None, **arguments):
    arguments = {"seed": 3, "output_type": "latent", "callback_on_step_end": callback, **arguments}
    return pipe(LABELS, **arguments).latents


def unchanged(pipe, step, timestep, callback_kwargs):
    return callback_kwargs


def near(pipe, ours, theirs):
    """Whole runs on a device compute the condition of other steps together, and round otherwise."""
    if isinstance(pipe.backend, HostDeviceBackend):
        return np.linalg.norm(ours - theirs) < 1e-5 * np.linalg.norm(theirs)
    return np.array_equal(ours, theirs)


CHOICES = ({}, {"sampler": "dpm-solver++", "num_inference_steps": 6}, {"guidance_scale": 0})


@pytest.mark.parametrize("choice", CHOICES)
def test_it_is_called_after_every_step_of_all_images(pipe, choice):
    calls, progress = [], []

    def callback(given, step, timestep, callback_kwargs):
        calls.append((given, step, timestep, {name: value.copy() for name, value in callback_kwargs.items()}))
        assert len(progress) == 3 * len(calls), "all batches have done the step, and none the next"
        return callback_kwargs

    made = call(pipe, callback, progress=lambda *now: progress.append(now), **choice)
    steps = choice.get("num_inference_steps", 4)
    assert [each[1] for each in calls] == list(range(steps)) and all(each[0] is pipe for each in calls)
    timesteps = [each[2] for each in calls]
    assert timesteps == list(pipe.backend.bundle.manifest.sampling.timesteps) and type(timesteps[0]) is int
    assert all(set(each[3]) == {"latents"} and each[3]["latents"].dtype == np.float32 for each in calls)
    assert np.array_equal(calls[-1][3]["latents"], made) and made.shape == (5, 4, 8, 8)
    assert progress == [(done, 3 * steps) for done in range(1, 3 * steps + 1)]
    assert near(pipe, made, call(pipe, **choice))


def test_plans_of_subnetworks_too(make_bundle):
    bundle = make_bundle(steps=6, plan=PlanKind.PER_STEP, max_batch=2)
    for opener in OPENERS.values():
        with opener(bundle) as backend:
            pipe = DyDiTPipeline(backend, 2)
            assert near(pipe, call(pipe, unchanged), call(pipe))
            assert len(pipe._subnets) <= 2


def test_what_it_returns_replaces_the_latents(pipe):
    """The rest of the run starts from there, with the history that the steps before left."""
    given = np.random.default_rng(0).standard_normal((5, 4, 8, 8)).astype(np.float32)
    choice = {"sampler": "dpm-solver++", "num_inference_steps": 5}
    made = call(pipe, lambda p, step, t, kwargs: {"latents": given} if step == 2 else {}, **choice)
    backend = pipe.backend
    with ResidentSubnets(backend) as subnets:
        runner = StepRunner(backend, subnets, LABELS, 4.0, images=2)
        for images in (slice(0, 2), slice(2, 4), slice(4, 5)):
            indices = range(5)[images]
            labels, state = np.array(LABELS[images]), State(image_noise(3, indices, 0, (4, 8, 8)))
            for step in range(5):
                state = runner.run(step, state, np.zeros_like(state.x), labels).state
                if step == 2:
                    state = State(given[images], state.history)
            assert near(pipe, state.x, made[images])


def test_tensors_of_torch_are_taken_and_what_it_gets_is_its_own(pipe):
    import torch

    def callback(p, step, timestep, kwargs):
        values = torch.from_numpy(kwargs["latents"])
        values *= 2  # in place: what counts is what is returned
        return {"latents": values.double() / 2} if step else None

    assert np.array_equal(call(pipe, callback), call(pipe, unchanged))
    last = torch.zeros(5, 4, 8, 8)
    made = call(pipe, lambda p, step, timestep, kwargs: {"latents": last})
    last += 1
    assert not made.any()


def test_without_tensor_inputs_it_gets_none(pipe):
    seen = []
    call(pipe, lambda p, step, t, kwargs: seen.append(kwargs), callback_on_step_end_tensor_inputs=[])
    assert seen == [{}] * 4


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_its_error_ends_the_call_and_the_pipeline_goes_on(pipe, error):
    wanted = call(pipe, unchanged)

    def callback(p, step, timestep, kwargs):
        if step == 2:
            raise error("enough")
        return kwargs

    for _ in range(2):
        with pytest.raises(error, match="enough"):
            call(pipe, callback)
        assert np.array_equal(call(pipe, unchanged), wanted)
    assert near(pipe, call(pipe), wanted) and not pipe.backend.sampling


def test_another_call_from_within_is_refused(pipe):
    wanted = call(pipe, unchanged)
    for other in ({}, {"num_inference_steps": 7}):
        with pytest.raises(BackendError, match="in the middle of a run; start another one after it"):
            call(pipe, lambda p, *now, other=other: p([1], output_type="latent", **other))
    assert np.array_equal(call(pipe, unchanged), wanted)


def test_threads_with_and_without_callbacks_take_turns(pipe):
    plain, watched, made = call(pipe), call(pipe, unchanged), {}

    def work(place, callback):
        made[place] = [call(pipe, callback) for _ in range(3)]

    threads = [threading.Thread(target=work, args=each) for each in enumerate((None, unchanged, None))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place, wanted in enumerate((plain, watched, plain)):
        assert all(np.array_equal(each, wanted) for each in made[place])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"callback": 3}, "callback_on_step_end must be a function, not int"),
        (
            {"callback": unchanged, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]},
            "callback_on_step_end_tensor_inputs .* must be",
        ),
        ({"callback": unchanged, "callback_on_step_end_tensor_inputs": "latents"}, "'latents' must be"),
        ({"callback": lambda *now: 5}, "callback_on_step_end returned int, expected a dictionary"),
        ({"callback": lambda *now: {"latents": np.zeros(3, np.float32)}}, r"latents of callback_on_step_end has shape"),
        (
            {"callback": lambda *now: {"latents": np.full((5, 4, 8, 8), np.nan, np.float32)}},
            "latents of callback_on_step_end holds values that are NaN",
        ),
    ],
)
def test_refusals(pipe, arguments, message):
    with pytest.raises(ConfigError, match=message) as caught:
        call(pipe, **arguments)
    assert "\n" not in str(caught.value)


def test_latents_that_are_not_finite_name_image_and_step(pipe):
    shape = (4, 5, 4, 8, 8)
    noise = np.zeros(shape, np.float32)
    noise[1] = 3e38
    with pytest.raises(BackendError, match=r"the latents of image 0 hold NaN or infinite values after step \d;"):
        call(pipe, unchanged, seed=None, latents=np.full(shape[1:], 1e30, np.float32), noise=noise)
