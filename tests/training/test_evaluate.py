from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dydit.data.small_sets import Digits
from dydit.errors import ConfigError
from dydit.models.config import ModelConfig
from dydit.models.transformer.units import attention_macs, mlp_macs
from dydit.training.evaluate import dynamics, evaluate_digits, frechet_distance


def test_real_digits_are_judged_real() -> None:
    data = Digits()
    result = evaluate_digits(data.images, data.labels)
    assert result.class_consistency > 0.99 and result.samples == 1797
    assert result.frechet_distance == pytest.approx(0, abs=1e-6)


def test_the_classifier_is_good_on_digits_that_it_has_not_seen() -> None:
    from sklearn.svm import SVC

    from dydit.data.small_sets import digits_pixels

    data = Digits()
    features = digits_pixels(data.images)
    fitted = SVC(C=10.0, gamma="scale").fit(features[::2], data.labels[::2])
    assert fitted.score(features[1::2], data.labels[1::2]) > 0.98


def test_wrong_labels_blur_and_noise_are_noticed() -> None:
    data = Digits()
    images, labels = data.images[:500], data.labels[:500]
    good = evaluate_digits(images, labels)
    assert evaluate_digits(images, (labels + 1) % 10).class_consistency < 0.02
    rng = np.random.default_rng(0)
    noisy = images + rng.normal(size=images.shape).astype(np.float32)
    assert evaluate_digits(noisy, labels).frechet_distance > 2 * good.frechet_distance
    one_of_each = images[np.arange(500) % 10]  # no variety
    assert evaluate_digits(one_of_each, labels[np.arange(500) % 10]).frechet_distance > 2 * good.frechet_distance


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.floats(0.1, 3), st.floats(-2, 2))
def test_the_frechet_distance_of_a_scaled_and_shifted_set_is_known(seed: int, scale: float, shift: float) -> None:
    """For b = scale*a + shift both covariances commute: |mu_a - mu_b|^2 + (1 - scale)^2 tr(S_a)."""
    a = np.random.default_rng(seed).normal(size=(40, 5)) @ np.random.default_rng(seed + 1).normal(size=(5, 5))
    a[:, 4] = 1.0  # a feature that never varies
    b = scale * a + shift
    expected = np.square(a.mean(0) - b.mean(0)).sum() + (1 - scale) ** 2 * np.trace(np.cov(a, rowvar=False))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_the_frechet_distance_agrees_with_a_matrix_square_root() -> None:
    from scipy.linalg import sqrtm

    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(50, 6)) @ rng.normal(size=(6, 6)), rng.normal(size=(60, 6)) @ rng.normal(size=(6, 6)) + 1
    one, two = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    cross = np.trace(np.real(sqrtm(one @ two)))
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(one) + np.trace(two) - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((70, 1, 16, 16)), np.zeros(69), "70 images need 70 labels"),
        (np.zeros((64, 1, 16, 16)), np.zeros(64), "at least 65"),
        (np.full((70, 1, 16, 16), np.nan), np.zeros(70), "not finite"),
        (np.zeros((70, 1, 8, 8)), np.zeros(70), r"\[n, 1, 16, 16\]"),
    ],
)
def test_samples_that_cannot_be_judged_are_refused(images: np.ndarray, labels: np.ndarray, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate_digits(images, labels)


def test_dynamics_count_what_was_on(dynamic_config: ModelConfig) -> None:
    masks, parts = np.zeros((3, 16), bool), dynamic_config.units.parts
    tokens = np.zeros((3, 2, 2, 16), bool)
    masks[:, [part.start for part in parts]] = True
    masks[2, parts[3].start + 3] = True  # a second group of block 1
    tokens[:, :, 0, :8] = True  # image 0 routes half of its tokens, image 1 none but in one place
    tokens[2, 1, 1, :4] = True
    found = dynamics(dynamic_config, masks, tokens)
    attention, mlp = attention_macs(dynamic_config), mlp_macs(dynamic_config)
    work = [  # two blocks of one head; MLPs of image 0 and image 1
        [attention / 2 + 2 * mlp / 8, attention / 2],
        [attention / 2 + 2 * mlp / 8, attention / 2],
        [attention / 2 + mlp / 8 + 2 * mlp / 8, attention / 2 + mlp / 2 / 4],
    ]
    assert found.flops_ratio == pytest.approx(np.mean(work) / (2 * (attention + mlp)))
    assert found.distinct_masks == 2
    assert found.unit_ratios == {"heads": 0.25, "groups": pytest.approx(7 / 24)}
    assert found.token_ratio == pytest.approx((3 * 2 * 8 + 4) / (3 * 2 * 2 * 16))
    assert found.token_ratio_std == pytest.approx((0.5 - 4 / 96) / 2)


def test_a_model_with_everything_on_has_ratio_one(dynamic_config: ModelConfig) -> None:
    found = dynamics(dynamic_config, np.ones((5, 16), bool), np.ones((5, 2, 3, 16), bool))
    assert found.flops_ratio == pytest.approx(1) and found.distinct_masks == 1 and found.token_ratio_std == 0


def test_masks_that_do_not_fit_are_refused(dynamic_config: ModelConfig) -> None:
    masks, good = np.ones((5, 16), bool), np.ones((5, 2, 3, 16), bool)
    for tokens in (np.ones((5, 2, 16), bool), np.ones((5, 2, 3, 15), bool), np.ones((4, 2, 3, 16), bool)):
        with pytest.raises(ConfigError, match=r"decisions must be \[S, 16\] and \[S, 2, n, 16\]; got "):
            dynamics(dynamic_config, masks, tokens)
    for wrong in (masks[:, :15], masks.reshape(5, 2, 8), masks[0], masks[:4]):
        with pytest.raises(ConfigError, match=r"decisions must be \[S, 16\] and \[S, 2, n, 16\]; got "):
            dynamics(dynamic_config, wrong, good)
