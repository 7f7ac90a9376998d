"""ONNX Runtime's CUDA provider by bound addresses and with CUDA graphs, against the CPU provider."""

from __future__ import annotations

import numpy as np
import pytest

from dydit.runtime.backends.base import BackendOptions
from dydit.runtime.backends.onnxruntime import OnnxRuntimeBackend
from dydit.runtime.backends.ort_cuda import OnnxRuntimeDeviceBackend
from dydit.runtime.loop import MemoryStore, StepRunner, sample
from dydit.runtime.noise_source import SeededNoise
from dydit.runtime.request import make_batches
from dydit.runtime.resident import ResidentSubnets

LABELS, IMAGES = [3, 1, 0, 6, 2], list(range(5))
NEAR = 1e-3
KINDS = {
    "capacity": {"routing": "capacity", "capacities": (24, 40, 40)},
    "dense": {"routing": "dense"},
    "dynamic": {"routing": "dynamic"},
    "sliding": {"routing": "dense", "plan": "sliding"},
}


def run(backend, size=2):
    model = backend.bundle.manifest.model
    noise = SeededNoise(7, (model.in_channels, model.input_size, model.input_size))
    batches, store = make_batches(LABELS, IMAGES, size), MemoryStore()
    with ResidentSubnets(backend, 2) as subnets:
        sample(StepRunner(backend, subnets, LABELS, 4.0), batches, noise, store)
    return np.concatenate([store.load(b).x for b in range(len(batches))])


@pytest.fixture
def on_gpu():
    ort = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip(f"onnxruntime {ort.__version__} is a build without CUDA")
    opened = []

    def make(bundle):
        opened.append(OnnxRuntimeDeviceBackend(bundle, BackendOptions(device="cuda")))
        return opened[-1]

    yield make
    for backend in opened:
        backend.close()


def median_distance(a, b) -> float:
    return float(np.median([np.linalg.norm(x - y) / np.linalg.norm(y) for x, y in zip(a, b, strict=True)]))


@pytest.mark.parametrize("kind", KINDS)
def test_whole_runs_are_those_of_the_cpu(kind, make_bundle, make_checkpoint, gpu_config, on_gpu):
    bundle = make_bundle(make_checkpoint(gpu_config), max_batch=4, **KINDS[kind])
    backend, expected = on_gpu(bundle), run(OnnxRuntimeBackend(bundle))
    latents = run(backend)
    assert median_distance(latents, expected) < NEAR
    assert np.array_equal(run(backend), latents), "replayed"
    assert median_distance(run(backend, 3), expected) < NEAR, "another batch size"


def test_whole_runs_are_single_steps(make_bundle, make_checkpoint, gpu_config, on_gpu):
    bundle = make_bundle(make_checkpoint(gpu_config), routing="dense", max_batch=4)
    assert median_distance(run(on_gpu(bundle)), run(OnnxRuntimeBackend(bundle, BackendOptions(device="cuda")))) < NEAR
