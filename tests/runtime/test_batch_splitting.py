"""Images shared out among threads: every image once, the same bits, another session where the batch asks for one."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dydit.bundle.manifest import PlanKind, Routing
from dydit.bundle.stored_weights import Precision
from dydit.diffusion.samplers import Sampler
from dydit.diffusion.steps import State
from dydit.models.config import ModelConfig
from dydit.models.dit.config import DiTConfig
from dydit.runtime.backends.base import BackendOptions
from dydit.runtime.backends.batch_splitting import STREAM_BYTES, BatchSplitting, feeds_of
from dydit.runtime.backends.onnxruntime import OnnxRuntimeBackend
from dydit.runtime.backends.torch import TorchBackend
from dydit.runtime.loop import MemoryStore, StepRunner, sample
from dydit.runtime.noise_source import SeededNoise
from dydit.runtime.request import make_batches
from dydit.runtime.resident import ResidentSubnets
from tests.fixtures.states import values_of

pytestmark = pytest.mark.numerics


def model(hidden: int, side: int = 32) -> ModelConfig:
    return DiTConfig(hidden_size=hidden, depth=1, num_heads=1, patch_size=2, input_size=side, in_channels=4)


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 40), st.sampled_from([16, 384, 1152]))
def test_every_image_is_in_one_part_and_parts_are_even(images, threads, expected, hidden):
    splitting = BatchSplitting(model(hidden), threads)
    splitting.expected = expected
    sizes = [part.stop - part.start for part in splitting.parts(images)]
    numbers = [number for part in splitting.parts(images) for number in range(part.start, part.stop)]
    assert numbers == list(range(images)) and max(sizes) - min(sizes) <= 1
    if expected < threads:
        assert sizes == [images], "all threads work on one operator"
        return
    assert len(sizes) % threads == 0 or len(sizes) == images, "no thread is left without, but where images are few"
    stream = 2 * 4 * 256 * hidden
    assert max(sizes) == 1 or max(sizes) * stream <= STREAM_BYTES


def test_a_share_has_the_rows_of_its_images():
    """Modulation: rows with a class, then without."""
    feeds = {
        "x": np.arange(5.0).reshape(5, 1),
        "history": np.arange(5.0).reshape(5, 1) + 20,
        "noise": np.arange(5.0).reshape(5, 1) + 10,
        "condition": np.arange(20.0).reshape(10, 1, 2),
        "gates": np.ones((2, 3)),
    }
    share = feeds_of(feeds, slice(1, 3))
    assert share["x"].ravel().tolist() == [1, 2] and share["noise"].ravel().tolist() == [11, 12]
    assert share["history"].ravel().tolist() == [21, 22]
    assert share["condition"][:, 0, 0].tolist() == [2, 4, 12, 14]
    assert share["gates"] is feeds["gates"]
    unguided = feeds_of(feeds | {"condition": feeds["condition"][:5]}, slice(1, 3))
    assert unguided["condition"][:, 0, 0].tolist() == [2, 4]


KINDS = {
    "merged": {},
    "dense": {"routing": Routing.DENSE},
    "per step": {"plan": PlanKind.PER_STEP, "steps": 4},
    "sliding": {"plan": PlanKind.DYNAMIC_WIDTH},
    "capacity": {"routing": Routing.CAPACITY},
    "fp16": {"precision": Precision.FP16},
    "multistep": {"sampler": Sampler.DPM_SOLVER},
}


@pytest.mark.parametrize("scale", [4.0, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_the_same_bits_however_it_is_shared_out(kind, scale, make_bundle):
    bundle, made = make_bundle(**KINDS[kind]), []
    shape = (bundle.manifest.model.in_channels, *[bundle.manifest.model.input_size] * 2)
    for threads, batch in [(1, 1), (1, 7), (2, 7), (3, 4), (8, 7)]:
        backend = OnnxRuntimeBackend(bundle, BackendOptions(threads=threads))
        labels, store = [3, 1, 4, 1, 5, 2, 6], MemoryStore()
        batches = make_batches(labels, range(7), batch)
        with ResidentSubnets(backend, 2) as subnets:
            sample(StepRunner(backend, subnets, labels, scale), batches, SeededNoise(0, shape), store)
        made.append(np.concatenate([values_of(store.load(index)) for index in range(len(batches))]))
    assert all(np.array_equal(made[0], each) for each in made[1:])
    assert made[0].shape == (7, (2 if kind == "multistep" else 1) * 4, 8, 8), "the history too"


@pytest.mark.parametrize("kind", ["merged", "capacity", "multistep"])
def test_torch_shares_images_out_too(kind, make_bundle, relative):
    """Its kernels choose by the number of rows how they add, so bits may differ. Other threads keep their number."""
    bundle, made = make_bundle(**KINDS[kind]), []
    x, labels = np.random.default_rng(0).standard_normal((5, 4, 8, 8)).astype(np.float32), np.arange(5)
    for expected in (1, 5):
        backend = TorchBackend(bundle, BackendOptions(threads=2))
        backend.expect(expected)
        with ResidentSubnets(backend) as subnets:
            runner = StepRunner(backend, subnets, labels, 4.0)
            feeds = runner.feeds(3, State(x, x[::-1]), x, labels)
            state = subnets.get(bundle.manifest.plan.segments[0].subnet).step(feeds).state
        made.append(np.concatenate(values_of(state)))
    assert relative(*made) < 1e-6
    numbers = [torch.get_num_threads()]
    thread = threading.Thread(target=lambda: numbers.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert numbers == [2, 2]


def test_a_loaded_subnetwork_follows_what_is_expected(make_bundle, monkeypatch):
    """One session at a time: of two threads for one image, of one thread where two threads have images each."""
    import onnxruntime

    bundle, opened = make_bundle(), []
    session = onnxruntime.InferenceSession

    def noted(file, settings, **more):
        opened.append(settings.intra_op_num_threads)
        return session(file, settings, **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", noted)
    backend = OnnxRuntimeBackend(bundle, BackendOptions(threads=2))
    labels = np.asarray([0, 1, 2])
    x = np.random.default_rng(0).standard_normal((3, 4, 8, 8)).astype(np.float32)
    x = x[:, : bundle.manifest.model.in_channels]
    with ResidentSubnets(backend) as subnets:
        runner = StepRunner(backend, subnets, labels, 4.0)
        feeds = runner.feeds(0, State(x), x, labels)
        one = runner.feeds(0, State(x[:1]), x[:1], labels[:1])
        subnet = subnets.get(bundle.manifest.plan.segments[0].subnet)
        opened.clear()

        def state_of(feeds):
            return values_of(subnet.step(feeds).state)

        rng = np.random.default_rng(1)
        feeds["history"], coefficients = rng.standard_normal(x.shape, np.float32), rng.standard_normal(8, np.float32)
        one["history"], one["coefficients"] = feeds["history"][:1], coefficients
        feeds["coefficients"] = coefficients
        whole = state_of(feeds)
        assert not opened, "two threads, as loaded for one image"
        backend.expect(3)
        apart = state_of(feeds)
        assert opened == [1]
        assert np.array_equal(state_of(one), apart[:1]) and opened == [1], "the last batch may be smaller"
        backend.expect(1)
        assert np.array_equal(state_of(feeds), whole) and opened == [1, 2]
    assert np.array_equal(whole, apart)
