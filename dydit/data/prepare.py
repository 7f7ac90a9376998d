"""Prepares a folder of training data: the work of `dydit prepare`.

Shards are written one after the other, in the order of the source. A shard appears at once, under its name, and
`prepare.json` then lists it; `dataset.json` comes last. A process that is killed at any moment leaves shards that the
next run keeps, and the result has the same bytes as that of an undisturbed run.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dydit.data.dataset_folder import (
    EMBEDDINGS,
    INFO,
    NO_CAPTION,
    Captions,
    DatasetInfo,
    StoredFile,
    is_dataset_folder,
    read_info,
)
from dydit.data.decoding import Decoder, Decoding
from dydit.data.latents import LatentEncoder
from dydit.data.prepare_settings import (
    FinishedShard,
    Job,
    OnError,
    PrepareSettings,
    State,
    job_of,
    read_state,
    write_state,
)
from dydit.data.shard_writer import CaptionEncoder, ShardWriter, shard_bytes
from dydit.data.sources.opened import open_source
from dydit.data.sources.source import Source
from dydit.errors import BackendError, ConfigError, OutputError
from dydit.extras import TEXTS, require
from dydit.files import claimed, explained, parents, remove, write_atomic, write_json
from dydit.models.config import Space
from dydit.words import counted

_PART = re.compile(r"\..*\.part")
_SHARD = re.compile(r"shard-\d{5,}\.safetensors")


class Stages(Protocol):
    """What is told how far the work is."""

    def stage(self, title: str, done: int, total: int) -> None:
        """`done` of `total` of the stage `title` are done."""
        ...


@dataclass(frozen=True)
class Prepared:
    """What the folder holds. `cut`: captions that lost their end; `before`: whether it was complete before the call."""

    info: DatasetInfo
    cut: int
    before: bool
    captions_left: bool = False


def prepare(settings: PrepareSettings, folder: Path, workers: int, progress: Stages) -> Prepared:
    """Prepare the folder, or go on with it. `workers`: processes that decode images.

    A script that asks for several needs `if __name__ == "__main__":`, because each imports it.
    Raises `ConfigError` for a source or an image that cannot be read, and `OutputError` if the folder holds something
    else, or was begun with other settings.
    """
    require("dydit prepare", ("safetensors",))
    source = open_source(settings.source, settings.kind, settings.choices)
    job = job_of(settings, source)
    left = source.captioned and settings.text_encoder is None
    state = _state(folder, job)
    if is_dataset_folder(folder):
        return Prepared(read_info(folder), sum(each.cut for each in state.shards), True, left)
    work = _Work(job, source, folder)
    with explained(folder), parents(folder), claimed(folder), _made(folder):
        state = _without_lost_shards(folder, _state(folder, job))
        with Decoder(Decoding(job.size, job.channels, settings.crop), _processes(workers, job.records)) as decoder:
            for number in range(len(state.shards), -(-job.records // job.shard_size)):
                shard = work.shard(number, decoder, progress)
                state = State(job=job, shards=(*state.shards, shard))
                write_state(folder, state)
        info = work.finish(state)
    return Prepared(info, sum(each.cut for each in state.shards), False, left)


def require_device(device: str) -> None:
    """Raise `BackendError` if PyTorch has no such device here."""
    require("encoding on a device", ("torch",))
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise BackendError("PyTorch finds no CUDA device here; remove --device cuda")


class _Work:
    """The models of a job, loaded once, and what they write into the folder."""

    def __init__(self, job: Job, source: Source, folder: Path):
        settings = job.settings
        if settings.vae or settings.text_encoder:
            require_device(settings.device)
        self._job, self._source, self._folder = job, source, folder
        self._latents = self._captions = None
        if settings.vae is not None:
            self._latents = LatentEncoder(settings.vae, settings.vae_scale, settings.vae_shift, settings.device)
            self._side = self._latents.side(job.size)
        if settings.text_encoder is not None:
            require("encoding captions", TEXTS)
            self._captions = CaptionEncoder(
                settings.text_encoder, settings.text_tokens, settings.batch_size, settings.device
            )

    def shard(self, number: int, decoder: Decoder, progress: Stages) -> FinishedShard:
        """Write a shard."""
        job = self._job
        first = number * job.shard_size
        numbers = range(first, min(first + job.shard_size, job.records))
        writer = ShardWriter(self._latents, job.mirror, job.settings.batch_size)
        skipped = []
        for done, (record, pixels) in enumerate(decoder.decoded(map(self._source.record, numbers)), first):
            progress.stage("images", done, job.records)
            captions = record.captions if self._captions is not None else ()
            reason = pixels if isinstance(pixels, str) else None
            if reason is None and self._captions is not None and not captions:
                reason = "it has no caption"
            if reason is None:
                assert not isinstance(pixels, str)
                writer.add(pixels, record.label, captions)
            elif job.settings.on_error is OnError.STOP:
                raise ConfigError(f"{record.name} cannot be used: {reason}; correct it, or give --on-error skip")
            else:
                skipped.append((record.name, reason))
        progress.stage("images", numbers.stop, job.records)
        if not len(writer):
            return FinishedShard(stored=None, skipped=tuple(skipped))
        tensors, cut = writer.contents(
            self._captions, lambda done, total: progress.stage(f"captions of shard {number}", done, total)
        )
        stored = self._write(f"shard-{number:05d}.safetensors", shard_bytes(tensors), len(writer))
        return FinishedShard(stored=stored, skipped=tuple(skipped), cut=cut)

    def finish(self, state: State) -> DatasetInfo:
        """Write the empty caption and `dataset.json`."""
        job, source = self._job, self._source
        shards = tuple(each.stored for each in state.shards if each.stored is not None)
        skipped = tuple(each for shard in state.shards for each in shard.skipped)
        if not shards:
            raise ConfigError(
                f"none of {counted(job.records, 'image')} can be used; the first: {': '.join(skipped[0])}"
            )
        captions = None
        if self._captions is not None:
            (empty,), _ = self._captions.encode([""])
            captions = Captions(
                encoder=self._captions.source,
                tokens=self._captions.tokens,
                channels=self._captions.channels,
                no_caption=self._write(NO_CAPTION, shard_bytes({EMBEDDINGS: empty}), 0),
            )
        shape = (job.channels, job.size, job.size)
        info = DatasetInfo(
            space=Space.PIXELS if self._latents is None else Space.LATENTS,
            shape=shape if self._latents is None else (self._latents.channels, self._side, self._side),
            classes=source.classes,
            class_names=source.class_names,
            mirrored=job.mirror,
            not_mirrored=source.not_mirrored if job.mirror else (),
            autoencoder=job.settings.vae,
            captions=captions,
            source=job.settings.source,
            shards=shards,
            skipped=skipped,
        )
        write_json(self._folder / INFO, info.model_dump(mode="json"))
        return info

    def _write(self, name: str, data: bytes, images: int) -> StoredFile:
        write_atomic(self._folder / name, data)
        return StoredFile(file=name, images=images, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def _processes(workers: int, records: int) -> int:
    """As many processes as are worth their start: one for each 64 images."""
    return max(1, min(workers, records // 64))


def _state(folder: Path, job: Job) -> State:
    """What was done of the job in the folder. Raises `OutputError` if the folder is of something else."""
    state = read_state(folder)
    if state is None:
        if folder.exists() and (not folder.is_dir() or any(not _own_name(entry.name) for entry in folder.iterdir())):
            raise OutputError(f"{folder} exists and was not begun by dydit prepare; choose another output")
        return State(job=job)
    if differences := job.differences(state.job):
        raise OutputError(
            f"{folder} was prepared with other settings ({'; '.join(differences)}); run the same command again, or "
            "choose another output"
        )
    return state


def _own_name(name: str) -> bool:
    """Whether a file may be left of a run that was killed before its first shard was listed."""
    return bool(_PART.fullmatch(name) or _SHARD.fullmatch(name))


def _without_lost_shards(folder: Path, state: State) -> State:
    """The state up to the first shard that is not there as it was written. What was half written is removed."""
    for entry in folder.iterdir():
        if _PART.fullmatch(entry.name):
            remove(entry)
    kept = []
    for shard in state.shards:
        if shard.stored is not None:
            path = folder / shard.stored.file
            if not path.is_file() or path.stat().st_size != shard.stored.bytes:
                break
        kept.append(shard)
    return State(job=state.job, shards=tuple(kept))


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make the folder for the block. A new one is removed again where the block fails before the first shard."""
    existed = folder.is_dir()
    folder.mkdir(exist_ok=True)
    try:
        yield
    except BaseException:
        if not existed:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
