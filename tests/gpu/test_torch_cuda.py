"""Whole runs on engines in PyTorch, captured as CUDA graphs, against single steps and against the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dydit.runtime.backends.base import BackendOptions
from dydit.runtime.backends.torch import TorchBackend
from dydit.runtime.backends.torch_cuda import TorchDeviceBackend
from tests.gpu.test_onnxruntime_cuda import NEAR, median_distance, run

KINDS = {
    "capacity": {"routing": "capacity", "capacities": (24, 40, 40)},
    "dense": {"routing": "dense"},
    "width": {"routing": "capacity", "capacities": (24, 40, 40), "plan": "sliding"},
}


@pytest.fixture
def on_gpu():
    if not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} sees no CUDA device")
    opened = []

    def make(bundle, **settings):
        opened.append(TorchDeviceBackend(bundle, BackendOptions(device="cuda"), **settings))
        return opened[-1]

    yield make
    for backend in opened:
        backend.close()


@pytest.mark.parametrize("kind", KINDS)
def test_whole_runs_are_those_of_the_cpu_and_of_single_steps(kind, make_bundle, make_checkpoint, gpu_config, on_gpu):
    bundle = make_bundle(make_checkpoint(gpu_config), max_batch=4, **KINDS[kind])
    backend, expected = on_gpu(bundle), run(TorchBackend(bundle))
    latents = run(backend)
    assert backend._sampler.options.graphs, "captured"
    assert median_distance(latents, expected) < NEAR
    assert np.array_equal(run(backend), latents), "replayed"
    assert np.array_equal(run(on_gpu(bundle, graphs=False)), latents), "the same kernels without graphs"
    assert median_distance(run(backend, 3), expected) < NEAR, "another batch size"
    assert median_distance(run(on_gpu(bundle, fuse=False)), expected) < NEAR
    assert median_distance(latents, run(TorchBackend(bundle, BackendOptions(device="cuda")))) < NEAR


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_lower_precisions_are_near(precision, make_bundle, make_checkpoint, gpu_config, on_gpu):
    bundle = make_bundle(make_checkpoint(gpu_config), max_batch=4, precision=precision, routing="dense")
    assert median_distance(run(on_gpu(bundle)), run(TorchBackend(bundle))) < 0.1
