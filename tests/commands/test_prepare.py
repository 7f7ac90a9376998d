"""`dydit prepare`: pixels, latents and captions; images that cannot be read; runs that are killed and go on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image
from safetensors.numpy import load_file

from dydit.commands.progress import Progress
from dydit.data.prepare import prepare
from dydit.data.prepare_settings import PrepareSettings
from dydit.data.prepared import PreparedData
from dydit.models.config import TextSpec

ROOT = Path(__file__).parents[2]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def save(path: Path, seed: int, side: int = 12) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)).save(path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """160 images in two classes: enough for two processes."""
    folder: Path = tmp_path_factory.mktemp("photos")
    for number in range(160):
        save(folder / f"class{number % 2}" / f"{number:03d}.png", number)
    return folder


def test_images_become_data(run: Any, photos: Path, tmp_path: Path) -> None:
    done = run("prepare", photos, "--size", 8, "--out", tmp_path / "data", "--shard-size", 100, "--workers", 1)
    assert done.code == 0 and done.err == "", done.err
    assert "160 images of 3x8x8 in 2 classes, in 2 shards\n" in done.out
    assert f"Next: dydit train --recipe scratch --data {tmp_path}/data --out RUN\n" in done.out
    data = PreparedData(tmp_path / "data")
    assert (len(data), data.class_names, data.info.mirrored) == (160, ("class0", "class1"), True)
    assert not list(tmp_path.glob(".*")) and set(content(tmp_path / "data")) == {
        *("dataset.json", "prepare.json", "shard-00000.safetensors", "shard-00001.safetensors")
    }
    before = content(tmp_path / "data")
    again = run("prepare", photos, "--size", 8, "--out", tmp_path / "data", "--shard-size", 100)
    assert again.code == 0 and "was complete already: 160 images" in again.out and content(tmp_path / "data") == before
    done = run("prepare", photos, "--size", 10, "--out", tmp_path / "data", "--shard-size", 100)
    assert done.code == 2 and "was prepared with other settings (size was 8, and is now 10)" in done.err
    assert content(tmp_path / "data") == before


def test_any_number_of_processes_writes_the_same_bytes(run: Any, photos: Path, tmp_path: Path) -> None:
    for workers in (1, 2):
        words = ("--size", 8, "--shard-size", 70, "--workers", workers)
        assert run("prepare", photos, *words, "--out", tmp_path / str(workers)).code == 0
    assert content(tmp_path / "1") == content(tmp_path / "2")


def test_prepared_data_are_checked(run: Any, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    assert run("prepare", photos, "--size", 4, "--out", out, "--limit", 7, "--no-mirror").code == 0
    done = run("prepare", "--check", out)
    assert done.code == 0 and "is as it was written: 7 images of 3x4x4" in done.out
    shard = out / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
    done = run("prepare", "--check", out)
    assert done.code == 2 and "was changed: its SHA-256 differs" in done.err and done.err.count("\n") == 1
    done = run("prepare", "--check", photos)
    assert done.code == 2 and "holds no prepared data (dataset.json is missing)" in done.err


@pytest.fixture
def spoilt(tmp_path: Path) -> Path:
    """Seven images, of which the third and the last cannot be read."""
    folder = tmp_path / "spoilt"
    for number in range(7):
        save(folder / f"{number}.png", number)
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:200])
    (folder / "6.png").write_text("no image")
    return folder


def test_a_damaged_image_stops_the_run_and_nothing_is_left(run: Any, spoilt: Path, tmp_path: Path) -> None:
    done = run("prepare", spoilt, "--size", 8, "--out", tmp_path / "deep" / "data")
    assert done.code == 2 and done.err.count("\n") == 1
    assert "2.png cannot be used: " in done.err and "correct it, or give --on-error skip" in done.err
    assert not (tmp_path / "deep").exists()


def test_damaged_images_are_skipped_and_named(run: Any, spoilt: Path, tmp_path: Path) -> None:
    words = ("--size", 8, "--on-error", "skip", "--no-mirror", "--shard-size", 3)
    done = run("prepare", spoilt, *words, "--out", tmp_path / "data")
    assert done.code == 0, done.err
    assert "5 images of 3x8x8 in 1 class, in 2 shards" in done.out and "Skipped 2 images:\n  2.png: " in done.out
    assert "  6.png: it is no image of a known format\n" in done.out
    data = PreparedData(tmp_path / "data")
    assert [name for name, _ in data.info.skipped] == ["2.png", "6.png"]
    for number in (0, 1, 3, 4, 5):
        (spoilt / f"{number}.png").rename(spoilt.parent / f"good{number}.png")
    done = run("prepare", spoilt, *words, "--out", tmp_path / "none")
    assert done.code == 2 and "none of 2 images can be used; the first: 2.png: " in done.err


def test_latents_and_captions(
    run: Any, autoencoder: Any, text_encoder: Path, bert_encoder: Path, tmp_path: Path
) -> None:
    models = ("--vae", autoencoder.folder, "--text-encoder", text_encoder, "--text-tokens", 4)
    done = run("prepare", "emoji", "--limit", 20, *models, "--size", 16, "--out", tmp_path / "data")
    assert done.code == 0, done.err
    assert "20 latents of 4x8x8 in 9 classes, with captions of up to 4 tokens, in 1 shard" in done.out
    assert "of more than 4 tokens lost the end" in done.out
    data = PreparedData(tmp_path / "data")
    examples = data.batch(np.arange(20), [np.random.default_rng(each) for each in range(20)])
    assert examples.captions is not None and examples.captions.embeddings.shape == (20, 4, 16)
    assert data.info.autoencoder == str(autoencoder.folder) and np.isfinite(examples.images).all()
    done = run("prepare", "emoji", "--limit", 5, "--text-encoder", bert_encoder, "--out", tmp_path / "bert")
    assert done.code == 2 and "reads at most 16 tokens, not 120" in done.err and not (tmp_path / "bert").exists()
    words = ("--text-encoder", bert_encoder, "--text-tokens", 16)
    done = run("prepare", "emoji", "--limit", 5, *words, "--out", tmp_path / "bert")
    assert done.code == 0, done.err
    assert PreparedData(tmp_path / "bert").text == TextSpec(16, 20)


def test_latents_of_other_conventions(run: Any, autoencoder: Any, tmp_path: Path) -> None:
    """A scale and shift that the user states, and a mean and deviation for each channel that the autoencoder states."""

    def moments(name: str, *words: object) -> np.ndarray:
        done = run("prepare", "emoji", "--limit", 3, "--no-mirror", *words, "--out", tmp_path / name)
        assert done.code == 0, done.err
        return load_file(tmp_path / name / "shard-00000.safetensors")["moments"].astype(np.float64)[:, 0]

    plain = moments("plain", "--vae", autoencoder.folder)
    stated = moments("stated", "--vae", autoencoder.folder, "--vae-scale", 2 * 0.18215, "--vae-shift", 0.5)
    np.testing.assert_allclose(stated[:, :4], 2 * (plain[:, :4] - 0.5 * 0.18215), atol=2e-3)
    np.testing.assert_allclose(stated[:, 4:], 2 * plain[:, 4:], rtol=2e-3)
    shutil.copytree(autoencoder.folder, tmp_path / "vae")
    values = json.loads((tmp_path / "vae" / "config.json").read_text())
    means, deviations = [0.1, 0.2, -0.3, 0.0], [1.0, 2.0, 0.5, 4.0]
    (tmp_path / "vae" / "config.json").write_text(
        json.dumps({**values, "latents_mean": means, "latents_std": deviations, "scaling_factor": 1.0})
    )
    each = moments("each", "--vae", tmp_path / "vae")
    mean, deviation = (np.array(values)[:, None, None] for values in (means, deviations))
    np.testing.assert_allclose(each[:, :4], (plain[:, :4] / 0.18215 - mean) / deviation, rtol=3e-3, atol=3e-3)
    np.testing.assert_allclose(each[:, 4:], plain[:, 4:] / 0.18215 / deviation, rtol=3e-3)


def test_an_image_without_a_caption(run: Any, text_encoder: Path, tmp_path: Path) -> None:
    for number in range(3):
        save(tmp_path / "images" / f"{number}.png", number)
    words = ("prepare", tmp_path / "images", "--size", 8, "--text-encoder", text_encoder, "--text-tokens", 12)
    done = run(*words, "--out", tmp_path / "data")
    assert done.code == 2 and "has no captions to encode; remove --text-encoder, or give captions" in done.err
    (tmp_path / "images" / "0.txt").write_text("a fox")
    (tmp_path / "images" / "2.txt").write_text("an owl")
    done = run(*words, "--out", tmp_path / "data")
    assert done.code == 2 and "1.png cannot be used: it has no caption" in done.err
    done = run(*words, "--on-error", "skip", "--out", tmp_path / "data")
    assert done.code == 0 and "Skipped 1 image:\n  1.png: it has no caption" in done.out
    done = run("prepare", tmp_path / "images", "--size", 8, "--out", tmp_path / "plain")
    assert done.code == 0 and "were not encoded: give --text-encoder" in done.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["photos"], "have different sizes; give --size"),
        (["photos", "--size", 0], "--size"),
        (["photos", "--size", 8, "--vae-scale", 1], "--vae-scale is for latents; give --vae"),
        (["photos", "--size", 9, "--vae", "VAE"], "makes a latent of 2x2 pixels; 9 is no multiple of it"),
        (["digits", "--channels", 1, "--vae", "VAE"], "an autoencoder encodes RGB"),
        (["photos", "--size", 8, "--kind", "npz"], "cannot be read as .npz"),
        (["photos", "--size", 8, "--split", "test"], "has no folder test"),
        (["digits", "--vae", "VAE", "--device", "cuda"], "PyTorch finds no CUDA device here"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    run: Any, photos: Path, autoencoder: Any, tmp_path: Path, words: list[Any], message: str
) -> None:
    import torch

    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    given = [{"photos": photos, "VAE": autoencoder.folder}.get(word, word) for word in words]
    done = run("prepare", *given, "--out", tmp_path / "data")
    assert done.code == 2 and message in done.err and done.err.count("\n") == 1, done.err
    assert not list(tmp_path.iterdir())


def test_a_folder_of_something_else_is_left_alone(run: Any, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    done = run("prepare", photos, "--size", 8, "--out", tmp_path)
    assert done.code == 2 and "exists and was not begun by dydit prepare" in done.err
    assert content(tmp_path) == {"notes.txt": b"mine"}
    assert run("prepare", photos).code == 2


# Forks one run after another from a process that has imported all it needs, so that a kill hits the run itself.
DRIVER = """
import json, os, random, signal, sys, time
from pathlib import Path

import safetensors.numpy

from dydit.data.prepare import prepare
from dydit.data.prepare_settings import PrepareSettings

settings, out, wanted = PrepareSettings.model_validate_json(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
if settings.vae is not None:
    import torch
    import diffusers.models.autoencoders.autoencoder_kl
    import transformers.models.auto.modeling_auto
    import transformers.models.t5.modeling_t5

    torch.set_num_threads(1)  # in each process that is forked, too

class Stages:
    def stage(self, title, done, total):
        pass

def run(folder, kill_after=None):
    started = time.monotonic()
    child = os.fork()
    if not child:
        try:
            prepare(settings, folder, 1, Stages())
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), time.monotonic() - started

status, duration = run(out / "reference")
assert status == 0
random.seed(3)
outcomes, listed, folders = [], [], 0
while outcomes.count(-signal.SIGKILL) < wanted:
    folder, folders = out / f"killed-{folders}", folders + 1
    for _ in range(5):
        status, _ = run(folder, duration * random.uniform(0.02, 0.7))
        outcomes.append(status)
        state = folder / "prepare.json"
        listed.append(len(json.loads(state.read_text())["shards"]) if state.is_file() else 0)
        if status == 0:
            break
    assert run(folder)[0] == 0
left = sorted(path.name for path in out.iterdir())
print(json.dumps({"outcomes": outcomes, "listed": listed, "folders": folders, "left": left}))
"""


def assert_same_after_kills(settings: dict[str, Any], out: Path, shards: int) -> dict[str, bytes]:
    """Ten runs are killed at random moments, and each folder ends with the bytes of an undisturbed run."""
    call = [sys.executable, "-c", DRIVER, json.dumps(settings), str(out), "10"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(call, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["outcomes"].count(-signal.SIGKILL) >= 10, facts
    assert any(0 < count < shards for count in facts["listed"]), facts
    assert facts["left"] == sorted([*(f"killed-{number}" for number in range(facts["folders"])), "reference"])
    wanted = content(out / "reference")
    for number in range(facts["folders"]):
        assert content(out / f"killed-{number}") == wanted
    return wanted


def test_killed_at_any_moment_it_ends_with_the_same_bytes(photos: Path, tmp_path: Path) -> None:
    settings = {"source": str(photos), "size": 64, "shard_size": 9}
    assert len(assert_same_after_kills(settings, tmp_path, 18)) == 18 + 2


@pytest.mark.release
def test_killed_at_any_moment_latents_and_captions_are_the_same(
    autoencoder: Any, text_encoder: Path, tmp_path: Path
) -> None:
    models = {"vae": str(autoencoder.folder), "text_encoder": str(text_encoder), "text_tokens": 12}
    settings = {"source": "emoji", "limit": 120, "size": 32, "shard_size": 10, "batch_size": 4, **models}
    assert len(assert_same_after_kills(settings, tmp_path, 12)) == 12 + 3


class Interrupting(Progress):
    """Interrupts a run when it tells of so many images or captions."""

    def __init__(self, title: str, at: int):
        super().__init__()
        self._stop, self._at = title, at

    def stage(self, title: str, done: int, total: int) -> None:
        if title.startswith(self._stop) and done == self._at:
            raise KeyboardInterrupt


def test_latents_and_captions_are_the_same_after_interrupts(
    autoencoder: Any, text_encoder: Path, tmp_path: Path
) -> None:
    models = {"vae": str(autoencoder.folder), "text_encoder": str(text_encoder), "text_tokens": 12}
    values = {"source": "emoji", "limit": 30, "size": 16, "shard_size": 7, "batch_size": 3, **models}
    settings = PrepareSettings.model_validate(values)
    prepare(settings, tmp_path / "whole", 1, Progress())
    shards = []
    for stop in (("images", 3), ("images", 10), ("captions of shard 2", 3), ("captions of shard 4", 0)):
        with pytest.raises(KeyboardInterrupt):
            prepare(settings, tmp_path / "data", 1, Interrupting(*stop))
        shards.append(len(list((tmp_path / "data").glob("shard*"))))
    assert shards == [0, 1, 2, 4]
    prepare(settings, tmp_path / "data", 1, Progress())
    assert content(tmp_path / "data") == content(tmp_path / "whole")


def test_an_interrupted_run_says_how_to_go_on_and_leaves_no_process(run: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "many.npz", rng.integers(0, 256, (1000, 48, 48, 3), np.uint8))
    words = ["prepare", str(tmp_path / "many.npz"), "--size", "64", "--shard-size", "100", "--workers", "2"]
    words += ["--out", str(tmp_path / "data")]
    for number in (signal.SIGKILL, signal.SIGINT):
        process = subprocess.Popen(
            [sys.executable, "-m", "dydit", *words],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            # A shell's background jobs, and what they start, ignore SIGINT.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        before = len(list((tmp_path / "data").glob("shard*"))) if (tmp_path / "data").exists() else 0
        while len(list((tmp_path / "data").glob("shard*"))) <= before:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= 2
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        assert process.returncode == (130 if number == signal.SIGINT else -number)
        _, alive = psutil.wait_procs(children, timeout=20)
        assert not alive
    assert err.endswith("dydit: error: interrupted; run the same command again to resume\n"), err
    done = run(*words)
    assert done.code == 0, done.err
    assert run(*words[:-3], "1", "--out", tmp_path / "alone").code == 0
    assert content(tmp_path / "data") == content(tmp_path / "alone")


def test_two_runs_do_not_write_one_folder(run: Any, tmp_path: Path) -> None:
    from dydit.files import claimed

    with claimed(tmp_path / "data"):
        done = run("prepare", "digits", "--out", tmp_path / "data")
    assert done.code == 2 and f"another process is writing {tmp_path / 'data'}" in done.err
    assert not list(tmp_path.iterdir())


def test_lost_shards_are_written_again(run: Any, photos: Path, tmp_path: Path) -> None:
    words = ("prepare", photos, "--size", 8, "--shard-size", 50, "--workers", 1, "--out", tmp_path / "data")
    assert run(*words).code == 0
    whole = content(tmp_path / "data")
    (tmp_path / "data" / "dataset.json").unlink()
    (tmp_path / "data" / "shard-00002.safetensors").write_bytes(b"short")
    (tmp_path / "data" / ".shard-00003.safetensors.0123abcd.part").write_bytes(b"half")
    assert run(*words).code == 0
    assert content(tmp_path / "data") == whole
    (tmp_path / "data" / "dataset.json").unlink()
    save(photos / "class0" / "zzz.png", 999)
    try:
        done = run(*words)
    finally:
        (photos / "class0" / "zzz.png").unlink()
    assert done.code == 2 and "the source had 160 images, and has now 161" in done.err
