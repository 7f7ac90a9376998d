"""`dydit decode`: turns saved latents into the pictures that a bundle with that decoder would give.

The folder then holds the files of `dydit sample`: `000000.png`, ..., `grid.png`, `samples.json`, on request
`samples.npz`. A killed call is resumed by calling it again.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dydit.bundle.vae_entry import VAE_WEIGHTS, VaeEntry
from dydit.diffusion.steps import State
from dydit.errors import ConfigError, OutputError
from dydit.files import sha256_of
from dydit.runtime.backends.base import BackendOptions
from dydit.runtime.bulk.finished import LATENTS, Run, facts, find_damage, write_pictures, write_result
from dydit.runtime.bulk.run_folder import SUMMARY, RunFolder
from dydit.runtime.bulk.workers import Worker
from dydit.runtime.images.pixels import PictureFormat, require_finite
from dydit.runtime.images.vae_decoder import VaeDecoder
from dydit.runtime.loop import MemoryStore, Progress
from dydit.runtime.noise_source import read_arrays
from dydit.runtime.request import UINT64, make_batches


@dataclass(frozen=True)
class SavedLatents:
    """Latents f32 [N, C, S, S] from a file, as `dydit sample` writes them.

    `labels`: int64 [N], zeros if the file has none. `images`: their indices, 0, 1, ... if the file has none.
    `batch_size`: that of the run. Images of a batch are decoded together; equal batches give equal bits.
    """

    path: Path
    sha256: str
    latents: np.ndarray
    labels: np.ndarray
    images: list[int]
    batch_size: int

    @classmethod
    def read(cls, path: Path) -> SavedLatents:
        """Read a file, or the one in a run's folder. Raises `ConfigError` if anything is wrong with it."""
        if path.is_dir():
            if not (path / LATENTS).is_file():
                raise ConfigError(
                    f"{path} holds no {LATENTS}, which `dydit sample` writes only for a bundle without a decoder; for "
                    "other bundles, write the latents with `dydit sample --latents-out FILE.npz`, and decode that file"
                )
            path = path / LATENTS
        arrays = read_arrays(path, ("latents",), "latents", ("labels", "images"))
        latents = arrays["latents"]
        if latents.ndim != 4 or not np.issubdtype(latents.dtype, np.floating) or 0 in latents.shape:
            raise ConfigError(
                f"{path}: latents are {latents.dtype.name} {list(latents.shape)}, expected floating point "
                "[images, channels, height, width]"
            )
        if latents.shape[2] != latents.shape[3]:
            raise ConfigError(f"{path}: latents are {latents.shape[2]}x{latents.shape[3]}, expected squares")
        count = len(latents)
        images = _numbers(path, "images", arrays.get("images", np.arange(count)), count)
        labels = _numbers(path, "labels", arrays.get("labels", np.zeros(count, np.int64)), count)
        if len(set(images)) < count:
            raise ConfigError(f"{path}: two images have the same index; expected different ones")
        if bad := [image for image, each in zip(images, latents, strict=True) if not np.isfinite(each).all()]:
            raise ConfigError(f"{path}: the latents of image {bad[0]} hold NaN or infinite values; sample them again")
        size = _batch_size(path) or count
        return cls(path, sha256_of(path), latents.astype(np.float32), np.asarray(labels, np.int64), images, size)


def _numbers(path: Path, name: str, array: np.ndarray, count: int) -> list[int]:
    if not np.issubdtype(array.dtype, np.integer) or array.shape != (count,):
        raise ConfigError(
            f"{path}: {name} is {array.dtype.name} {list(array.shape)}, expected integers [{count}], one for each image"
        )
    numbers: list[int] = array.tolist()
    if min(numbers) < 0 or max(numbers) >= UINT64:
        raise ConfigError(f"{path}: {name} holds {min(numbers)}; expected numbers from 0")
    return numbers


def _batch_size(latents: Path) -> int | None:
    """The batch size of the run whose folder holds the file; None for a file elsewhere."""
    try:
        size = json.loads((latents.parent / SUMMARY).read_text(encoding="utf-8"))["settings"]["batch_size"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return size if latents.name == LATENTS and type(size) is int and size > 0 else None


@dataclass(frozen=True)
class DecodeSummary:
    """What is in the folder now. `files`: all names except those of single pictures; `seconds`: of this call."""

    out: Path
    images: int
    side: int
    files: tuple[str, ...]
    finished_before: bool
    seconds: float


def decode_to_folder(
    saved: SavedLatents,
    decoder: Path,
    entry: VaeEntry,
    out: Path,
    npz: bool = False,
    options: BackendOptions | None = None,
    progress: Progress | None = None,
) -> DecodeSummary:
    """Decode latents into pictures in `out`. A killed call is resumed; a finished folder is left as it is.

    `decoder`: the folder with the graph that `entry` describes. `progress(done, total)` counts pictures. Raises
    `BackendError` as `VaeDecoder` does, `OutputError` if `out` holds something else or cannot be written.
    """
    started, options = time.perf_counter(), options or BackendOptions()
    settings = {
        "latents_sha256": saved.sha256,
        "vae": entry.model_dump(mode="json"),
        "vae_sha256": sha256_of(decoder / VAE_WEIGHTS),
        "device": options.device,
        "npz": npz,
    }
    folder = RunFolder(out, settings)
    pictures = PictureFormat(3, saved.latents.shape[2] * entry.upscale, True)
    _, *shape = saved.latents.shape
    batches = make_batches(saved.labels.tolist(), saved.images, saved.batch_size)
    run = Run((shape[0], shape[1], shape[2]), pictures, batches, None, settings, npz, None)

    def summary(files: list[str], before: bool) -> DecodeSummary:
        seconds = time.perf_counter() - started
        return DecodeSummary(out, len(saved.images), pictures.side, tuple(files), before, seconds)

    known = folder.summary()
    if known is not None and not find_damage(out, run, known):
        folder.clear()
        return summary(known["files"], True)
    vae = VaeDecoder(decoder, entry, options)
    store = MemoryStore(
        {i: State(saved.latents[each.first : each.first + len(each.images)]) for i, each in enumerate(batches)}
    )
    with folder.finishing(repair=True) if known is not None else _one_decoder(folder) as ours:
        if not ours:
            raise OutputError(f"another process is decoding into {out}; wait for it")
        write_pictures(
            out,
            pictures,
            batches,
            store,
            lambda samples: require_finite(vae.decode(samples)),
            range(len(batches)),
            progress,
        )
        for file in run.results(out):
            write_result(out, run, store, file)
        known = facts(out, run, 0)
        folder.finish(known)
    folder.clear()
    return summary(known["files"], False)


@contextlib.contextmanager
def _one_decoder(folder: RunFolder) -> Iterator[bool]:
    """Reserve the folder of a run for one process; yields False if another process decodes into it."""
    with folder.open(Worker()), folder.finishing() as ours:
        yield ours
