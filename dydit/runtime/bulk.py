"""`dydit sample`: a run of any size into a folder, one image or fifty thousand, resumable at any moment.

The folder then holds `000000.png`, ... (numbered by image index), `grid.png` (the first 100), `samples.json` (settings
and facts), on demand `samples.npz` (`arr_0` uint8 [N, S, S, 3], what FID evaluators read, and `arr_1` int64 labels).
Of a latent model it holds `latents.npz` (`latents` f32 [N, C, S, S], `labels` int64, `images` uint64) and no pictures.
Settings decide the content bit for bit, on one machine, however often the run was interrupted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dydit.bundle.bundle import Bundle
from dydit.errors import ConfigError, OutputError
from dydit.files import require_absent
from dydit.models.config import ModelConfig, Strict
from dydit.runtime.backends.base import BackendOptions
from dydit.runtime.backends.registry import open_backend
from dydit.runtime.images import (
    GRID_IMAGES,
    Streamed,
    make_grid,
    shows_pixels,
    to_rgb,
    to_uint8,
    write_npz,
    write_png,
)
from dydit.runtime.loop import Progress, StepRunner, sample
from dydit.runtime.noise import NoiseFile, NoiseSource, SeededNoise
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
    done. `repeated_steps`: steps run again at full capacity, over the whole run. `seconds`: sampling, in this call.
    `note`: what the reader should know, or empty.
    """

    out: Path
    images: int
    files: tuple[str, ...]
    finished_before: bool
    repeated_steps: int
    seconds: float
    note: str


@dataclass(frozen=True)
class _Run:
    """A request held against a bundle: what will be sampled, and what identifies it."""

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
) -> SampleSummary:
    """Sample `request` into `out`; called again after a kill, it goes on, and after the end it changes nothing.

    `progress(done, total)` counts steps of a batch. Raises `ConfigError` for a request that does not fit the bundle,
    `BackendError` as backends do, and `OutputError` where `out` holds something else or cannot be written.
    """
    outputs, options = outputs or OutputOptions(), options or BackendOptions()
    model = bundle.manifest.model
    if outputs.npz and not shows_pixels(model):
        raise ConfigError(f"--npz needs pictures, but this model samples latents of {model.in_channels} channels")
    run = _plan_run(bundle, request, outputs, backend, options)
    folder = RunFolder(out, run.settings)
    if (known := folder.summary()) is not None:
        return _finished_before(folder, run, known, model)
    if folder.fresh and outputs.latents_out is not None:
        require_absent(outputs.latents_out)
    steps_per_load = len(run.batches) * bundle.manifest.sampling.steps / len(bundle.manifest.plan.segments)
    packed = options.packed or steps_per_load >= PACKED_FROM_STEPS
    engine = open_backend(backend, bundle, dataclasses.replace(options, packed=packed))
    with folder.open():
        if (known := folder.summary()) is not None:
            return _finished_before(folder, run, known, model)
        store = FolderStore(folder, run.batches, (model.in_channels, model.input_size, model.input_size))
        with ResidentSubnets(engine, RESIDENT) as subnets:
            runner = StepRunner(engine, subnets, np.unique(run.labels), request.cfg_scale)
            stats = sample(runner, run.batches, run.noise, store, progress)
        files = _write_results(out, run, store, model, outputs)
        facts = {"images": len(run.images), "files": files, "repeated_steps": store.repeated_steps}
        folder.finish(facts)
    return SampleSummary(
        out, len(run.images), tuple(files), False, store.repeated_steps, stats.seconds, _note(model, False)
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
    return _Run(make_batches(labels, images, size), file or SeededNoise(request.seed, shape), settings)


def _labels(request: SampleRequest, file: NoiseFile | None) -> list[int]:
    """The label of every image."""
    if file is None:
        return [request.labels[i % len(request.labels)] for i in range(request.images)]
    if request.num not in (None, len(file.labels)):
        raise ConfigError(f"{file.path} holds noise for {len(file.labels)} images, {request.num} are asked for")
    if request.labels not in ((), file.labels):
        raise ConfigError(f"the labels differ from those of {file.path}; leave --labels away, or give the same")
    return list(file.labels)


def _write_results(out: Path, run: _Run, store: FolderStore, model: ModelConfig, outputs: OutputOptions) -> list[str]:
    """Write everything but `samples.json`; returns the names in `out`, without the single pictures."""
    if not shows_pixels(model):
        _write_latents(out / LATENTS, run, store, model)
        files = [LATENTS]
    else:
        _write_pictures(out, run, store)
        files = [GRID]
    if outputs.npz:
        shape = (len(run.images), model.input_size, model.input_size, 3)
        pictures = Streamed("uint8", shape, (to_rgb(to_uint8(x)) for x in _latents(run, store)))
        write_npz(out / NPZ, {"arr_0": pictures, "arr_1": _whole("int64", run.labels)})
        files.append(NPZ)
    if outputs.latents_out is not None:
        _write_latents(outputs.latents_out, run, store, model)
    return files


def _latents(run: _Run, store: FolderStore) -> Iterator[np.ndarray]:
    return (store.load(index) for index in range(len(run.batches)))


def _write_pictures(out: Path, run: _Run, store: FolderStore) -> None:
    """One PNG for each image, and the grid. What an interrupted call wrote is complete and stays."""
    first: list[np.ndarray] = []
    for batch, latents in zip(run.batches, _latents(run, store), strict=True):
        for image, pixels in zip(batch.images, to_uint8(latents), strict=True):
            if not (file := out / picture_name(image)).exists():
                write_png(file, pixels)
            if len(first) < GRID_IMAGES:
                first.append(pixels)
    write_png(out / GRID, make_grid(first))


def _write_latents(file: Path, run: _Run, store: FolderStore, model: ModelConfig) -> None:
    shape = (len(run.images), model.in_channels, model.input_size, model.input_size)
    arrays = {
        "latents": Streamed("float32", shape, _latents(run, store)),
        "labels": _whole("int64", run.labels),
        "images": _whole("uint64", np.asarray(run.images, np.uint64)),
    }
    write_npz(file, arrays)


def _whole(dtype: str, array: np.ndarray) -> Streamed:
    return Streamed(dtype, array.shape, [array])


def picture_name(image: int) -> str:
    """The file of an image, by its index."""
    return f"{image:06d}.png"


def _finished_before(folder: RunFolder, run: _Run, known: dict[str, Any], model: ModelConfig) -> SampleSummary:
    """The summary of a run that needs nothing more; its working files, if a kill left any, go."""
    names = [*known["files"], *(picture_name(image) for image in run.images if shows_pixels(model))]
    missing = [name for name in names if not (folder.out / name).is_file()]
    if missing:
        raise OutputError(
            f"{folder.out} is a finished run, but {missing[0]} is gone; remove the folder and sample again"
        )
    folder.clear()
    return SampleSummary(
        folder.out, len(run.images), tuple(known["files"]), True, known["repeated_steps"], 0.0, _note(model, True)
    )


def _note(model: ModelConfig, finished: bool) -> str:
    notes = ["this run was complete already; nothing was changed"] if finished else []
    if not shows_pixels(model):
        notes.append(f"the bundle has no VAE decoder, so the samples are latents, in {LATENTS}")
    return "; ".join(notes)
