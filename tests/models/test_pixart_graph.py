"""Cross-attention of a PixArt's graphs in each precision, on ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest

from dydit.bundle.manifest import Routing
from dydit.bundle.texts import Texts
from dydit.models.config import Routers
from dydit.models.pixart.config import PixArtConfig
from dydit.runtime.backends.base import BackendOptions
from dydit.runtime.backends.onnxruntime import OnnxRuntimeBackend
from dydit.runtime.loop import MemoryStore, StepRunner, sample
from dydit.runtime.noise_source import SeededNoise
from dydit.runtime.request import make_batches
from dydit.runtime.resident import ResidentSubnets
from tests.fixtures.cpu import needs_exact_int8

MODEL = PixArtConfig(
    hidden_size=64, depth=2, num_heads=4, input_size=8, caption_channels=24, text_tokens=6, routers=Routers.NONE
)
MASK = np.array([[1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]], bool)
LABELS = [2, 0, 1]
INT8_WITHIN = pytest.param("int8", 0.1, marks=needs_exact_int8)


@pytest.fixture(scope="module")
def sampled(make_bundle, make_checkpoint):
    """`sampled(precision, embeddings)`: latents f32 [3, 4, 8, 8] with three texts and a negative one."""

    def run(precision: str, embeddings: np.ndarray) -> np.ndarray:
        bundle = make_bundle(make_checkpoint(MODEL), precision=precision, routing=Routing.DENSE, steps=3)
        backend = OnnxRuntimeBackend(bundle.with_texts(Texts(embeddings, MASK, negative=True)), BackendOptions(1))
        store, noise = MemoryStore(), SeededNoise(3, (4, 8, 8))
        with backend, ResidentSubnets(backend, 2) as subnets:
            sample(StepRunner(backend, subnets, LABELS, 3.0), make_batches(LABELS, [0, 1, 2], 3), noise, store)
        return store.load(0).x

    return run


@pytest.fixture(scope="module")
def embeddings() -> np.ndarray:
    return np.random.default_rng(4).standard_normal((4, 6, 24)).astype(np.float32)


@pytest.mark.numerics
@pytest.mark.parametrize(("precision", "bound"), [("fp16", 3e-3), INT8_WITHIN])
def test_lower_precisions_attend_to_the_same(precision, bound, sampled, embeddings, distance) -> None:
    """And the texts matter by more than a precision does."""
    expected = sampled("fp32", embeddings)
    latents = sampled(precision, embeddings)
    assert 0 < distance(latents, expected) < bound
    other = sampled("fp32", embeddings[[1, 2, 0, 3]])
    assert distance(other, expected) > 3 * distance(latents, expected)


@pytest.mark.numerics
@pytest.mark.parametrize("precision", ["fp32", "fp16", pytest.param("int8", marks=needs_exact_int8)])
def test_padding_is_not_read_in_any_precision(precision, sampled, embeddings) -> None:
    """Bit for bit; a text of padding alone is read whole."""
    expected = sampled(precision, embeddings)
    padded = embeddings.copy()
    padded[[1, 3]] = np.where(MASK[[1, 3], :, None], padded[[1, 3]], 7)
    assert np.array_equal(sampled(precision, padded), expected)
    padded[2] += 1
    latents = sampled(precision, padded)
    assert not np.array_equal(latents[0], expected[0]) and np.array_equal(latents[1:], expected[1:])
