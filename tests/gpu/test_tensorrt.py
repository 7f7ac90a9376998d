"""TensorRT engines on a GPU: against ONNX Runtime, with graphs and without, again and again."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from dydit.bundle.bundle import Bundle
from dydit.diffusion.steps import State
from dydit.engines.store import stores
from dydit.errors import BundleError
from dydit.runtime.backends.registry import open_backend
from dydit.runtime.backends.tensorrt import TensorRTBackend
from dydit.runtime.images.pixels import ToPixels
from dydit.runtime.loop import MemoryStore, StepRunner, sample
from dydit.runtime.noise_source import SeededNoise
from dydit.runtime.request import make_batches
from dydit.runtime.resident import ResidentSubnets

LABELS, IMAGES = [3, 1, 0, 6, 2, 5], list(range(6))
TIGHT = (24, 40, 40)
STEP = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}
"""Relative L2 of one step's x_prev against fp32 on the CPU: rounding of the type, over three blocks."""
RUN = {"fp32": 1e-3, "fp16": 1e-1}
"""The same of the median image over a whole run: a token on the edge may be routed differently, in any precision."""
SAMPLINGS, WARM = 1000, 20


def noise_of(bundle, seed=7):
    model = bundle.manifest.model
    return SeededNoise(seed, (model.in_channels, model.input_size, model.input_size))


def run(backend, size=3, scale=4.0, count=6, seed=7):
    """Latents of a run, and its stats."""
    batches, store = make_batches(LABELS[:count], IMAGES[:count], size), MemoryStore()
    with ResidentSubnets(backend, 2) as subnets:
        runner = StepRunner(backend, subnets, LABELS, scale)
        stats = sample(runner, batches, noise_of(backend.bundle, seed), store)
    return np.concatenate([store.load(b).x for b in range(len(batches))]), stats


def relative(a, b) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.fixture
def on_gpu():
    """`on_gpu(bundle, graphs=True)`: a backend that is closed afterwards."""
    opened = []

    def make(bundle, graphs=True):
        opened.append(TensorRTBackend(bundle, graphs=graphs))
        return opened[-1]

    yield make
    for backend in opened:
        backend.close()


@pytest.mark.parametrize("precision", STEP)
def test_every_step_is_that_of_onnxruntime(precision, built_bundle, on_gpu):
    """From the reference's own latents, so that nothing accumulates."""
    bundle = built_bundle(precision=precision)
    reference = open_backend("onnxruntime", built_bundle(precision="fp32"))
    backend = on_gpu(bundle)
    x, labels, worst = noise_of(bundle).initial(make_batches(LABELS, IMAGES, 3)[0]), np.array(LABELS[:3]), 0.0
    with ResidentSubnets(backend, 2) as ours, ResidentSubnets(reference, 2) as theirs:
        runners = [StepRunner(backend, ours, LABELS, 4.0), StepRunner(reference, theirs, LABELS, 4.0)]
        for step in range(bundle.manifest.sampling.steps):
            noise = noise_of(bundle).step(make_batches(LABELS, IMAGES, 3)[0], step)
            got, wanted = (runner.run(step, State(x), noise, labels).x_prev for runner in runners)
            worst = max(worst, relative(got, wanted))
            x = wanted
    assert worst < STEP[precision]


@pytest.mark.parametrize("precision", RUN)
def test_250_steps_are_those_of_onnxruntime(precision, built_bundle, on_gpu):
    settings = {"steps": 250, "max_subnets": 4}
    latents, stats = run(on_gpu(built_bundle(precision=precision, **settings)), count=3)
    expected, _ = run(open_backend("onnxruntime", built_bundle(precision="fp32", **settings)), count=3)
    assert stats.steps == 250
    assert np.median([relative(a, b) for a, b in zip(latents, expected, strict=True)]) < RUN[precision]


def test_graphs_change_nothing(built_bundle, on_gpu):
    bundle = built_bundle(precision="fp16")
    with_graphs, without = (run(on_gpu(bundle, graphs))[0] for graphs in (True, False))
    assert np.array_equal(with_graphs, without)


def test_replayed_graphs_give_what_captured_ones_gave(built_bundle, on_gpu):
    backend = on_gpu(built_bundle(precision="fp16"))
    first, _ = run(backend)
    other, _ = run(backend, seed=8)
    again, _ = run(backend)
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_batch_sizes_and_guidance_in_turn(built_bundle, on_gpu):
    bundle = built_bundle(precision="fp32")
    backend, reference = on_gpu(bundle), open_backend("onnxruntime", bundle)
    for size, scale in ((2, 4.0), (3, 4.0), (1, 4.0), (3, 1.0), (2, 4.0)):
        latents, expected = run(backend, size, scale)[0], run(reference, size, scale)[0]
        assert np.median([relative(a, b) for a, b in zip(latents, expected, strict=True)]) < RUN["fp32"]


def test_tokens_that_find_no_slot_are_computed_after_all(built_bundle, on_gpu):
    latents, stats = run(on_gpu(built_bundle(precision="fp32", capacities=TIGHT)))
    expected, theirs = run(open_backend("onnxruntime", built_bundle(precision="fp32")))
    assert stats.repeated_steps > 0 == theirs.repeated_steps
    assert np.median([relative(a, b) for a, b in zip(latents, expected, strict=True)]) < RUN["fp32"]


def test_overflow_is_counted_as_onnxruntime_counts_it(built_bundle, on_gpu):
    bundle = built_bundle(precision="fp32", capacities=TIGHT)
    batch, counts = make_batches(LABELS, IMAGES, 3)[0], []
    for backend in (on_gpu(bundle), open_backend("onnxruntime", bundle)):
        with ResidentSubnets(backend, 2) as subnets:
            runner = StepRunner(backend, subnets, LABELS, 4.0)
            x = noise_of(bundle).initial(batch)
            counts.append(runner.run(0, State(x), noise_of(bundle).step(batch, 0), batch.labels).overflow)
    assert np.array_equal(*counts)


@pytest.mark.parametrize("precision", RUN)
def test_one_engine_for_every_width_is_onnxruntime(precision, built_bundle, on_gpu):
    """Weights that slide: whole runs in two batch sizes, then single steps; with graphs and without."""
    bundle = built_bundle(precision=precision, plan="sliding", capacities=TIGHT)
    reference = open_backend("onnxruntime", built_bundle(precision="fp32", plan="sliding", capacities=TIGHT))
    backends = [on_gpu(bundle, graphs) for graphs in (True, False)]
    for size, seed in ((3, 7), (2, 8), (3, 9)):
        expected, theirs = run(reference, size, seed=seed)
        for backend in backends:
            latents, stats = run(backend, size, seed=seed)
            assert stats.repeated_steps > 0 < theirs.repeated_steps
            assert np.median([relative(a, b) for a, b in zip(latents, expected, strict=True)]) < RUN[precision]
    batch, worst = make_batches(LABELS, IMAGES, 3)[0], 0.0
    x = noise_of(bundle).initial(batch)
    with ResidentSubnets(backends[0], 2) as ours, ResidentSubnets(reference, 2) as others:
        runners = [StepRunner(backends[0], ours, LABELS, 4.0), StepRunner(reference, others, LABELS, 4.0)]
        for step in range(bundle.manifest.sampling.steps):
            noise = noise_of(bundle).step(batch, step)
            got, wanted = (runner.run(step, State(x), noise, batch.labels).x_prev for runner in runners)
            worst, x = max(worst, relative(got, wanted)), wanted
    assert worst < STEP[precision]


def test_sliding_needs_no_memory_that_grows(built_bundle, on_gpu):
    backend, free = on_gpu(built_bundle(precision="fp16", plan="sliding")), []
    for seed in range(6):
        run(backend, size=2, seed=seed)
        device = backend._sampler.executor.device
        with device.activate():
            free.append(device.free_memory())
    assert min(free[1:]) >= free[1]


def test_foreign_engines_are_refused(built_bundle, tmp_path):
    copy = tmp_path / "bundle"
    shutil.copytree(built_bundle(precision="fp16").path, copy)
    store = next(stores(Bundle.open(copy)))
    first, second = (store.folder / f"subnet-000{i}.engine" for i in range(2))
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    backend = TensorRTBackend(Bundle.open(copy))
    with pytest.raises(BundleError, match=r"was changed after it was built .* run `dydit build"):
        backend.subnet(0)
    first.write_bytes(data)
    index = store.read()
    assert index is not None
    store.write(index.request.model_copy(update={"version": "1.0.0"}), index.engines)
    with pytest.raises(BundleError, match=r"was built by .* 1\.0\.0, but .* is installed; run `dydit build"):
        TensorRTBackend(Bundle.open(copy))


def test_many_samplings_take_no_more_memory(built_bundle, on_gpu):
    backend = on_gpu(built_bundle(precision="fp16", steps=4, max_subnets=2))
    free = []
    for index in range(SAMPLINGS):
        run(backend, size=1 + index % 3, count=3, seed=index)
        if index + 1 in (WARM, SAMPLINGS):
            device = backend._sampler.executor.device
            with device.activate():
                free.append(device.free_memory())
    assert free[0] - free[1] <= 0


def test_closing_gives_the_memory_back(built_bundle):
    bundle, free = built_bundle(precision="fp16"), []
    for _ in range(4):
        backend = TensorRTBackend(bundle)
        run(backend)
        device = backend._sampler.executor.device
        backend.close()
        with device.activate():
            free.append(device.free_memory())
    assert min(free[1:]) >= free[1]


def test_pytorch_and_onnxruntime_live_in_the_same_process(built_bundle, on_gpu):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    a = torch.randn(64, 64, device="cuda")
    before = (a @ a).cpu()
    first, _ = run(on_gpu(built_bundle(precision="fp16")))
    assert torch.equal((a @ a).cpu(), before)
    second, _ = run(on_gpu(built_bundle(precision="fp16")))
    assert np.array_equal(first, second)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_pictures_are_those_of_onnxruntime(built_bundle, on_gpu, autoencoder, precision):
    """The decoder is fp32 whatever the bundle's precision is."""
    bundle = built_bundle(precision=precision, vae=str(autoencoder.folder))
    latents = np.random.default_rng(0).standard_normal((5, 4, 16, 16)).astype(np.float32)
    backend = on_gpu(bundle)
    assert backend.tile_decoder() is not None
    ours, theirs = (ToPixels(each)(latents) for each in (backend, open_backend("onnxruntime", bundle)))
    assert ours.shape == (5, 3, 32, 32) and relative(ours, theirs) < STEP["fp32"]
