"""Bundles and inputs whose files are links: what counts is their content, on every backend."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dydit.bundle.bundle import Bundle
from dydit.errors import BundleError
from dydit.files import sha256_of
from dydit.runtime.backends.base import BackendOptions
from dydit.runtime.backends.registry import open_backend
from dydit.runtime.images.pixels import ToPixels
from dydit.runtime.noise_source import NoiseFile
from dydit.runtime.pipeline import DyDiTPipeline
from tests.fixtures.packages import OPENVINO_AT_RELEASE


def hub_cache(folder: Path, target: Path) -> Path:
    """snapshots/<revision>/NAME -> ../../blobs/<SHA-256>, as huggingface_hub lays out what it downloads."""
    snapshot = target / "snapshots" / "5f2c"
    (target / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        blob = target / "blobs" / sha256_of(file)
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", blob.name))
    return snapshot


def annex(folder: Path, target: Path) -> Path:
    """Every file in a folder of its own, as git-annex and DVC have them."""
    work = target / "work"
    work.mkdir(parents=True)
    for number, file in enumerate(folder.iterdir()):
        (target / str(number)).mkdir()
        shutil.copy(file, target / str(number) / "object")
        (work / file.name).symlink_to(target / str(number) / "object")
    return work


def weights_elsewhere(folder: Path, target: Path) -> Path:
    """Only the large file is a link, as after moving it to another disk."""
    shutil.copytree(folder, target / "bundle")
    (target / "bundle" / "weights.bin").rename(target / "large")
    (target / "bundle" / "weights.bin").symlink_to(target / "large")
    return target / "bundle"


LAYOUTS = [hub_cache, annex, weights_elsewhere]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["onnxruntime", "torch", OPENVINO_AT_RELEASE])
@pytest.mark.parametrize("plan", [{"max_subnets": 4}, {"plan": "sliding"}], ids=["merged", "sliding"])
def test_a_bundle_of_links_computes_the_same(make_bundle, tmp_path, layout, backend: str, plan) -> None:
    bundle = make_bundle(steps=6, max_batch=8, **plan)
    linked = layout(bundle.path, tmp_path)
    images = []
    for path in (bundle.path, linked):
        with DyDiTPipeline.from_bundle(path, backend, threads=1) as pipeline:
            images.append(pipeline([1, 2], seed=3, output_type="latent").latents)
    assert np.array_equal(*images)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_between_layers_and_packed_weights(make_bundle, tmp_path, layout) -> None:
    """Graphs that get further outputs are handed over as bytes; packing copies weights."""
    linked = Bundle.open(layout(make_bundle(steps=6, max_batch=8).path, tmp_path))
    for packed, debug in ((False, True), (True, False)):
        engine = open_backend("onnxruntime", linked, BackendOptions(threads=1, packed=packed))
        engine.subnet(0, debug=debug).close()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_decoder_of_links(vae_bundle, tmp_path, layout: Callable[[Path, Path], Path]) -> None:
    linked = Bundle.open(layout(vae_bundle.path, tmp_path))
    model = linked.manifest.model
    latents = np.random.default_rng(0).standard_normal((2, model.in_channels, model.input_size, model.input_size))
    pixels = [
        ToPixels(open_backend("onnxruntime", each, BackendOptions(threads=1)))(latents.astype(np.float32))
        for each in (vae_bundle, linked)
    ]
    assert np.array_equal(*pixels)


def test_a_damaged_target_is_noticed(make_bundle, tmp_path) -> None:
    linked = hub_cache(make_bundle().path, tmp_path)
    blob = (linked / "weights.bin").resolve()
    blob.write_bytes(blob.read_bytes()[::-1])
    with pytest.raises(BundleError, match=r"weights\.bin was changed \(its SHA-256 differs\)"):
        Bundle.open(linked)
    blob.unlink()
    with pytest.raises(BundleError, match=r"weights\.bin is missing"):
        Bundle.open(linked)


def test_results_beside_links_leave_their_targets_alone(make_bundle, tmp_path) -> None:
    """What is written at run time replaces a link, and never what it leads to."""
    from dydit.files import write_atomic

    linked = hub_cache(make_bundle().path, tmp_path)
    blob = (linked / "manifest.json").resolve()
    before = blob.read_bytes()
    write_atomic(linked / "manifest.json", b"{}")
    assert blob.read_bytes() == before and not (linked / "manifest.json").is_symlink()


def test_inputs_that_are_links(make_bundle, make_checkpoint, tmp_path) -> None:
    from dydit.checkpoints.checkpoint import load_checkpoint

    bundle, model = make_bundle(), make_bundle().manifest.model
    shape = (model.in_channels, model.input_size, model.input_size)
    steps = bundle.manifest.sampling.steps
    np.savez(
        tmp_path / "blob",
        x_T=np.zeros((1, *shape), np.float32),
        noise=np.zeros((steps, 1, *shape), np.float32),
        labels=np.array([1]),
    )
    (tmp_path / "noise.npz").symlink_to(tmp_path / "blob.npz")
    assert NoiseFile.read(tmp_path / "noise.npz", bundle.manifest).labels == (1,)
    (tmp_path / "model.safetensors").symlink_to(make_checkpoint().path)
    assert load_checkpoint(tmp_path / "model.safetensors").sha256 == make_checkpoint().sha256
