"""Noise is a pure function of (seed, image, draw), standard normal, and never changes."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dydit.diffusion.noise import INITIAL_DRAW, image_noise, normals, step_draw
from dydit.errors import ConfigError

LAW = settings(max_examples=25, deadline=None)
WORD = st.integers(0, 2**64 - 1)
MASK = 2**64 - 1


def philox(key: tuple[int, int], counter: tuple[int, int, int, int]) -> list[int]:
    """Philox4x64-10 written from the paper (Salmon et al. 2011, section 3.3), in Python integers."""
    c, (k0, k1) = counter, key
    for _ in range(10):
        low, high = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = ((high >> 64) ^ c[1] ^ k0, high & MASK, (low >> 64) ^ c[3] ^ k1, low & MASK)
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & MASK, (k1 + 0xBB67AE8584CAA73B) & MASK
    return list(c)


def reference(seed: int, image: int, draw: int, count: int) -> np.ndarray:
    """What the module's docstring says, word by word."""
    out: list[float] = []
    block = 0
    while len(out) < count:
        block += 1
        words = philox((seed, image), (block, 0, draw, 0))
        for u, w in (words[:2], words[2:]):
            radius = np.sqrt(-2 * np.log1p(-((u >> 11) * 2.0**-53)))
            angle = 2 * np.pi * ((w >> 11) * 2.0**-53)
            out += [radius * np.cos(angle), radius * np.sin(angle)]
    return np.array(out[:count])


@LAW
@given(WORD, WORD, WORD, st.integers(1, 13))
def test_is_what_its_description_says(seed, image, draw, count):
    actual = normals(seed, image, draw, count)
    assert actual.dtype == np.float32 and actual.shape == (count,)
    # A cosine may differ by one unit in the last place of a double from library to library.
    np.testing.assert_allclose(actual, reference(seed, image, draw, count), rtol=2e-7, atol=1e-12)


def test_never_changes():
    """Images of old runs must stay reproducible. If this fails, the noise changed: that breaks every stored seed."""
    golden = {
        (0, 0, 0): [0.00808869582, 0.152192131, -0.446809739, -0.191403806, -0.203898475, 1.16372716],
        (2**64 - 1, 123456789, 250): [-0.184335679, 1.30367219, 2.0669539, 1.3001008, -0.986811459, 1.00348055],
    }
    for key, values in golden.items():
        np.testing.assert_array_equal(normals(*key, len(values)), np.float32(values))
    # Another library's last bit of a double shows in a float32 about once in 2^29 values.
    sample = normals(7, 3, 1, 4096).astype("<f4").tobytes()
    assert hashlib.sha256(sample).hexdigest() == "dad76ebb9e87d5ef8a4972a6f0f3638999835dc2531f6893643a64cf43e76a40"


@LAW
@given(WORD, st.lists(WORD, min_size=1, max_size=5), WORD, st.randoms())
def test_does_not_depend_on_the_batch(seed, images, draw, random):
    shape = (2, 3, 3)
    batch = image_noise(seed, images, draw, shape)
    assert batch.shape == (len(images), *shape) and batch.dtype == np.float32
    order = list(range(len(images)))
    random.shuffle(order)
    np.testing.assert_array_equal(image_noise(seed, [images[i] for i in order], draw, shape), batch[order])
    for image, noise in zip(images, batch, strict=True):
        np.testing.assert_array_equal(image_noise(seed, [image], draw, shape)[0], noise)


@LAW
@given(WORD, st.integers(1, 40), st.integers(0, 40))
def test_a_shorter_draw_is_a_prefix(seed, count, more):
    np.testing.assert_array_equal(normals(seed, 1, 2, count), normals(seed, 1, 2, count + more)[:count])


def test_does_not_touch_global_state():
    np.random.seed(5)
    first = np.random.random()
    np.random.seed(5)
    normals(1, 2, 3, 100)
    assert np.random.random() == first


def test_moments_of_a_large_sample():
    """A million values; the bounds are five standard errors."""
    sample = np.concatenate([normals(2024, image, 0, 10_000) for image in range(100)]).astype(np.float64)
    n = sample.size
    assert abs(sample.mean()) < 5 / n**0.5
    assert abs(sample.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((sample**3).mean()) < 5 * (15 / n) ** 0.5
    assert abs((sample**4).mean() - 3) < 5 * (96 / n) ** 0.5
    tail = (np.abs(sample) > 3).mean()
    assert abs(tail - 0.0026998) < 5 * (0.0027 / n) ** 0.5
    # The pairs of one Box-Muller transform, and neighbours across pairs.
    for lag in (1, 2, 3):
        assert abs((sample[:-lag] * sample[lag:]).mean()) < 5 / n**0.5


def test_draws_images_and_seeds_are_uncorrelated():
    n = 50_000
    base = normals(1, 1, 1, n).astype(np.float64)
    for key in [(1, 1, 0), (1, 1, 2), (1, 2, 1), (1, 0, 1), (2, 1, 1), (0, 1, 1), (1, 2**63, 1), (2**63, 1, 1)]:
        other = normals(*key, n).astype(np.float64)
        # No overlap at any shift of a block either: the counters of two draws never meet.
        for lag in (0, 1, 4, 8):
            assert abs((base[lag:] * other[: n - lag]).mean()) < 5 / n**0.5, (key, lag)
            assert abs((other[lag:] * base[: n - lag]).mean()) < 5 / n**0.5, (key, lag)


def test_draw_of_a_step_is_never_the_initial_one():
    assert [step_draw(step) for step in range(3)] == [1, 2, 3]
    assert INITIAL_DRAW == 0


@pytest.mark.parametrize("value", [-1, 2**64])
@pytest.mark.parametrize(("position", "name"), [(0, "seed"), (1, "image index"), (2, "draw")])
def test_values_outside_64_bits_are_refused(position, name, value):
    arguments = [0, 0, 0, 4]
    arguments[position] = value
    with pytest.raises(ConfigError, match=f"{name} {value} is outside 0..2\\^64-1"):
        normals(*arguments)
