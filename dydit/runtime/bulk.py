"""`dydit sample`: a run of any size into a folder, one image or fifty thousand, resumable at any moment.

The folder then holds `000000.png`, ... (numbered by image index), `grid.png` (the first 100), `samples.json` (settings
and facts), on demand `samples.npz` (`arr_0` uint8 [N, S, S, 3], what FID evaluators read, and `arr_1` int64 labels).
Of a latent model without a decoder it holds `latents.npz` (`latents` f32 [N, C, S, S], `labels` int64, `images` uint64)
and no pictures. Settings decide the content bit for bit, on one machine, however often the run was interrupted.

Pictures are made after sampling, a few at a time; each is complete once it is there, and the rest is read from them.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dydit.bundle.bundle import Bundle
from dydit.errors import ConfigError, OutputError
from dydit.files import require_absent
from dydit.models.config import Strict
from dydit.runtime.backends.base import BackendOptions
from dydit.runtime.backends.registry import open_backend
from dydit.runtime.images import (
    GRID_IMAGES,
    Streamed,
    make_grid,
    read_png,
    to_rgb,
    to_uint8,
    write_npz,
    write_png,
)
from dydit.runtime.loop import Progress, StepRunner, sample
from dydit.runtime.noise import NoiseFile, NoiseSource, SeededNoise
from dydit.runtime.pixels import PictureFormat, ToPixels, picture_format
from dydit.runtime.request import Batch, SampleRequest, check_batch_size, check_labels, make_batches
from dydit.runtime.resident import ResidentSubnets
from dydit.runtime.run_folder import FolderStore, RunFolder

GRID, NPZ, LATENTS = "grid.png", "samples.npz", "latents.npz"
RESIDENT = 2  # a run passes each subnetwork once
PACKED_FROM_STEPS = 12


class OutputOptions(Strict):
    """What to write beside the pictures: `npz` for evaluators, `latents_out` the latents as an `.npz` elsewhere."""

    npz: bool = False
    latents_out: Path | None = None


@dataclass(frozen=True)
class SampleSummary:
    """What is in the folder now.

    `files`: all names but those of the single pictures. `finished_before`: the run was complete already and nothing was
    done. `repeated_steps`: steps run again at full capacity, over the whole run. `seconds`: sampling, in this call;
    `picture_seconds`: decoding and writing pictures, in this call. `note`: what the reader should know, or empty.
    """

    out: Path
    images: int
    files: tuple[str, ...]
    finished_before: bool
    repeated_steps: int
    seconds: float
    picture_seconds: float
    note: str


@dataclass(frozen=True)
class _Run:
    """A request held against a bundle: what will be sampled, what it becomes, and what identifies it.

    `shape`: of an image's latents, [C, S, S].
    """

    shape: tuple[int, int, int]
    pictures: PictureFormat | None
    batches: list[Batch]
    noise: NoiseSource
    settings: dict[str, Any]

    @property
    def images(self) -> list[int]:
        return [image for batch in self.batches for image in batch.images]

    @property
    def labels(self) -> np.ndarray:
        return np.concatenate([batch.labels for batch in self.batches])


def sample_to_folder(
    bundle: Bundle,
    request: SampleRequest,
    out: Path,
    outputs: OutputOptions | None = None,
    backend: str = "onnxruntime",
    options: BackendOptions | None = None,
    progress: Progress | None = None,
    picture_progress: Progress | None = None,
) -> SampleSummary:
    """Sample `request` into `out`; called again after a kill, it goes on, and after the end it changes nothing.

    `progress(done, total)` counts steps of a batch; after them `picture_progress(done, total)` counts pictures. Raises
    `ConfigError` for a request that does not fit the bundle, `BackendError` as backends do, and `OutputError` where
    `out` holds something else or cannot be written.
    """
    outputs, options = outputs or OutputOptions(), options or BackendOptions()
    if outputs.npz and picture_format(bundle.manifest) is None:
        raise ConfigError(
            f"--npz needs pictures, but this model samples latents of {bundle.manifest.model.in_channels} channels and "
            "the bundle has no decoder; give `dydit export` a --vae"
        )
    run = _plan_run(bundle, request, outputs, backend, options)
    folder = RunFolder(out, run.settings)
    if (known := folder.summary()) is not None:
        return _finished_before(folder, run, known)
    if folder.fresh and outputs.latents_out is not None:
        require_absent(outputs.latents_out)
    steps_per_load = len(run.batches) * bundle.manifest.sampling.steps / len(bundle.manifest.plan.segments)
    packed = options.packed or steps_per_load >= PACKED_FROM_STEPS
    engine = open_backend(backend, bundle, dataclasses.replace(options, packed=packed))
    to_pixels = ToPixels(engine)
    with folder.open():
        if (known := folder.summary()) is not None:
            return _finished_before(folder, run, known)
        store = FolderStore(folder, run.batches, run.shape)
        with ResidentSubnets(engine, RESIDENT) as subnets:
            runner = StepRunner(engine, subnets, np.unique(run.labels), request.cfg_scale)
            stats = sample(runner, run.batches, run.noise, store, progress)
        started = time.perf_counter()
        if run.pictures is not None:
            _write_pictures(out, run, store, to_pixels, picture_progress)
        files = _write_results(out, run, store, outputs)
        facts = {"images": len(run.images), "files": files, "repeated_steps": store.repeated_steps}
        folder.finish(facts)
    return SampleSummary(
        out=out,
        images=len(run.images),
        files=tuple(files),
        finished_before=False,
        repeated_steps=store.repeated_steps,
        seconds=stats.seconds,
        picture_seconds=time.perf_counter() - started,
        note=_note(run, False),
    )


def _plan_run(
    bundle: Bundle, request: SampleRequest, outputs: OutputOptions, backend: str, options: BackendOptions
) -> _Run:
    manifest, model = bundle.manifest, bundle.manifest.model
    file = None if request.noise_from is None else NoiseFile.read(request.noise_from, manifest)
    labels = _labels(request, file)
    check_labels(sorted(set(labels)), manifest)
    size = check_batch_size(request.batch_size, manifest, len(labels))
    images = range(request.first_image, request.first_image + len(labels))
    shape = (model.in_channels, model.input_size, model.input_size)
    settings = {
        "bundle": manifest.digest,
        "labels": list(request.labels or labels),
        "num": len(labels),
        "seed": None if file else request.seed,
        "noise_sha256": file.sha256 if file else None,
        "cfg_scale": request.cfg_scale,
        "first_image": request.first_image,
        "batch_size": size,
        "backend": backend,
        "device": options.device,
        "npz": outputs.npz,
        "latents_out": None if outputs.latents_out is None else str(outputs.latents_out.resolve()),
    }
    return _Run(
        shape=shape,
        pictures=picture_format(manifest),
        batches=make_batches(labels, images, size),
        noise=file or SeededNoise(request.seed, shape),
        settings=settings,
    )


def _labels(request: SampleRequest, file: NoiseFile | None) -> list[int]:
    """The label of every image."""
    if file is None:
        return [request.labels[i % len(request.labels)] for i in range(request.images)]
    if request.num not in (None, len(file.labels)):
        raise ConfigError(f"{file.path} holds noise for {len(file.labels)} images, {request.num} are asked for")
    if request.labels not in ((), file.labels):
        raise ConfigError(f"the labels differ from those of {file.path}; leave --labels away, or give the same")
    return list(file.labels)


def _write_pictures(
    out: Path, run: _Run, store: FolderStore, to_pixels: ToPixels, progress: Progress | None = None
) -> None:
    """One PNG for each image. What an interrupted call wrote is complete and stays.

    Which images are decoded together depends on the run alone, so that a resumed one makes the same pictures.
    """
    for index, batch in enumerate(run.batches):
        for first in range(0, len(batch.images), to_pixels.at_once):
            few = slice(first, first + to_pixels.at_once)
            files = [out / picture_name(image) for image in batch.images[few]]
            if not all(file.exists() for file in files):
                for file, picture in zip(files, to_uint8(to_pixels(store.load(index)[few])), strict=True):
                    if not file.exists():
                        write_png(file, picture)
            if progress:
                progress(batch.first + first + len(files), len(run.images))


def _write_results(out: Path, run: _Run, store: FolderStore, outputs: OutputOptions) -> list[str]:
    """Write everything but the pictures and `samples.json`; returns the names in `out`, without the single pictures."""
    if (pictures := run.pictures) is None:
        _write_latents(out / LATENTS, run, store)
        files = [LATENTS]
    else:
        write_png(out / GRID, make_grid(list(_pictures(out, pictures, run.images[:GRID_IMAGES]))))
        files = [GRID]
        if outputs.npz:
            shape = (len(run.images), pictures.side, pictures.side, 3)
            rows = (to_rgb(picture[None]) for picture in _pictures(out, pictures, run.images))
            write_npz(out / NPZ, {"arr_0": Streamed("uint8", shape, rows), "arr_1": _whole("int64", run.labels)})
            files.append(NPZ)
    if outputs.latents_out is not None:
        _write_latents(outputs.latents_out, run, store)
    return files


def _pictures(out: Path, pictures: PictureFormat, images: list[int]) -> Iterator[np.ndarray]:
    """The pictures that were written, uint8 [S, S, channels]; PNG keeps them as they were."""
    return (read_png(out / picture_name(image), pictures.side, pictures.channels) for image in images)


def _write_latents(file: Path, run: _Run, store: FolderStore) -> None:
    arrays = {
        "latents": Streamed("float32", (len(run.images), *run.shape), map(store.load, range(len(run.batches)))),
        "labels": _whole("int64", run.labels),
        "images": _whole("uint64", np.asarray(run.images, np.uint64)),
    }
    write_npz(file, arrays)


def _whole(dtype: str, array: np.ndarray) -> Streamed:
    return Streamed(dtype, array.shape, [array])


def picture_name(image: int) -> str:
    """The file of an image, by its index."""
    return f"{image:06d}.png"


def _finished_before(folder: RunFolder, run: _Run, known: dict[str, Any]) -> SampleSummary:
    """The summary of a run that needs nothing more; its working files, if a kill left any, go."""
    pictures = () if run.pictures is None else map(picture_name, run.images)
    missing = [name for name in (*known["files"], *pictures) if not (folder.out / name).is_file()]
    if missing:
        raise OutputError(
            f"{folder.out} is a finished run, but {missing[0]} is gone; remove the folder and sample again"
        )
    folder.clear()
    return SampleSummary(
        out=folder.out,
        images=len(run.images),
        files=tuple(known["files"]),
        finished_before=True,
        repeated_steps=known["repeated_steps"],
        seconds=0.0,
        picture_seconds=0.0,
        note=_note(run, True),
    )


def _note(run: _Run, finished: bool) -> str:
    notes = ["this run was complete already; nothing was changed"] if finished else []
    if run.pictures is None:
        notes.append(f"the bundle has no VAE decoder, so the samples are latents, in {LATENTS}")
    return "; ".join(notes)
