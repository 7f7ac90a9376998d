from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dydit.data.opened import data_for, open_data
from dydit.data.small_sets import Digits, Emoji, digits_pixels, enlarge
from dydit.errors import ConfigError
from dydit.models.config import ModelConfig


def generators(count: int) -> list[np.random.Generator]:
    return [np.random.default_rng(each) for each in range(count)]


def test_digits_are_images_in_range_with_their_labels() -> None:
    data = Digits()
    examples = data.batch(np.array([0, 5, 1796]), generators(3))
    images, labels = examples.images, examples.labels
    assert images.dtype == np.float32 and images.shape == (3, 1, 16, 16)
    assert labels.dtype == np.int64 and labels.tolist() == [0, 5, 8]
    assert len(data) == 1797 and data.images.min() == -1 and data.images.max() == 1
    assert np.unique(data.labels).tolist() == list(range(10))


def test_enlarged_digits_are_the_digits() -> None:
    from sklearn.datasets import load_digits

    small = load_digits().images.reshape(-1, 64) / 16
    features = digits_pixels(Digits().images)
    # Interpolation blurs, but each image stays nearest to its own original.
    distances = ((features[:50, None] - small[None, :50]) ** 2).sum(-1)
    assert (distances.argmin(1) == np.arange(50)).all()
    assert np.corrcoef(features.ravel(), small.ravel())[0, 1] > 0.95


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 9), st.floats(-3, 3), st.floats(-3, 3))
def test_enlarging_keeps_straight_lines(length: int, slope: float, start: float) -> None:
    line = start + slope * np.arange(length)
    long = enlarge(line, 0)
    assert long.shape == (2 * length,)
    inside = start + slope * ((np.arange(2 * length) + 0.5) / 2 - 0.5)
    np.testing.assert_allclose(long[1:-1], inside[1:-1], atol=1e-12)
    np.testing.assert_allclose(long[[0, -1]], line[[0, -1]], atol=1e-12)


def test_enlarging_works_along_any_axis() -> None:
    values = np.random.default_rng(0).normal(size=(3, 4, 5))
    for axis in range(3):
        np.testing.assert_allclose(enlarge(values, axis), np.apply_along_axis(enlarge, axis, values, 0))


def test_pixels_are_means_of_two_by_two_in_zero_to_one() -> None:
    image = np.full((1, 1, 16, 16), -1.0, np.float32)
    image[0, 0, 2:4, 6:8] = [[1, -1], [0, 0]]
    image[0, 0, 14:, 14:] = 7  # outside the range of images
    features = digits_pixels(image)[0]
    assert features[8 * 1 + 3] == pytest.approx(0.5)
    assert features[63] == 1
    assert np.count_nonzero(features) == 2


def test_pixels_refuse_other_shapes() -> None:
    with pytest.raises(ConfigError, match=r"\[n, 1, 16, 16\]; got \[2, 16, 16\]"):
        digits_pixels(np.zeros((2, 16, 16)))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("imagenet", {}, "unknown data 'imagenet'; known: digits, emoji, and the path"),
        ("digits", {"input_size": 32}, r"images of \(1, 16, 16\), but the model takes \(1, 32, 32\)"),
        ("digits", {"in_channels": 3}, "but the model takes"),
        ("digits", {"num_classes": 9}, "10 classes, but the model has 9"),
    ],
)
def test_data_that_does_not_fit_is_refused(
    name: str, changes: dict[str, int], message: str, static_config: ModelConfig
) -> None:
    with pytest.raises(ConfigError, match=message):
        data_for(name, static_config.model_copy(update=changes))


def test_an_unconditional_model_gets_the_images_without_labels(static_config: ModelConfig) -> None:
    unconditional = static_config.model_copy(update={"num_classes": 1, "null_class_row": False})
    data, labelled = data_for("digits", unconditional), data_for("digits", static_config)
    indices = np.array([3, 5])
    examples = data.batch(indices, generators(2))
    assert np.array_equal(examples.images, labelled.batch(indices, generators(2)).images)
    assert examples.labels.tolist() == [0, 0]
    assert (len(data), data.shape, data.classes) == (len(labelled), labelled.shape, 1)


def test_emoji_are_colour_images_with_classes_and_captions() -> None:
    data = open_data("emoji")
    assert isinstance(data, Emoji)
    assert len(data) == len(data.labels) == len(data.captions) == 1906 and data.shape == (3, 32, 32)
    assert data.classes == 9 and "Flags" in data.class_names and np.bincount(data.labels).min() > 80
    examples = data.batch(np.arange(1906), generators(1906))
    assert examples.images.dtype == np.float32 and examples.images.min() == -1 and examples.images.max() == 1
    red = data.images[data.captions.index("heavy black heart")].astype(int)
    assert red[0, 16, 16] > 200 > 100 > red[2, 16, 16], "the heart is red"


def test_emoji_are_mirrored_but_for_flags_and_symbols() -> None:
    data = Emoji()
    images = data.batch(np.arange(len(data)), generators(len(data))).images
    plain = data.images / np.float32(127.5) - 1
    mirrored = (images != plain).any((1, 2, 3))
    names = np.array(data.class_names)[data.labels]
    kept = np.isin(names, ["Flags", "Symbols"])
    assert not mirrored[kept].any() and 0.4 < mirrored[~kept].mean() < 0.6
    assert (images[mirrored] == plain[mirrored][..., ::-1]).all()
