"""A latent model on the command line: export with a decoder, pictures, and what does not fit is one line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

STEPS = 4


@pytest.fixture(scope="session")
def checkpoint(make_checkpoint) -> Path:
    return make_checkpoint().path


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_export_then_sample_then_explain(run, checkpoint: Path, autoencoder, tmp_path: Path) -> None:
    bundle, out = tmp_path / "bundle", tmp_path / "out"
    options = ["--steps", STEPS, "--vae", autoencoder.folder, "--vae-tile", 6]
    done = run("export", checkpoint, *options, "--out", bundle)
    assert done.code == 0, done.err
    assert f"Decoder from {autoencoder.folder}: scaling factor 0.18215" in done.out
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert (manifest["vae"]["tile"], manifest["vae"]["source"]) == (6, str(autoencoder.folder))

    done = run("sample", bundle, "--labels", "0-6", "--npz", "--latents-out", tmp_path / "latents.npz", "--out", out)
    assert done.code == 0 and "look at grid.png, samples.npz" in done.out and "latents" not in done.out
    assert sorted(p.name for p in out.glob("0*.png")) == [f"{image:06d}.png" for image in range(7)]
    assert Image.open(out / "000003.png").size == (16, 16)
    with np.load(out / "samples.npz") as file, np.load(tmp_path / "latents.npz") as latents:
        assert file["arr_0"].shape == (7, 16, 16, 3) and file["arr_0"].std() > 10
        assert latents["latents"].shape == (7, 4, 8, 8)

    done = run("inspect", bundle)
    line = next(line for line in done.out.splitlines() if line.startswith("decoder "))
    assert f"VAE from {autoencoder.folder}, 16x16 pixels, in tiles of 6x6 latents; " in line
    assert "scaling factor 0.18215\n" in done.out and "samples     latents\n" in done.out
    facts = json.loads(run("inspect", bundle, "--json").out)["decoder"]
    assert facts["picture_side"] == 16
    assert facts["bytes"] == sum((bundle / name).stat().st_size for name in ("vae_decoder.onnx", "vae_weights.bin"))


def test_parity_and_bench_take_such_a_bundle(run, vae_bundle, checkpoint: Path, tmp_path: Path) -> None:
    done = run("parity", vae_bundle.path, "--against", checkpoint, "--out", tmp_path / "parity")
    assert done.code == 0 and "parity holds" in done.out
    rounds = ["--steps-measured", "2", "--repeats", "1", "--threads", "1"]
    done = run("bench", vae_bundle.path, *rounds, "--out", tmp_path / "bench")
    assert done.code == 0 and "ms a step" in done.out, done.err


def test_sampling_and_decoding_have_their_own_progress(run, vae_bundle, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    done = run("sample", vae_bundle.path, "--labels", "0-5", "--out", tmp_path / "out")
    assert done.code == 0
    assert done.err.index("\rsample: 100 %|") < done.err.index("\rimages: ") < done.err.index("\rimages: 100 %|")


def refused(done: Any, *words: str) -> None:
    assert done.code == 2 and done.out == "", done
    assert done.err.startswith("dydit: error: ") and done.err.count("\n") == 1, done.err
    assert all(word in done.err for word in words), done.err


@pytest.fixture
def export(run, checkpoint: Path, tmp_path: Path) -> Callable[..., Any]:
    """`export(*options, source=checkpoint)`: an export that has to leave nothing."""

    def call(*options: object, source: Path = checkpoint) -> Any:
        done = run("export", source, "--steps", STEPS, *options, "--out", tmp_path / "out" / "bundle")
        assert not list((tmp_path / "out").glob("*")) and not list((tmp_path / "out").glob(".*"))
        return done

    return call


def test_a_vae_that_does_not_fit(export, autoencoder, make_checkpoint, small_config, tmp_path: Path) -> None:
    folder = autoencoder.folder
    wide, three = (make_checkpoint(small_config.model_copy(update={"in_channels": count})).path for count in (8, 3))
    refused(export("--vae", folder, source=wide), f"{folder} decodes latents of 4 channels, but the model has 8")
    refused(export("--vae", folder, source=three), f"{folder} decodes latents of 4 channels, but the model has 3")
    refused(export("--vae", folder, "--space", "pixels"), "a model that samples pixels has no latents to decode")
    refused(export("--space", "pixels"), "4 channels cannot be pixels; expected 1 (grey) or 3 (RGB)")
    refused(export("--vae", folder, "--vae-tile", 9), "the tile has a side of 9 latents; expected 1..8")
    refused(export("--vae", folder, "--vae-tile", 0), "--vae-tile")
    refused(export("--vae", folder, "--vae-scale", 0), "--vae-scale")
    for option in ("--vae-tile", "--vae-scale", "--vae-shift"):
        refused(export(option, 4), "a tile, scale or shift can only be given with a VAE decoder; give --vae")


def test_what_is_no_vae(export, autoencoder, checkpoint: Path, vae_bundle, tmp_path: Path) -> None:
    refused(export("--vae", tmp_path / "nowhere"), "no such file or folder (a model on the Hugging Face hub is named")
    refused(export("--vae", checkpoint), f"--vae {checkpoint}: holds no decoder of an autoencoder")
    refused(export("--vae", tmp_path), "holds no autoencoder: expected config.json in it")
    refused(export("--vae", vae_bundle.path), "is a bundle of dydit")
    refused(export("--vae", ""), "--vae must have at least 1 character, not ''")
    other = shutil.copytree(autoencoder.folder, tmp_path / "vae")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"_class_name": "UNet2DModel"}))
    refused(export("--vae", other), "is of class UNet2DModel; expected AutoencoderKL or VQModel")


def test_a_vae_is_looked_for_before_anything_is_read(export, tmp_path: Path) -> None:
    """So a mistyped path costs no minute of loading and measuring."""
    refused(export("--vae", "no/such/folder", source=tmp_path / "missing.pt"), "--vae no/such/folder: no such file")


@pytest.mark.parametrize("package", ["diffusers", "onnxscript"])
def test_a_missing_package(export, autoencoder, monkeypatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    refused(export("--vae", autoencoder.folder), f"dydit export needs {package}, which is not installed: pip", "[vae]'")


def test_without_a_decoder_as_before(run, make_bundle, tmp_path: Path) -> None:
    bundle = make_bundle().path
    done = run("sample", bundle, "--labels", "1", "--out", tmp_path / "out")
    assert done.code == 0 and "no VAE decoder, so the samples are latents, in latents.npz" in done.out
    assert sorted(content(tmp_path / "out")) == ["latents.npz", "samples.json"]
    refused(run("sample", bundle, "--labels", "1", "--npz", "--out", tmp_path / "no"), "--npz needs pictures", "--vae")
    assert "decoder     none: samples stay latents" in run("inspect", bundle).out


def test_sampling_needs_neither_pytorch_nor_diffusers(vae_bundle, tmp_path: Path) -> None:
    code = """
import sys
sys.modules.update(dict.fromkeys(("torch", "diffusers", "onnx", "onnx_ir", "onnxscript", "safetensors")))
from dydit.cli import main
sys.exit(main(sys.argv[1:]))
"""
    call = ["sample", str(vae_bundle.path), "--labels", "3", "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", code, *call], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "out" / "000000.png").size == (16, 16)


KILLED_AT = """
import os, signal, sys
from pathlib import Path
from dydit.bundle.bundle import Bundle
from dydit.runtime.bulk.run import OutputOptions, sample_to_folder
from dydit.runtime.request import SampleRequest

def die(done, total):
    if done == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)

request, outputs = SampleRequest(labels=(3, 1), num=30, batch_size=5), OutputOptions(npz=True)
sample_to_folder(Bundle.open(sys.argv[1]), request, Path(sys.argv[2]), outputs, picture_progress=die)
"""


def test_a_process_killed_while_it_decodes_goes_on(run, vae_bundle, tmp_path: Path) -> None:
    def pictures(name: str) -> list[str]:
        return sorted(path.name for path in (tmp_path / name).glob("0*.png"))

    for place in (4, 10, 25):
        call = [sys.executable, "-c", KILLED_AT, str(vae_bundle.path), str(tmp_path / "killed"), str(place)]
        assert subprocess.run(call, check=False).returncode == -9
        assert pictures("killed") == [f"{image:06d}.png" for image in range(place)]
        assert not (tmp_path / "killed" / "samples.json").exists()
    for name in ("killed", "clean"):
        call = ["sample", vae_bundle.path, "--labels", "3,1", "--num", "30", "--batch-size", "5", "--npz"]
        assert run(*call, "--out", tmp_path / name).code == 0
    assert len(pictures("killed")) == 30
    assert content(tmp_path / "killed") == content(tmp_path / "clean")
