"""`dydit decode` and `dydit attach-vae` give the pictures of a bundle that was exported with the decoder."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dydit.bundle.bundle import Bundle

SAMPLE = ["--labels", "3,1", "--num", 7, "--batch-size", 6, "--seed", 2]
PICTURES = [f"{image:06d}.png" for image in range(7)]


@pytest.fixture(scope="module")
def plain(make_bundle, vae_settings) -> Bundle:
    """`vae_bundle` without its decoder."""
    return make_bundle(**vae_settings)


def content(folder: Path, *left_out: str) -> dict[str, bytes]:
    files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: data for name, data in files.items() if name not in left_out}


def refused(done: Any, *words: str) -> None:
    assert done.code == 2 and done.out == "", done
    assert done.err.startswith("dydit: error: ") and done.err.count("\n") == 1, done.err
    assert all(word in done.err for word in words), done.err


@pytest.fixture(scope="module")
def runs(vae_bundle, plain, tmp_path_factory) -> tuple[Path, Path]:
    """The same run of the bundle with its decoder, and of that without."""
    from dydit.runtime.bulk.run import OutputOptions, sample_to_folder
    from dydit.runtime.request import SampleRequest

    request = SampleRequest(labels=(3, 1), num=7, batch_size=6, seed=2)
    pictures, latents = (tmp_path_factory.mktemp("runs") / name for name in ("pictures", "latents"))
    sample_to_folder(vae_bundle, request, pictures, OutputOptions(npz=True))
    sample_to_folder(plain, request, latents)
    return pictures, latents


def test_latents_become_the_pictures_of_a_bundle_with_that_decoder(run, runs, autoencoder, tmp_path: Path) -> None:
    pictures, latents = runs
    out = tmp_path / "out"
    call = ["decode", latents, "--vae", autoencoder.folder, "--npz", "--out", out]
    done = run(*call)
    assert done.code == 0 and "7 images of 16x16 pixels in " in done.out, done.err
    assert f"Decoder from {autoencoder.folder}: scaling factor 0.18215" in done.out
    assert content(out, "samples.json") == content(pictures, "samples.json")
    before = content(out)
    assert "already complete" in run(*call).out and content(out) == before
    refused(run(*call, "--vae-tile", "6"), "holds a run with other settings (vae: ")
    assert content(out) == before
    (out / PICTURES[3]).unlink()
    assert run(*call).code == 0 and content(out) == before, "a picture that has gone is made again"


def test_a_file_of_latents_is_enough(run, runs, autoencoder, tmp_path: Path) -> None:
    """Numbers and labels may be missing, and halves are latents too."""
    with np.load(runs[1] / "latents.npz") as file:
        latents = file["latents"]
    np.savez(tmp_path / "some.npz", latents=latents[:2].astype(np.float16), images=np.array([12, 3]))
    done = run("decode", tmp_path / "some.npz", "--vae", autoencoder.folder, "--out", tmp_path / "out", "--json")
    facts = json.loads(done.out)
    assert (facts["images"], facts["side"], facts["vae"]["scaling_factor"]) == (2, 16, 0.18215), done.err
    assert sorted(path.name for path in (tmp_path / "out").glob("0*.png")) == ["000003.png", "000012.png"]
    ours, theirs = (
        np.asarray(Image.open(file)).astype(int) for file in (tmp_path / "out" / "000012.png", runs[0] / "000000.png")
    )
    assert np.abs(ours - theirs).max() <= 2


DYING = """
import os, signal, sys
from dydit.cli import main
from dydit.runtime.images import image_files as images

write, left = images.write_atomic, [int(sys.argv[1])]

def dying(path, data):
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    write(path, data)

images.write_atomic = dying
main(sys.argv[2:])
"""


@pytest.mark.release
def test_a_killed_decode_goes_on(run, runs, autoencoder, tmp_path: Path) -> None:
    call = ["decode", runs[1], "--vae", autoencoder.folder, "--npz", "--out", tmp_path / "out"]
    words = [sys.executable, "-c", DYING, "5", *map(str, call)]
    assert subprocess.run(words, check=False, capture_output=True).returncode == -9
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [".work", *PICTURES[:5]]
    times = {name: (out / name).stat().st_mtime_ns for name in PICTURES[:5]}
    assert run(*call).code == 0
    assert content(out, "samples.json") == content(runs[0], "samples.json")
    assert times == {name: (out / name).stat().st_mtime_ns for name in times}


@pytest.fixture
def decode(run, autoencoder, tmp_path: Path) -> Callable[..., Any]:
    """`decode(latents, *options)`, which has to leave nothing."""

    def call(latents: Path, *options: object, vae: object = autoencoder.folder) -> Any:
        done = run("decode", latents, "--vae", vae, "--out", tmp_path / "out", *options)
        assert not (tmp_path / "out").exists()
        return done

    return call


def test_what_is_no_file_of_latents(decode, runs, tmp_path: Path) -> None:
    good = np.random.default_rng(0).standard_normal((2, 4, 8, 8)).astype(np.float32)
    file = tmp_path / "latents.npz"
    for arrays, words in (
        ({"arr_0": good}, "has no array 'latents'; expected latents"),
        (
            {"latents": good[0]},
            "latents are float32 [4, 8, 8], expected floating point [images, channels, height, width]",
        ),
        ({"latents": good.astype(int)}, "latents are int64 [2, 4, 8, 8], expected floating point"),
        ({"latents": good[:0]}, "expected floating point [images"),
        ({"latents": good[..., :6]}, "latents are 8x6, expected squares"),
        ({"latents": np.where(good > 2, np.nan, good)}, "hold NaN or infinite values; sample them again"),
        ({"latents": good, "images": np.array([3, 3])}, "two images have the same index"),
        ({"latents": good, "images": np.array([-1, 3])}, "images holds -1; expected numbers from 0"),
        ({"latents": good, "labels": np.array([1.0, 2.0])}, "labels is float64 [2], expected integers [2]"),
        ({"latents": good[:, :3]}, "decodes latents of 4 channels, but "),
    ):
        np.savez(file, **arrays)
        refused(decode(file), str(file), words)
    np.save(tmp_path / "one.npy", good)
    refused(decode(tmp_path / "one.npy"), "is a single array, expected an .npz file with latents")
    file.write_bytes(b"text")
    refused(decode(file), "is not a latents file")
    refused(decode(tmp_path / "nowhere.npz"), "cannot read latents from", "No such file")
    refused(decode(runs[0]), "holds no latents.npz", "`dydit sample --latents-out FILE.npz`, and decode that file")
    refused(decode(runs[1], vae=tmp_path / "nowhere"), "no such file or folder")
    refused(decode(runs[1], "--vae-tile", 9), "the tile has a side of 9 latents; expected 1..8")


@pytest.mark.parametrize("package", ["diffusers", "onnxscript"])
def test_a_missing_package_is_asked_for_at_once(run, decode, plain, tmp_path: Path, monkeypatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    for done in (decode(tmp_path / "missing.npz"), run("attach-vae", plain.path, "--vae", "owner/name")):
        refused(done, f"needs {package}, which is not installed", "pip install", "[vae]")


@pytest.fixture
def bundle(plain, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain.path, tmp_path / "bundle"))


def test_an_attached_decoder_makes_the_bundle_that_an_export_makes(
    run, bundle, vae_bundle, autoencoder, traces
) -> None:
    (bundle / "engines").mkdir()
    traces.clear()  # the export's trace is not used again: a second one has to give the same bytes
    done = run("attach-vae", bundle, "--vae", autoencoder.folder)
    assert done.code == 0 and "now samples images" in done.out and "dydit build" in done.out, done.err
    opened = Bundle.open(bundle)
    assert opened.manifest == vae_bundle.manifest
    assert content(bundle) == content(vae_bundle.path)
    before = content(bundle)
    refused(run("attach-vae", bundle, "--vae", autoencoder.folder), "already has a decoder, from ")
    assert content(bundle) == before


def test_a_killed_attachment_leaves_the_bundle_as_it_was(bundle, vae_bundle, monkeypatch) -> None:
    """Killed before each of its writes, one after another; what is left over does not hinder the next call."""
    from dydit.export import attach

    class Killed(BaseException):
        pass

    def exported(source: str, folder: Path, *_: object) -> Any:
        for name in ("vae_decoder.onnx", "vae_weights.bin"):
            write(shutil.copy, vae_bundle.path / name, folder / name)
        return vae_bundle.manifest.vae

    def write(function: Callable[..., Any], *arguments: object) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        function(*arguments)

    replace, write_atomic, left = os.replace, attach.write_atomic, [0]
    monkeypatch.setattr(attach, "export_vae", exported)
    monkeypatch.setattr(attach.os, "replace", lambda *places: write(replace, *places))
    monkeypatch.setattr(attach, "write_atomic", lambda *arguments: write(write_atomic, *arguments))
    before = Bundle.open(bundle).manifest
    for writes in range(5):
        left[0] = writes
        with pytest.raises(Killed):
            attach.attach_vae(bundle, "source")
        assert Bundle.open(bundle).manifest == before
    (bundle / ".decoder.abc.part").mkdir()  # as a power cut leaves it
    left[0] = 6  # the manifest's own rename, too
    assert attach.attach_vae(bundle, "source").manifest == vae_bundle.manifest
    assert content(bundle) == content(vae_bundle.path)


def test_where_nothing_can_be_attached(
    run, bundle, autoencoder, make_bundle, make_checkpoint, small_config, tmp_path
) -> None:
    before = content(bundle)
    refused(run("attach-vae", bundle, "--vae", tmp_path / "nowhere"), "no such file or folder")
    refused(
        run("attach-vae", bundle, "--vae", autoencoder.folder, "--vae-tile", 9),
        "the tile has a side of 9 latents; expected 1..8",
    )
    refused(run("attach-vae", tmp_path / "no", "--vae", autoencoder.folder), "does not exist")
    refused(run("attach-vae", tmp_path, "--vae", autoencoder.folder), "is not a bundle")
    three = make_checkpoint(small_config.model_copy(update={"in_channels": 3}))
    pixels = make_bundle(three, steps=2, space="pixels")
    refused(run("attach-vae", pixels.path, "--vae", autoencoder.folder), "the model samples pixels of 3 channels")
    descriptor = os.open(bundle, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        refused(run("attach-vae", bundle, "--vae", autoencoder.folder), "another process is adding a decoder to")
    finally:
        os.close(descriptor)
    assert content(bundle) == before
