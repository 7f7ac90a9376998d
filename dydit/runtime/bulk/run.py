"""`dydit sample`: samples one image or fifty thousand into a folder, and resumes an interrupted run.

The folder then holds `000000.png`, ... (numbered by image index), `grid.png` (the first 100), `samples.json` (settings
and facts), and on request `samples.npz` (`arr_0` uint8 [N, S, S, 3], which FID evaluators read, and `arr_1` int64
labels). For a latent model without a decoder it holds `latents.npz` (`latents` f32 [N, C, S, S], `labels` int64,
`images` uint64) and no pictures. On machines of one kind the settings decide the content bit for bit, however often the
run was interrupted and however many workers took part. The number of CPU threads is one of the settings: a matrix
product that several threads share may add in another order. So a run must be resumed with the same number of threads.

A run goes chunk by chunk (`dydit.runtime.loop.chunk_size`): some batches are sampled, then their pictures are written,
a few at a time. A picture is written atomically, and the result files are made from the pictures. On a finished run,
the same command checks that everything is there and undamaged, and repairs the rest: pictures from latents if a file
has them, else by sampling their batches again.

Workers (`dydit.runtime.bulk.workers`) share the batches of one run; each samples its own batches and writes their
pictures. The last worker to finish writes the result files; if two finish at once, a lock decides which. No worker
waits for another. Batches of a killed worker are sampled when it is started again, or by any number of workers once the
others have ended. Unfinished result files are written by any worker that is started again.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dydit.bundle.bundle import Bundle
from dydit.errors import ConfigError
from dydit.files import require_absent, user_path
from dydit.models.config import UserPath
from dydit.runtime.backends.base import Backend, BackendOptions
from dydit.runtime.backends.registry import deciding_threads, open_backend
from dydit.runtime.bulk.finished import (
    LATENTS,
    Run,
    facts,
    find_damage,
    has_picture,
    restore_latents,
    write_pictures,
    write_result,
)
from dydit.runtime.bulk.run_folder import FolderStore, RunFolder, ShareStore, agreed_backend, begun_backend
from dydit.runtime.bulk.workers import Worker
from dydit.runtime.images.pixels import ToPixels, picture_format
from dydit.runtime.loop import Progress, StepRunner, WholeRuns, chunk_size, packing_pays, sample
from dydit.runtime.noise_source import NoiseFile, SeededNoise
from dydit.runtime.request import Batch, SampleRequest, check_batch_size, check_labels, make_batches
from dydit.runtime.resident import ResidentSubnets
from dydit.validation import Strict

RESIDENT = 2  # a run uses each subnetwork once per chunk
ChooseBackend = Callable[[Run], str]
"""Says which backend samples a run. The run's settings do not have it yet."""


class OutputOptions(Strict):
    """What to write besides the pictures: `npz` for evaluators; `latents_out`: an `.npz` file for the latents."""

    npz: bool = False
    latents_out: UserPath | None = None


@dataclass(frozen=True)
class SampleSummary:
    """What is in the folder now.

    `files`: all names except those of single pictures. `finished`: whether the run is complete; if not, other workers
    are still busy, `images` and `repeated_steps` are of this worker alone, and `files` is empty. `finished_before`:
    the run was complete and undamaged already, and nothing was done. `repeated_steps`: steps run again at full
    capacity, over the whole run. `seconds`: sampling, in this call; `picture_seconds`: decoding and writing pictures,
    in this call. `note`: a remark for the reader, or empty.
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
class _Work:
    """A run in its folder, the backend that samples it, and the callbacks for progress."""

    folder: RunFolder
    run: Run
    worker: Worker
    engine: Backend
    to_pixels: ToPixels
    progress: Progress | None
    picture_progress: Progress | None
    announce: Callable[[str], None] | None

    @property
    def segments(self) -> int:
        return len(self.engine.bundle.manifest.plan.segments)

    def sample(self, store: FolderStore, members: Sequence[int]) -> tuple[float, float]:
        """Sample some batches of the run and write their pictures; returns the seconds of both."""
        run, own, picture_seconds = self.run, ShareStore(store, members), 0.0
        batches = [run.batches[index] for index in members]

        def finished(done: range) -> None:
            nonlocal picture_seconds
            if run.pictures is not None:
                started = time.perf_counter()
                write_pictures(self.folder.out, run.pictures, batches, own, self.to_pixels, done, self.picture_progress)
                picture_seconds += time.perf_counter() - started

        with ResidentSubnets(self.engine, RESIDENT) as subnets:
            # The largest batch of the whole run: a worker that has only the last, smaller batch must run it alike.
            most = max(len(batch.images) for batch in run.batches)
            runner = StepRunner(self.engine, subnets, np.unique(run.labels), run.settings["cfg_scale"], most)
            chunk = self._chunk(batches, runner)
            assert run.noise is not None
            stats = sample(runner, batches, run.noise, own, self.progress, chunk, finished)
        return stats.seconds, picture_seconds

    def _chunk(self, batches: list[Batch], runner: StepRunner) -> int:
        """How many batches are sampled to their end together; announces when pictures will appear."""
        run, manifest = self.run, self.engine.bundle.manifest
        size = max((len(batch.images) for batch in run.batches), default=1)
        labels, guided = len(np.unique(run.labels)), runner.guidance.guided
        chunk = chunk_size(manifest, size, labels, guided, self.engine.options.device)
        if self.announce and run.pictures is not None and len(batches) > 1:
            images = sum(len(batch.images) for batch in batches)
            whole = isinstance(self.engine, WholeRuns) or chunk >= len(batches)
            when = (
                f"when all {images} images are sampled" if whole else f"after every {chunk * size} of {images} images"
            )
            self.announce(f"pictures appear in {self.folder.out} {when}")
        return chunk


def sample_to_folder(
    bundle: Bundle,
    request: SampleRequest,
    out: Path,
    outputs: OutputOptions | None = None,
    backend: str | ChooseBackend = "onnxruntime",
    options: BackendOptions | None = None,
    progress: Progress | None = None,
    picture_progress: Progress | None = None,
    worker: Worker | None = None,
    announce: Callable[[str], None] | None = None,
) -> SampleSummary:
    """Sample `request`, or a worker's share of it, into `out`.

    Called again after a kill, it resumes the run. Called on a finished run, it repairs what is missing or damaged, and
    changes nothing else. `backend`: its name, or a function that chooses it, which is called only where a run begins: a
    run keeps the backend that it began with. `progress(done, total)` counts steps of a batch,
    `picture_progress(done, total)` pictures; `announce` gets a line that says when pictures will appear. Raises
    `ConfigError` for a request that does not fit the bundle, `BackendError` as backends do, and `OutputError` if `out`
    holds something else, cannot be written, or another process has this worker's number.
    """
    outputs, options, worker = outputs or OutputOptions(), options or BackendOptions(), worker or Worker()
    if outputs.npz and picture_format(bundle.manifest) is None:
        raise ConfigError(
            f"--npz needs pictures, but this model samples latents of {bundle.manifest.model.in_channels} channels and "
            "the bundle has no decoder; export again with --vae, or add a decoder with `dydit attach-vae`"
        )
    run = _plan_run(bundle, request, outputs, options)
    out = user_path(out)
    if not isinstance(backend, str):
        backend = _agreed_backend(out, run, backend, worker)
    settings = {**run.settings, "backend": backend, "threads": deciding_threads(backend, options)}
    run = dataclasses.replace(run, settings=settings)
    state = RunFolder(out, run.settings)
    fresh = state.fresh  # before the summary is read: a run that others finish in between is not fresh
    known = state.summary()
    if known is not None and not find_damage(state.out, run, known):
        summary = _finished_before(state, run, worker, known)
    else:
        if known is None and fresh and outputs.latents_out is not None:
            require_absent(outputs.latents_out)
        # Of the whole run, not of the share: the result must not depend on the number of workers.
        packed = options.packed or packing_pays(bundle.manifest, len(run.batches))
        engine = open_backend(backend, bundle, dataclasses.replace(options, packed=packed))
        work = _Work(state, run, worker, engine, ToPixels(engine), progress, picture_progress, announce)
        if known is not None:
            summary = _repair(work, known)
        else:
            with state.open(worker):
                summary = _sample_share(work)
    if summary.finished:
        state.clear()
    return summary


def _agreed_backend(out: Path, run: Run, choose: ChooseBackend, worker: Worker) -> str:
    """The backend of a run whose user chose none: that with which it began, or else what `choose` says."""
    known = begun_backend(out)
    if known is None:  # what would end the run anyway is found before the choice, which may take a while
        state = RunFolder(out, run.settings)
        if state.summary() is None and state.fresh and run.latents_out is not None:
            require_absent(run.latents_out)
        known = agreed_backend(out, partial(choose, run), worker)
    return known


def _sample_share(work: _Work) -> SampleSummary:
    """Sample a worker's share, write its pictures, and, if all other batches are done, the result files."""
    folder, run, worker = work.folder, work.run, work.worker
    store, share = FolderStore(folder, run.batches, run.shape), worker.share(len(run.batches))
    for index in share:
        store.done(index)
    # Read after the batches were looked up: their files are removed once there is a summary, and not before.
    if (known := folder.summary()) is not None:
        return _finished_before(folder, run, worker, known)
    seconds, picture_seconds = work.sample(store, share)
    own = SampleSummary(
        out=folder.out,
        worker=str(worker),
        images=sum(len(run.batches[index].images) for index in share),
        files=(),
        finished=False,
        finished_before=False,
        repeated_steps=store.repeated_steps(share),
        seconds=seconds,
        picture_seconds=picture_seconds,
        note=f"worker {worker} has sampled its images, but the run is not finished; the worker that finishes last "
        "writes the results",
    )
    if not _others_done(work, store, share):
        return own
    with folder.finishing() as ours:
        if not ours:
            return dataclasses.replace(
                own, note=f"worker {worker} has sampled its images; another worker writes the results"
            )
        started = time.perf_counter()
        for file in run.results(folder.out):
            write_result(folder.out, run, store, file)
        known = facts(folder.out, run, store.repeated_steps(range(len(run.batches))))
        folder.finish(known)
    return dataclasses.replace(
        own,
        images=len(run.images),
        files=tuple(known["files"]),
        finished=True,
        repeated_steps=known["repeated_steps"],
        picture_seconds=picture_seconds + time.perf_counter() - started,
        note=_note(run),
    )


def _repair(work: _Work, known: dict[str, Any]) -> SampleSummary:
    """Replace what is missing or damaged of a finished run; only one process does so at a time."""
    folder, run = work.folder, work.run
    before = _finished_before(folder, run, work.worker, known)
    with folder.finishing(repair=True) as ours:
        if not ours:
            note = "another process is repairing this run"
            return dataclasses.replace(before, files=(), finished=False, finished_before=False, note=note)
        damage = find_damage(folder.out, run, known)
        store, needed = FolderStore(folder, run.batches, run.shape), damage.batches(run)
        restored = bool(needed) and restore_latents(folder.out, run, damage, store, work.segments)
        seconds, picture_seconds = work.sample(store, needed) if needed else (0.0, 0.0)
        for file in damage.results:
            write_result(folder.out, run, store, file)
        folder.finish(facts(folder.out, run, known["repeated_steps"]))
    how = "from the latents" if restored else "by sampling again" if needed else "from the pictures"
    again = f"these files of the finished run were missing or damaged and have been written again {how}"
    note = _note(run, f"{again}: {damage.names}")
    return dataclasses.replace(
        before, finished_before=False, seconds=seconds, picture_seconds=picture_seconds, note=note
    )


def _others_done(work: _Work, store: FolderStore, share: range) -> bool:
    """Whether the batches of other workers are done, with their pictures."""
    out, pictures = work.folder.out, work.run.pictures
    return all(
        store.done(index) == work.segments
        and (pictures is None or all(has_picture(out, pictures, image) for image in batch.images))
        for index, batch in enumerate(work.run.batches)
        if index not in share
    )


def _plan_run(bundle: Bundle, request: SampleRequest, outputs: OutputOptions, options: BackendOptions) -> Run:
    """The run; its settings are complete but for the backend and its threads."""
    manifest, model = bundle.manifest, bundle.manifest.model
    file = None if request.noise_from is None else NoiseFile.read(request.noise_from, manifest)
    turn = request.labels_for(model) if file is None else _labels_beside(request, file)
    labels = [turn[image % len(turn)] for image in range(request.num or len(turn))]
    check_labels(sorted(set(labels)), manifest)
    size = check_batch_size(request.batch_size, manifest, len(labels))
    images = range(request.first_image, request.first_image + len(labels))
    shape = (model.in_channels, model.input_size, model.input_size)
    settings = {
        "bundle": manifest.digest,
        "steps": manifest.sampling.steps,
        "sampler": manifest.sampling.sampler.value,
        "labels": list(turn),
        "num": len(labels),
        "seed": None if file else request.seed,
        "noise_sha256": file.sha256 if file else None,
        "cfg_scale": model.guidance_scale(request.cfg_scale),
        "first_image": request.first_image,
        "batch_size": size,
        "device": options.device,
        "npz": outputs.npz,
        **({} if bundle.texts is None else {"texts_sha256": bundle.texts.digest}),
        "latents_out": None if outputs.latents_out is None else str(outputs.latents_out.resolve()),
    }
    return Run(
        shape=shape,
        pictures=picture_format(manifest),
        batches=make_batches(labels, images, size),
        noise=file or SeededNoise(request.seed, shape),
        settings=settings,
        npz=outputs.npz,
        latents_out=outputs.latents_out,
    )


def _labels_beside(request: SampleRequest, file: NoiseFile) -> tuple[int, ...]:
    """The label of every image of a noise file. Raises `ConfigError` for a request of others."""
    if request.num not in (None, len(file.labels)):
        raise ConfigError(f"{file.path} holds noise for {len(file.labels)} images, but {request.num} are requested")
    if request.labels not in ((), file.labels):
        raise ConfigError(f"the labels differ from those of {file.path}; remove labels (--labels), or give the same")
    return file.labels


def _finished_before(folder: RunFolder, run: Run, worker: Worker, known: dict[str, Any]) -> SampleSummary:
    """The summary of a run that needs nothing more."""
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
        note=_note(run, "this run was complete already; nothing was changed"),
    )


def _note(run: Run, *notes: str) -> str:
    latents = f"the bundle has no VAE decoder, so the samples are latents, in {LATENTS}; `dydit decode` decodes them"
    return "; ".join([*notes, latents] if run.pictures is None else notes)
