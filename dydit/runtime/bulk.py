"""`dydit sample`: a run of any size into a folder, one image or fifty thousand, resumable at any moment.

The folder then holds `000000.png`, ... (numbered by image index), `grid.png` (the first 100), `samples.json` (settings
and facts), on demand `samples.npz` (`arr_0` uint8 [N, S, S, 3], what FID evaluators read, and `arr_1` int64 labels).
Of a latent model without a decoder it holds `latents.npz` (`latents` f32 [N, C, S, S], `labels` int64, `images` uint64)
and no pictures. Settings decide the content bit for bit, on machines of one kind, however often the run was interrupted
and however many workers made it.

Pictures are made after sampling, a few at a time; each is complete once it is there, and the rest is read from them.

Workers (`dydit.runtime.workers`) make the batches of one run, each those of its own share, with their pictures. One
that is through and finds that all others are, too, writes what is made of all images; where two find it at once, a lock
says which, and the other leaves. Nobody waits for anybody. What a killed worker left is made when it is started again,
or by any number of workers once the others ended; results that nobody wrote to the end, by any worker started again.
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
from dydit.models.config import Strict, UserPath
from dydit.runtime.backends.base import Backend, BackendOptions
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
from dydit.runtime.loop import LatentStore, Progress, StepRunner, sample
from dydit.runtime.noise import NoiseFile, NoiseSource, SeededNoise
from dydit.runtime.pixels import PictureFormat, ToPixels, picture_format
from dydit.runtime.request import Batch, SampleRequest, check_batch_size, check_labels, make_batches
from dydit.runtime.resident import ResidentSubnets
from dydit.runtime.run_folder import FolderStore, RunFolder, ShareStore
from dydit.runtime.workers import Worker

GRID, NPZ, LATENTS = "grid.png", "samples.npz", "latents.npz"
RESIDENT = 2  # a run passes each subnetwork once
PACKED_FROM_STEPS = 12


class OutputOptions(Strict):
    """What to write beside the pictures: `npz` for evaluators, `latents_out` the latents as an `.npz` elsewhere."""

    npz: bool = False
    latents_out: UserPath | None = None


@dataclass(frozen=True)
class SampleSummary:
    """What is in the folder now.

    `files`: all names but those of the single pictures. `finished`: this call wrote the results, or found them; else
    other workers have something to do yet, `images` and `repeated_steps` are of this worker alone, and `files` is
    empty. `finished_before`: the run was complete already and nothing was done. `repeated_steps`: steps run again at
    full capacity, over the whole run. `seconds`: sampling, in this call; `picture_seconds`: decoding and writing
    pictures, in this call. `note`: what the reader should know, or empty.
    """

    out: Path
    worker: str
    images: int
    files: tuple[str, ...]
    finished: bool
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
    worker: Worker | None = None,
) -> SampleSummary:
    """Sample `request` into `out`, or a worker's share of it; called again after a kill, it goes on, and after the end
    it changes nothing.

    `progress(done, total)` counts steps of a batch; after them `picture_progress(done, total)` counts pictures. Raises
    `ConfigError` for a request that does not fit the bundle, `BackendError` as backends do, and `OutputError` where
    `out` holds something else, cannot be written, or another process has this worker's place.
    """
    outputs, options, worker = outputs or OutputOptions(), options or BackendOptions(), worker or Worker()
    if outputs.npz and picture_format(bundle.manifest) is None:
        raise ConfigError(
            f"--npz needs pictures, but this model samples latents of {bundle.manifest.model.in_channels} channels and "
            "the bundle has no decoder; give `dydit export` a --vae"
        )
    run = _plan_run(bundle, request, outputs, backend, options)
    folder = RunFolder(out, run.settings)
    fresh = folder.fresh  # asked before the summary: a run that others finish in between is not fresh
    if (known := folder.summary()) is not None:
        summary = _finished_before(folder, run, worker, known)
    else:
        if fresh and outputs.latents_out is not None:
            require_absent(outputs.latents_out)
        # By the whole run, not by the share: what depends on it must not depend on the number of workers.
        steps_per_load = len(run.batches) * bundle.manifest.sampling.steps / len(bundle.manifest.plan.segments)
        packed = options.packed or steps_per_load >= PACKED_FROM_STEPS
        engine = open_backend(backend, bundle, dataclasses.replace(options, packed=packed))
        to_pixels = ToPixels(engine)
        with folder.open(worker):
            summary = _make_share(folder, run, worker, engine, to_pixels, outputs, progress, picture_progress)
    if summary.finished:
        folder.clear()
    return summary


def _make_share(
    folder: RunFolder,
    run: _Run,
    worker: Worker,
    engine: Backend,
    to_pixels: ToPixels,
    outputs: OutputOptions,
    progress: Progress | None,
    picture_progress: Progress | None,
) -> SampleSummary:
    """Sample a worker's share, make its pictures, and, where all other batches are done, the results."""
    store, share = FolderStore(folder, run.batches, run.shape), worker.share(len(run.batches))
    own = ShareStore(store, share)
    # Asked after the batches were looked up: their files go when there is a summary, and not before.
    if (known := folder.summary()) is not None:
        return _finished_before(folder, run, worker, known)
    batches = [run.batches[index] for index in share]
    with ResidentSubnets(engine, RESIDENT) as subnets:
        runner = StepRunner(engine, subnets, np.unique(run.labels), run.settings["cfg_scale"])
        stats = sample(runner, batches, run.noise, own, progress)
    started = time.perf_counter()
    if run.pictures is not None:
        _write_pictures(folder.out, batches, own, to_pixels, picture_progress)
    made = SampleSummary(
        out=folder.out,
        worker=str(worker),
        images=sum(len(batch.images) for batch in batches),
        files=(),
        finished=False,
        finished_before=False,
        repeated_steps=store.repeated_steps(share),
        seconds=stats.seconds,
        picture_seconds=time.perf_counter() - started,
        note=f"images of this worker, {worker}; the run is not finished: the last of its workers writes the results",
    )
    if not _others_done(folder, run, store, share, len(engine.bundle.manifest.plan.segments)):
        return made
    with folder.finishing() as ours:
        if not ours:
            return dataclasses.replace(made, note=f"images of this worker, {worker}; another one writes the results")
        files = _write_results(folder.out, run, store, outputs)
        repeated = store.repeated_steps(range(len(run.batches)))
        folder.finish({"images": len(run.images), "files": files, "repeated_steps": repeated})
    return dataclasses.replace(
        made,
        images=len(run.images),
        files=tuple(files),
        finished=True,
        repeated_steps=repeated,
        picture_seconds=time.perf_counter() - started,
        note=_note(run, False),
    )


def _others_done(folder: RunFolder, run: _Run, store: FolderStore, share: range, segments: int) -> bool:
    """Whether the batches that are not of the share are through, with their pictures."""
    return all(
        store.done(index) == segments
        and (run.pictures is None or all((folder.out / picture_name(image)).is_file() for image in batch.images))
        for index, batch in enumerate(run.batches)
        if index not in share
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
    out: Path, batches: list[Batch], store: LatentStore, to_pixels: ToPixels, progress: Progress | None = None
) -> None:
    """One PNG for each image. What an interrupted call wrote is complete and stays.

    Which images are decoded together depends on the run alone, so that a resumed one makes the same pictures.
    """
    done, total = 0, sum(len(batch.images) for batch in batches)
    for index, batch in enumerate(batches):
        for first in range(0, len(batch.images), to_pixels.at_once):
            few = slice(first, first + to_pixels.at_once)
            files = [out / picture_name(image) for image in batch.images[few]]
            if not all(file.exists() for file in files):
                for file, picture in zip(files, to_uint8(to_pixels(store.load(index)[few])), strict=True):
                    if not file.exists():
                        write_png(file, picture)
            done += len(files)
            if progress:
                progress(done, total)


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


def _finished_before(folder: RunFolder, run: _Run, worker: Worker, known: dict[str, Any]) -> SampleSummary:
    """The summary of a run that needs nothing more."""
    pictures = () if run.pictures is None else map(picture_name, run.images)
    missing = [name for name in (*known["files"], *pictures) if not (folder.out / name).is_file()]
    if missing:
        raise OutputError(
            f"{folder.out} is a finished run, but {missing[0]} is gone; remove the folder and sample again"
        )
    return SampleSummary(
        out=folder.out,
        worker=str(worker),
        images=len(run.images),
        files=tuple(known["files"]),
        finished=True,
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
