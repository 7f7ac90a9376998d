"""The pipeline gives what the loop gives, and says what it cannot do."""

from __future__ import annotations

import numpy as np
import pytest

from dydit import DyDiTPipeline
from dydit.errors import BackendError, BundleError, ConfigError
from dydit.runtime.bulk import OutputOptions, sample_to_folder
from dydit.runtime.images import to_uint8
from dydit.runtime.request import SampleRequest


@pytest.fixture(scope="module")
def pipe(pixel_bundle):
    with DyDiTPipeline.from_bundle(pixel_bundle.path, threads=1) as pipe:
        yield pipe


def test_more_images_than_a_batch_holds(pipe, relative):
    """Ten labels in batches of at most eight; each image as if alone, and keyed by its index."""
    labels = [1, 2, 3, 4, 5, 6, 0, 1, 2, 3]
    progress = []
    out = pipe(labels, seed=3, output_type="latent", progress=lambda *now: progress.append(now))
    assert out.images is None and out.latents.shape == (10, 3, 8, 8) and out.latents.dtype == np.float32
    assert progress[-1] == (12, 12)
    alone = pipe(3, seed=3, image_indices=[9], output_type="latent").latents
    assert relative(alone[0], out.latents[9]) < 1e-4
    assert relative(pipe(3, seed=4, image_indices=[9], output_type="latent").latents, alone) > 0.1


def test_output_types_are_views_of_the_latents(pipe):
    pil, array = (pipe([1, 2], seed=3, output_type=kind) for kind in ("pil", "np"))
    assert np.array_equal(pil.latents, array.latents)
    assert np.array_equal(np.stack([np.asarray(image) for image in pil.images]), to_uint8(pil.latents))
    assert array.images.shape == (2, 8, 8, 3) and array.images.min() >= 0 and array.images.max() <= 1
    assert np.abs(array.images * 255 - to_uint8(pil.latents)).max() <= 0.5001


def test_subnetworks_stay_loaded_between_calls(pipe, pixel_bundle):
    pipe([1], num_inference_steps=6)
    loaded = {index: pipe._subnets.get(index) for index in range(len(pixel_bundle.manifest.subnets))}
    pipe([2])
    assert all(pipe._subnets.get(index) is subnet for index, subnet in loaded.items())


def test_the_same_as_the_command(pipe, pixel_bundle, tmp_path):
    request = SampleRequest(labels=(4, 2), seed=9, cfg_scale=1.5)
    sample_to_folder(pixel_bundle, request, tmp_path / "run", OutputOptions(latents_out=tmp_path / "l.npz"))
    with np.load(tmp_path / "l.npz") as file:
        assert np.allclose(file["latents"], pipe([4, 2], 1.5, seed=9).latents, rtol=1e-4, atol=1e-4)


def test_refusals(pipe, make_bundle):
    for arguments, message in (
        ({"class_labels": [7]}, r"label 7 is outside 0\.\.6"),
        ({"class_labels": []}, "give at least one label"),
        ({"class_labels": [1], "guidance_scale": float("nan")}, "cfg_scale"),
        ({"class_labels": [1], "output_type": "pt"}, "output_type 'pt' is not one of pil, np, latent"),
        ({"class_labels": [1], "num_inference_steps": 50}, "was exported for 6 steps, not 50"),
        ({"class_labels": [1], "image_indices": [1, 2]}, "2 image indices for 1 labels"),
        ({"class_labels": [1], "image_indices": [-1]}, "image index -1 is outside"),
    ):
        with pytest.raises(ConfigError, match=message):
            pipe(**arguments)
    closed = DyDiTPipeline(pipe.backend)
    closed.close()
    with pytest.raises(BackendError, match="were closed; open the bundle again"):
        closed([1])
    latent = make_bundle()
    with DyDiTPipeline.from_bundle(latent.path, "torch") as other:
        with pytest.raises(ConfigError, match="no VAE decoder; ask for output_type='latent'"):
            other([1])
        assert other([1], output_type="latent").latents.shape == (1, 4, 8, 8)
    with pytest.raises(BundleError, match="does not exist"):
        DyDiTPipeline.from_bundle("/nowhere/at/all")
