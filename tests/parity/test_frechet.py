"""Fréchet distances without a network: what moves away from the reference is further from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dydit.data.small_sets import Digits
from dydit.errors import ConfigError
from dydit.models.dit.config import DiTConfig
from dydit.parity.frechet import COMPONENTS, LEAST_IMAGES, FrechetReference, pictures

DIGITS = DiTConfig(hidden_size=64, depth=1, num_heads=4, patch_size=2, input_size=16, in_channels=1, num_classes=10)


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> FrechetReference:
    path = tmp_path_factory.mktemp("reference") / "digits.npz"
    np.savez(path, images=Digits().images[:900])
    return FrechetReference.read(path, DIGITS)


def test_others_of_the_same_kind_are_near_and_changed_ones_are_far(reference):
    others = Digits().images[900:]
    assert reference.components.shape == (256, COMPONENTS) and len(reference.sha256) == 64
    own, near = reference.distance(Digits().images[:900]), reference.distance(others)
    noisy = reference.distance(np.clip(others + np.random.default_rng(0).normal(0, 1, others.shape), -1, 1))
    assert own == pytest.approx(0, abs=1e-6) and near < 0.2 * noisy < reference.distance(-others)


def test_pixels_are_clipped_and_latents_are_not():
    values = np.array([[-3.0, 0.5]])
    assert pictures(values, DIGITS).tolist() == [[-1, 0.5]]
    assert pictures(values, DIGITS.model_copy(update={"in_channels": 4})) is values


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (None, "does not exist"),
        ({"arr_0": np.zeros((99, 16, 16, 3))}, "contains arr_0; expected images or latents"),
        ({"images": np.zeros((99, 1, 8, 8), np.float32)}, "expected floating point of shape .images, 1, 16, 16."),
        ({"images": np.zeros((99, 1, 16, 16), np.uint8)}, "the reference images are uint8"),
        ({"latents": np.zeros((LEAST_IMAGES - 1, 1, 16, 16))}, "63 reference images are too few; at least 64"),
        ({"latents": np.full((99, 1, 16, 16), np.nan)}, "NaN or infinite"),
        ({"images": np.ones((99, 1, 16, 16))}, "all reference images are equal"),
    ],
)
def test_a_reference_that_is_none(tmp_path: Path, arrays, words):
    path = tmp_path / "reference.npz"
    if arrays is not None:
        np.savez(path, **arrays)
    with pytest.raises(ConfigError, match=words) as caught:
        FrechetReference.read(path, DIGITS)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 torn", b"no archive\n" * 9])
def test_a_file_that_is_no_archive(tmp_path: Path, content: bytes):
    path = tmp_path / "reference.npz"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"is not an \.npz file of reference images"):
        FrechetReference.read(path, DIGITS)
