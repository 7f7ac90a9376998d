"""The pipeline gives what the loop gives, and says what it cannot do."""

from __future__ import annotations

import numpy as np
import pytest

from dydit.errors import BackendError, BundleError, ConfigError
from dydit.runtime.bulk.run import OutputOptions, sample_to_folder
from dydit.runtime.images.image_files import to_uint8
from dydit.runtime.pipeline import DyDiTPipeline
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
    assert out.images is out.latents and out.latents.shape == (10, 3, 8, 8) and out.latents.dtype == np.float32
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


def test_labels_of_every_kind(pipe):
    import torch

    kinds = ([2, 0], (2, 0), np.array([2, 0]), torch.tensor([2, 0]), range(2, -1, -2), [np.int32(2), torch.tensor(0)])
    made = [pipe(labels, seed=np.int64(4), output_type="latent").latents for labels in kinds]
    assert all(np.array_equal(each, made[0]) for each in made[1:])
    alone = [
        pipe(label, seed=4, output_type="latent").latents for label in (2, np.uint8(2), np.array(2), torch.tensor(2))
    ]
    assert all(np.array_equal(each, alone[0]) for each in alone[1:])


def test_without_a_seed_each_call_draws_one_and_says_which(pipe):
    first, second = (pipe(1, output_type="latent") for _ in range(2))
    assert first.seed != second.seed and not np.array_equal(first.latents, second.latents)
    assert np.array_equal(pipe(1, seed=first.seed, output_type="latent").latents, first.latents)
    zero = [pipe(1, seed=0, output_type="latent") for _ in range(2)]
    assert zero[0].seed == 0 and np.array_equal(zero[0].latents, zero[1].latents)


def test_a_tuple_as_diffusers_returns_it(pipe):
    for kind in ("pil", "np", "pt", "latent"):
        given = pipe([1, 2], seed=3, output_type=kind, return_dict=False)
        wanted = pipe([1, 2], seed=3, output_type=kind).images
        assert isinstance(given, tuple) and len(given) == 1 and type(given[0]) is type(wanted)
        assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(given[0], wanted, strict=True))


def test_torch_tensors(pipe):
    import torch

    out, array = (pipe([1, 2], seed=3, output_type=kind).images for kind in ("pt", "np"))
    assert isinstance(out, torch.Tensor) and out.dtype == torch.float32 and out.shape == (2, 3, 8, 8)
    assert np.array_equal(out.numpy().transpose(0, 2, 3, 1), array)


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_devices_are_given_as_strings_or_as_torch_has_them(backend, pixel_bundle):
    import torch

    for device in ("cpu", torch.device("cpu")):
        with DyDiTPipeline.from_bundle(pixel_bundle.path, backend, device, threads=1) as each:
            assert each.backend.options.device == "cpu"
    for device, message in (
        ("tpu", "unknown device 'tpu'; known: cpu, cuda"),
        (torch.device("mps"), "unknown device 'mps'; known: cpu, cuda"),
        (None, "unknown device 'None'"),
        (torch.device("cuda", 1), "only the first visible GPU can be used; set CUDA_VISIBLE_DEVICES=1"),
    ):
        with pytest.raises(BackendError, match=message):
            DyDiTPipeline.from_bundle(pixel_bundle.path, backend, device)
    if not torch.cuda.is_available():
        for device in ("cuda", "cuda:0", torch.device("cuda")):
            with pytest.raises(BackendError, match=r"use device='cpu'"):
                DyDiTPipeline.from_bundle(pixel_bundle.path, backend, device)


def test_what_a_caller_set_in_torch_does_not_matter(make_bundle):
    """Autocast, other default types and devices, another number of threads, gradients: the same bits."""
    import torch

    bundle, threads = make_bundle(steps=3), torch.get_num_threads()
    with DyDiTPipeline.from_bundle(bundle.path, "torch", threads=1) as pipe:
        wanted = pipe([1], seed=0, output_type="latent").latents
        for setting in (torch.autocast("cpu", torch.bfloat16), torch.device("meta"), torch.enable_grad()):
            with setting:
                assert np.array_equal(pipe([1], seed=0, output_type="latent").latents, wanted)
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(2)
        try:
            assert np.array_equal(pipe([1], seed=0, output_type="latent").latents, wanted)
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_num_threads(threads)


def test_refusals(pipe, make_bundle):
    for arguments, message in (
        (
            {"class_labels": [8]},
            r"class_labels: label 8 is outside 0\.\.6, the classes of this model, or 7 for no class",
        ),
        ({"class_labels": []}, "class_labels is empty; give at least one label"),
        ({"class_labels": "20"}, "class_labels must be integers, not '20': this bundle has no names of classes"),
        ({"class_labels": [True]}, "class_labels must be an integer such as 1, not True"),
        (
            {"class_labels": {1: 2}},
            r"class_labels must be a label or a list of labels, such as 20 or \[2, 0\], not {1: 2}",
        ),
        (
            {"class_labels": [1], "guidance_scale": float("nan")},
            "guidance_scale must be a finite number of at least 0, not nan",
        ),
        ({"class_labels": [1], "guidance_scale": -1}, "guidance_scale must be a finite number of at least 0, not -1"),
        ({"class_labels": [1], "guidance_scale": "4"}, "guidance_scale must be a number, not '4'"),
        ({"class_labels": [1], "seed": True}, "seed must be an integer such as 1, not True"),
        ({"class_labels": [1], "seed": 1.0}, "seed must be an integer such as 1, not 1.0"),
        ({"class_labels": [1], "seed": -1}, "seed -1 is outside"),
        ({"class_labels": [1], "output_type": "jpg"}, "output_type 'jpg' is not one of pil, np, pt, latent"),
        ({"class_labels": [1], "output_type": ["pil"]}, "is not one of pil, np, pt, latent"),
        (
            {"class_labels": [1], "num_inference_steps": 50},
            "has 4 subnetworks made for 6 steps of ddpm, which cannot run 50 steps of ddpm; export again with",
        ),
        ({"class_labels": [1], "num_inference_steps": 1001}, r"num_inference_steps 1001 is outside 1\.\.1000"),
        ({"class_labels": [1], "sampler": "euler a"}, "sampler 'euler a' is not one of ddpm, ddim, dpm-solver"),
        ({"class_labels": [1], "sampler": "euler"}, "sampler euler does not fit this model, which predicts epsilon"),
        ({"class_labels": [1], "sampler": ["ddim"]}, r"sampler \['ddim'\] is not one of"),
        (
            {"class_labels": [1], "timestep_spacing": "even"},
            "timestep_spacing 'even' is not one of linspace, leading, tr",
        ),
        ({"class_labels": [1], "eta": 1.5}, "eta must be at most 1, not 1.5"),
        ({"class_labels": [1], "eta": -1}, "eta must be a finite number of at least 0, not -1"),
        ({"class_labels": [1], "eta": 0.5}, "eta is a setting of sampler ddim; ddpm has none"),
        (
            {"class_labels": [1], "num_inference_steps": 6.0},
            "num_inference_steps must be an integer such as 1, not 6.0",
        ),
        ({"class_labels": [1], "image_indices": [1, 2]}, "image_indices has 2 for 1 labels"),
        ({"class_labels": [1], "image_indices": [-1]}, "image_indices -1 is outside"),
        (
            {"class_labels": [1, 2], "image_indices": "12"},
            r"image_indices must be an integer or a list of integers, such as 20 or \[2, 0\], not '12'",
        ),
        ({"class_labels": [1, 2, 1], "image_indices": [5, 5, 5]}, "images 0 and 2 would be identical"),
        ({"class_labels": [1], "progress": 3}, "progress must be a function"),
    ):
        with pytest.raises(ConfigError, match=message):
            pipe(**arguments)
    closed = DyDiTPipeline(pipe.backend)
    closed.close()
    closed.close()
    with pytest.raises(BackendError, match="this pipeline was closed; open the bundle again"):
        closed([1])
    latent = make_bundle()
    with DyDiTPipeline.from_bundle(latent.path, "torch") as other:
        with pytest.raises(ConfigError, match="no VAE decoder; use output_type='latent'"):
            other([1])
        assert other([1], output_type="latent").latents.shape == (1, 4, 8, 8)
    for threads, message in ((True, "threads must be an integer such as 1, not True"), (-1, "threads -1 is outside")):
        with pytest.raises(ConfigError, match=message):
            DyDiTPipeline.from_bundle(latent.path, threads=threads)
    with pytest.raises(BundleError, match="does not exist"):
        DyDiTPipeline.from_bundle("/nowhere/at/all")
