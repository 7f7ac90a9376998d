"""A latent model's bundle with a decoder gives the pictures that PyTorch decodes from the same latents."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dydit.errors import BackendError, ConfigError, OutputError
from dydit.runtime.backends.registry import open_backend
from dydit.runtime.bulk.run import OutputOptions, sample_to_folder
from dydit.runtime.images import image_files as images
from dydit.runtime.images.image_files import make_grid, to_uint8
from dydit.runtime.images.pixels import PictureFormat, ToPixels, picture_format
from dydit.runtime.images.vae_decoder import VaeDecoder
from dydit.runtime.pipeline import DyDiTPipeline
from dydit.runtime.request import SampleRequest

REQUEST = SampleRequest(labels=(3, 1), num=7, batch_size=6, seed=2)
PICTURES = [f"{image:06d}.png" for image in range(7)]


class Killed(BaseException):
    """Stands for the death of the process: nothing catches it."""


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def run(bundle, out: Path, **settings):
    outputs = OutputOptions(npz=True, latents_out=out.with_suffix(".npz"))
    return sample_to_folder(bundle, REQUEST, out, outputs, **settings)


@pytest.fixture(scope="module")
def finished(vae_bundle, tmp_path_factory) -> Path:
    """A run that nothing interrupted; its latents are beside it."""
    out = tmp_path_factory.mktemp("runs") / "run"
    done, pictures = [], []
    summary = run(
        vae_bundle,
        out,
        progress=lambda *now: done.append(now),
        picture_progress=lambda *now: pictures.append(now),
    )
    assert (summary.images, summary.files, summary.note) == (7, ("grid.png", "samples.npz"), "")
    assert done[-1] == (12, 12) and pictures == [(4, 7), (6, 7), (7, 7)], "6 + 1 images, at most 4 at a time"
    assert summary.picture_seconds > 0
    return out


def test_which_bundles_give_pictures(vae_bundle, pixel_bundle, make_bundle):
    assert picture_format(vae_bundle.manifest) == PictureFormat(channels=3, side=16, decoded=True)
    assert picture_format(pixel_bundle.manifest) == PictureFormat(channels=3, side=8, decoded=False)
    assert picture_format(make_bundle().manifest) is None


def test_pictures_are_those_that_pytorch_decodes(finished, autoencoder):
    assert sorted(content(finished)) == [*PICTURES, "grid.png", "samples.json", "samples.npz"]
    with np.load(finished.with_suffix(".npz")) as file:
        latents, labels = file["latents"], file["labels"]
    assert latents.shape == (7, 4, 8, 8) and latents.std() > 0.1
    wanted = to_uint8(autoencoder.decode(latents))
    assert wanted.std() > 10, "the pictures have contrast"
    pictures = np.stack([np.asarray(Image.open(finished / name)) for name in PICTURES])
    assert pictures.shape == (7, 16, 16, 3) and len(np.unique(pictures.reshape(7, -1), axis=0)) == 7
    assert np.abs(pictures.astype(int) - wanted).max() <= 1
    with np.load(finished / "samples.npz") as file:
        assert np.array_equal(file["arr_0"], pictures) and np.array_equal(file["arr_1"], labels)
    assert np.array_equal(np.asarray(Image.open(finished / "grid.png")), make_grid(list(pictures)))


def test_latents_are_those_of_the_bundle_without_a_decoder(finished, make_bundle, vae_settings, tmp_path):
    plain = make_bundle(**vae_settings)
    summary = sample_to_folder(plain, REQUEST, tmp_path / "plain")
    assert summary.files == ("latents.npz",) and "no VAE decoder" in summary.note
    assert (tmp_path / "plain" / "latents.npz").read_bytes() == finished.with_suffix(".npz").read_bytes()
    with pytest.raises(ConfigError, match=r"--npz needs pictures, .* 4 channels and the bundle has no decoder; export"):
        sample_to_folder(plain, REQUEST, tmp_path / "no", OutputOptions(npz=True))


def test_dying_before_any_picture_changes_nothing_in_the_end(finished, vae_bundle, tmp_path, monkeypatch):
    """Die before the k-th picture, for every k; those that are there stay, and the rest becomes the same."""
    write, left = images.write_atomic, [0]

    def dying(path, data):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        write(path, data)

    monkeypatch.setattr(images, "write_atomic", dying)
    for k in range(8):
        out, left[0] = tmp_path / f"run{k}", k
        with pytest.raises(Killed):
            run(vae_bundle, out)
        assert sorted(p.name for p in out.iterdir()) == [".work", *PICTURES[:k]]
        before = {p: p.stat().st_mtime_ns for p in out.glob("*.png")}
        left[0] = 100
        steps = []
        assert not run(vae_bundle, out, progress=lambda *now, steps=steps: steps.append(now)).finished_before
        assert not steps, "nothing is sampled again"
        assert all(p.stat().st_mtime_ns == time for p, time in before.items()), "what is there stays"
        ours, theirs = content(out), content(finished)
        ours.pop("samples.json"), theirs.pop("samples.json")
        assert ours == theirs, k
        assert out.with_suffix(".npz").read_bytes() == finished.with_suffix(".npz").read_bytes()


def test_what_is_there_is_not_decoded_again(vae_bundle, tmp_path, monkeypatch):
    out, decoded = tmp_path / "run", []
    decode = ToPixels.__call__

    def counting(self, samples):
        decoded.append(len(samples))
        return decode(self, samples)

    monkeypatch.setattr(ToPixels, "__call__", counting)

    def die(done, total):
        if done == 6:
            raise Killed

    with pytest.raises(Killed):
        run(vae_bundle, out, picture_progress=die)
    assert decoded == [4, 2]
    run(vae_bundle, out)
    assert decoded == [4, 2, 1]
    assert run(vae_bundle, out).finished_before and decoded == [4, 2, 1]


def test_a_foreign_picture_in_an_unfinished_run_is_refused(vae_bundle, tmp_path):
    out = tmp_path / "run"

    def die(done, total):
        raise Killed

    with pytest.raises(Killed):
        run(vae_bundle, out, picture_progress=die)
    Image.new("RGB", (8, 8)).save(out / PICTURES[2])
    with pytest.raises(OutputError, match=r"000002\.png is not a picture of this run; remove it"):
        run(vae_bundle, out)
    (out / PICTURES[2]).write_bytes(b"no picture")
    assert run(vae_bundle, out).images == 7


def test_the_same_pictures_on_the_other_backend(finished, vae_bundle, tmp_path):
    run(vae_bundle, tmp_path / "run", backend="torch")
    with np.load(finished / "samples.npz") as ours, np.load(tmp_path / "run" / "samples.npz") as theirs:
        assert np.abs(ours["arr_0"].astype(int) - theirs["arr_0"]).max() <= 1


def test_the_pipeline_decodes(vae_bundle, autoencoder):
    with DyDiTPipeline.from_bundle(vae_bundle.path, threads=1) as pipe:
        pil, array, latent = (pipe([3, 1, 3, 1, 3], seed=2, output_type=kind) for kind in ("pil", "np", "latent"))
        assert latent.images is latent.latents and np.array_equal(latent.latents, array.latents)
        assert latent.latents.shape == (5, 4, 8, 8)
        wanted = autoencoder.decode(array.latents).transpose(0, 2, 3, 1) / 2 + 0.5
        assert array.images.shape == (5, 16, 16, 3) and wanted.std() > 0.05
        assert np.abs(array.images - np.clip(wanted, 0, 1)).max() < 1e-4
        assert np.abs(np.stack([np.asarray(image) for image in pil.images]) - 255 * array.images).max() <= 0.51


def test_larger_latents_are_decoded_in_tiles(make_bundle, vae_settings, autoencoder, tmp_path):
    """Tiles of 6 of 8: another picture than the whole gives, but near it; each tile as PyTorch decodes it."""
    bundle = make_bundle(**vae_settings, vae=str(autoencoder.folder), vae_tile=6)
    vae = bundle.manifest.vae
    assert (vae.tile, vae.upscale, picture_format(bundle.manifest).side) == (6, 2, 16)
    run(bundle, tmp_path / "run")
    with np.load(tmp_path / "run.npz") as file, np.load(tmp_path / "run" / "samples.npz") as pictures:
        latents, found = file["latents"], pictures["arr_0"].astype(int)
    whole = to_uint8(autoencoder.decode(latents)).astype(int)
    assert found.shape == whole.shape and np.abs(found - whole).max() > 3
    assert np.corrcoef(found.reshape(-1), whole.reshape(-1))[0, 1] > 0.9
    corner = to_uint8(autoencoder.decode(np.ascontiguousarray(latents[:, :, :6, :6]))).astype(int)
    alone = slice(0, 4)  # what the other tiles, which begin at 2, do not reach
    assert np.abs(found[:, alone, alone] - corner[:, alone, alone]).max() <= 1


def test_what_is_missing_is_said_before_sampling(vae_bundle, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match=r"onnxruntime cannot be imported .*pip install 'dydit\[cpu\]'"):
        sample_to_folder(vae_bundle, REQUEST, tmp_path / "run", backend="torch")
    assert not (tmp_path / "run").exists()
    with DyDiTPipeline.from_bundle(vae_bundle.path, "torch") as pipe:
        steps = []
        with pytest.raises(BackendError, match="onnxruntime cannot be imported"):
            pipe([1], progress=lambda *now: steps.append(now))
        assert not steps
        assert pipe([1], output_type="latent").latents.shape == (1, 4, 8, 8)


def test_pixels_that_are_not_finite_are_refused(vae_bundle, monkeypatch):
    monkeypatch.setattr(VaeDecoder, "decode", lambda self, latents: np.full((1, 3, 16, 16), np.nan))
    with pytest.raises(BackendError, match="the VAE decoder returns NaN or infinite pixels"):
        ToPixels(open_backend("onnxruntime", vae_bundle))(np.zeros((1, 4, 8, 8), np.float32))


def test_another_decoder_is_another_run(finished, make_bundle, vae_settings, autoencoder, vae_bundle):
    """The digest of a bundle covers its decoder, so that pictures of two decoders never mix."""
    other = make_bundle(**vae_settings, vae=str(autoencoder.folder), vae_tile=6)
    assert other.manifest.digest != vae_bundle.manifest.digest
    with pytest.raises(OutputError, match="holds a run with other settings"):
        run(other, finished)
