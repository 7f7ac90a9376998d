"""The measure of small sets: real images are judged real, worse samples are worse, and a seed decides everything."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dydit.data.small_sets import Digits
from dydit.errors import ConfigError
from dydit.evaluation.small_set import SmallSetMeasure, as_model_images
from dydit.runtime.images.image_files import to_rgb, to_uint8


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits()


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("classifier") / "digits.safetensors"


@pytest.fixture(scope="module")
def measure(digits: Digits, kept: Path) -> SmallSetMeasure:
    return SmallSetMeasure.fit(digits.images, digits.labels, 10, seed=3, cache=kept)


def test_real_images_are_judged_real(digits: Digits, measure: SmallSetMeasure) -> None:
    result = measure.evaluate(digits.images, digits.labels)
    assert result.class_consistency > 0.98 and result.samples == 1797 and 0.95 < result.real_consistency <= 1
    assert result.frechet_distance == pytest.approx(0, abs=1e-6)


def test_wrong_labels_noise_and_repetition_are_noticed(digits: Digits, measure: SmallSetMeasure) -> None:
    images, labels = digits.images[:500], digits.labels[:500]
    good = measure.evaluate(images, labels)
    assert measure.evaluate(images, (labels + 1) % 10).class_consistency < 0.05
    noise = np.random.default_rng(0).normal(size=images.shape).astype(np.float32)
    small, large = (measure.evaluate(images + scale * noise, labels).frechet_distance for scale in (0.3, 1.0))
    assert good.frechet_distance < small < large
    repeated = np.arange(500) % 10
    assert measure.evaluate(images[repeated], labels[repeated]).frechet_distance > 2 * good.frechet_distance


def test_a_kept_classifier_gives_the_same_figures_and_is_of_its_data(
    digits: Digits, measure: SmallSetMeasure, kept: Path
) -> None:
    before = kept.read_bytes()
    again = SmallSetMeasure.fit(digits.images, digits.labels, 10, seed=3, cache=kept)
    assert again.evaluate(digits.images[:200], digits.labels[:200]) == measure.evaluate(
        digits.images[:200], digits.labels[:200]
    )
    assert kept.read_bytes() == before
    with pytest.raises(ConfigError, match="of other data or of another seed"):
        SmallSetMeasure.fit(digits.images, digits.labels, 10, seed=4, cache=kept)
    other = kept.with_name("text")
    other.write_text("no safetensors")
    with pytest.raises(ConfigError, match="text "):
        SmallSetMeasure.fit(digits.images, digits.labels, 10, seed=3, cache=other)


def test_a_seed_decides_the_classifier(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    images, labels = rng.normal(size=(90, 3, 8, 10)).astype(np.float32), np.arange(90) % 4
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        SmallSetMeasure.fit(images, labels, 4, seed, tmp_path / name)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((70, 1, 16, 16), np.uint8), np.zeros(70, int), "expected floating point"),
        (np.zeros((70, 16, 16), np.float32), np.zeros(70, int), "expected floating point"),
        (np.zeros((70, 1, 16, 16), np.float32), np.zeros(69, int), "70 images need 70 labels"),
        (np.zeros((70, 1, 16, 16), np.float32), np.zeros(70), "float64"),
        (np.zeros((64, 1, 16, 16), np.float32), np.zeros(64, int), "at least 65"),
        (np.zeros((70, 1, 7, 16), np.float32), np.zeros(70, int), "too small"),
        (np.zeros((70, 1, 16, 16), np.float32), np.full(70, 10), "expected 0..9"),
        (np.full((70, 1, 16, 16), np.nan, np.float32), np.zeros(70, int), "not finite"),
        (np.zeros((70, 3, 16, 16), np.float32), np.zeros(70, int), "but the real images are"),
    ],
)
def test_what_does_not_fit_is_refused(
    measure: SmallSetMeasure, images: np.ndarray, labels: np.ndarray, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        measure.evaluate(images, labels)


def test_eight_bits_become_the_images_that_they_were_made_from(digits: Digits) -> None:
    images = digits.images[:50]
    again = as_model_images(to_rgb(to_uint8(images)), 1)
    assert again.dtype == np.float32 and np.abs(again - images).max() <= 0.5001 / 127.5
    with pytest.raises(ConfigError, match="colours"):
        as_model_images(np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8), 1)
