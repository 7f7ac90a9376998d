"""Noise files are believed only when everything in them fits the bundle."""

from __future__ import annotations

import io
import pickle
import zipfile

import numpy as np
import pytest

from dydit.bundle.manifest import PlanKind
from dydit.diffusion.noise import normals
from dydit.diffusion.samplers import SamplerChoice
from dydit.errors import ConfigError
from dydit.planning.resampling import resampled
from dydit.runtime.noise_source import NoiseFile, SeededNoise
from dydit.runtime.request import make_batches


@pytest.fixture(scope="module")
def manifest(pixel_bundle):
    return pixel_bundle.manifest


def arrays(steps=6, images=4):
    rng = np.random.default_rng(0)
    return {
        "x_T": rng.standard_normal((images, 3, 8, 8)).astype(np.float32),
        "noise": rng.standard_normal((steps, images, 3, 8, 8)).astype(np.float32),
        "labels": np.arange(images),
    }


def test_a_file_gives_its_numbers_by_place(manifest, tmp_path):
    content = arrays()
    np.savez(tmp_path / "n.npz", **content)
    noise = NoiseFile.read(tmp_path / "n.npz", manifest)
    assert noise.labels == (0, 1, 2, 3)
    first, last = make_batches(noise.labels, range(100, 104), 3)
    assert np.array_equal(noise.initial(first), content["x_T"][:3])
    assert np.array_equal(noise.step(last, 5), content["noise"][5, 3:])


def test_double_and_half_are_taken_as_float32(manifest, tmp_path):
    for dtype in (np.float64, np.float16):
        content = arrays()
        content["noise"] = content["noise"].astype(dtype)
        np.savez_compressed(tmp_path / "n.npz", **content)
        noise = NoiseFile.read(tmp_path / "n.npz", manifest)
        assert noise.noise.dtype == np.float32
        assert np.array_equal(noise.noise, content["noise"].astype(np.float32))


@pytest.mark.parametrize("choice", [{"sampler": "ddim"}, {"sampler": "dpm-solver++", "steps": 4}])
def test_a_sampler_without_noise_needs_none(choice, make_bundle, tmp_path):
    """Noise that lies in the file all the same may be of other steps, or anything."""
    bundle = resampled(make_bundle(plan=PlanKind.DYNAMIC_WIDTH), SamplerChoice(**choice))
    rng = np.random.default_rng(0)
    content = {"x_T": rng.standard_normal((2, 4, 8, 8)).astype(np.float32), "labels": np.array([1, 2])}
    for more in ({}, {"noise": rng.standard_normal((250, 2, 4, 8, 8))}, {"noise": np.array(["none"])}):
        np.savez(tmp_path / "n.npz", **content, **more)
        noise = NoiseFile.read(tmp_path / "n.npz", bundle.manifest)
        assert noise.noise is None and noise.labels == (1, 2)
        (batch,) = make_batches([1, 2], [0, 1], 2)
        assert np.array_equal(noise.initial(batch), content["x_T"])


def spoiled():
    def change(**parts):
        return lambda content: content.update({k: f(content[k]) for k, f in parts.items()})

    def with_nan(array):
        array[2, 1, 0, 3, 3] = np.nan
        return array

    yield change(noise=lambda a: a[:5]), r"noise has shape \(5, 4, 3, 8, 8\), expected \(6, 4, 3, 8, 8\)"
    yield change(noise=lambda a: a[:, :3]), r"noise has shape \(6, 3, 3, 8, 8\), expected \(6, 4, 3, 8, 8\)"
    yield change(x_T=lambda a: a[:, :, :4]), r"x_T has shape \(4, 3, 4, 8\), expected \(4, 3, 8, 8\)"
    yield change(x_T=lambda a: a[0, 0, 0, 0]), r"x_T has shape \(\), expected \(images, 3, 8, 8\)"
    yield change(x_T=lambda a: a[:0], noise=lambda a: a[:, :0], labels=lambda a: a[:0]), r"x_T has shape \(0, 3, 8, 8\)"
    yield change(labels=lambda a: a[:3]), r"labels has shape \(3,\), expected \(4\)"
    yield change(labels=lambda a: a.astype(float)), "labels is float64, expected integers"
    yield change(noise=lambda a: a.astype(int)), "noise is int64, expected floating point"
    yield change(noise=with_nan), "noise holds NaN or infinite values"
    yield change(x_T=lambda a: a.astype(np.float64) * 1e300), "x_T holds values outside the range of float32"
    yield (
        lambda content: content.pop("noise"),
        r"has no array 'noise', which ddpm needs: it adds noise in 5 of 6 steps; expected float \[steps, B, C, S, S\]",
    )
    yield lambda content: content.pop("labels"), "has no array 'labels'; expected x_T, labels"
    yield change(labels=lambda a: np.array([{"x": 1}] * 4, dtype=object)), "allow_pickle=False"


@pytest.mark.parametrize(("spoil", "message"), list(spoiled()))
def test_what_does_not_fit_is_named(spoil, message, manifest, tmp_path):
    content = arrays()
    spoil(content)
    np.savez(tmp_path / "n.npz", **content)
    with pytest.raises(ConfigError, match=message) as caught:
        NoiseFile.read(tmp_path / "n.npz", manifest)
    assert "\n" not in str(caught.value) and "n.npz" in str(caught.value)


class Planted:
    """Touches a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_files_that_are_no_noise_are_refused_and_never_executed(manifest, tmp_path):
    file, trap = tmp_path / "n.npz", tmp_path / "trap"
    whole = io.BytesIO()
    np.savez(whole, **arrays())
    array = io.BytesIO()
    np.save(array, np.zeros(3))
    flipped = bytearray(whole.getvalue())
    flipped[len(flipped) // 2] ^= 1
    evil = io.BytesIO()
    with zipfile.ZipFile(evil, "w") as archive:
        archive.writestr("x_T.npy", pickle.dumps(Planted(trap)))
        archive.writestr("noise.npy", b"")
        archive.writestr("labels.npy", b"")
    for content, message in (
        (b"", "is not a noise file"),
        (b"plain text", "is not a noise file"),
        (pickle.dumps(Planted(trap)), "is not a noise file"),
        (evil.getvalue(), "is not a noise file: (x_T|noise)"),
        (array.getvalue(), "is a single array, expected an .npz"),
        (whole.getvalue()[:2000], "is not a noise file"),
        (bytes(flipped), "is not a noise file.*CRC"),
    ):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=message) as caught:
            NoiseFile.read(file, manifest)
        assert "\n" not in str(caught.value)
    assert not trap.exists()
    with pytest.raises(ConfigError, match=r"cannot read noise from .*gone\.npz: No such file"):
        NoiseFile.read(tmp_path / "gone.npz", manifest)
    with pytest.raises(ConfigError, match=r"cannot read noise from .*Is a directory"):
        NoiseFile.read(tmp_path, manifest)


def test_seeded_noise_is_that_of_the_image():
    noise = SeededNoise(5, (3, 8, 8))
    (batch,) = make_batches([1, 1], [7, 9], 2)
    assert np.array_equal(noise.initial(batch)[1].reshape(-1), normals(5, 9, 0, 192))
    assert np.array_equal(noise.step(batch, 3)[0].reshape(-1), normals(5, 7, 4, 192))
