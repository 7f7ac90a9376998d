"""The settings of `dydit prepare`, and `prepare.json`, which says what a folder has been prepared with so far."""

from __future__ import annotations

import hashlib
import json
from enum import StrEnum
from pathlib import Path
from typing import Literal

from pydantic import Field

from dydit.data.dataset_folder import StoredFile
from dydit.data.images import Crop
from dydit.data.sources.opened import SourceKind
from dydit.data.sources.source import Choices, Source
from dydit.errors import ConfigError, OutputError, one_line
from dydit.files import write_json
from dydit.models.config import parse_config
from dydit.validation import Strict, value_text

STATE = "prepare.json"
LARGEST_SHARD = 10_000
SHARD_BYTES = 384 << 20
"""Of pixels, or of latents of four channels and an eighth of the side; three times as much is in memory."""
WITH_CAPTIONS = 1_000
"""Images in a shard with captions, whose embeddings are larger than images: 2 MB for five of 60 tokens of T5-XXL."""


class OnError(StrEnum):
    """What to do about an image that cannot be read."""

    STOP = "stop"
    SKIP = "skip"


class PrepareSettings(Strict):
    """All that decides what is written.

    None stands for what the source says: `size` and `channels` those of its images, `mirror` where a mirrored image is
    one of its class. `batch_size`: images, or captions, that are encoded at once; it decides the last bits of latents.
    """

    source: str
    kind: SourceKind | None = None
    split: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    caption_column: str | None = None
    limit: int | None = Field(default=None, gt=0)
    size: int | None = Field(default=None, gt=0)
    channels: Literal[1, 3] | None = None
    crop: Crop = Crop.CENTER
    mirror: bool | None = None
    on_error: OnError = OnError.STOP
    vae: str | None = None
    vae_scale: float | None = None
    vae_shift: float | None = None
    text_encoder: str | None = None
    text_tokens: int = Field(default=120, gt=0)
    shard_size: int | None = Field(default=None, gt=0)
    batch_size: int = Field(default=32, gt=0)
    device: str = "cpu"

    @property
    def choices(self) -> Choices:
        """What is said about the source."""
        return Choices(self.split, self.image_column, self.label_column, self.caption_column)


class Job(Strict):
    """Settings without gaps. `records`: images to prepare; `sample`: a hash of the names of some of them."""

    settings: PrepareSettings
    size: int
    channels: int
    mirror: bool
    shard_size: int
    records: int
    sample: str

    def differences(self, other: Job) -> list[str]:
        """What is not the same in another job, in words."""
        words = []
        stated, before = (each.settings.model_dump(mode="json") for each in (self, other))
        for name in stated:
            # Where a setting was left to the source, what it came to counts.
            values = [getattr(other, name, before[name]), getattr(self, name, stated[name])]
            if values[0] != values[1]:
                was, now = ("not given" if each is None else value_text(each) for each in values)
                words.append(f"{name.replace('_', '-')} was {was}, and is now {now}")
        if not words and self.records != other.records:
            words.append(f"the source had {other.records:,} images, and has now {self.records:,}")
        if not words and self.sample != other.sample:
            words.append("the images of the source have other names")
        return words


class FinishedShard(Strict):
    """A shard that is written. `stored`: None if none of its images could be read. `cut`: captions that were cut."""

    stored: StoredFile | None
    skipped: tuple[tuple[str, str], ...] = ()
    cut: int = 0


class State(Strict):
    """What `prepare.json` says: the job, and the shards that are written."""

    job: Job
    shards: tuple[FinishedShard, ...] = ()


def job_of(settings: PrepareSettings, source: Source) -> Job:
    """The job on a source. Raises `ConfigError` if something is missing, or does not fit the source."""
    size = settings.size or source.size
    if size is None:
        raise ConfigError(f"the images of {settings.source} have different sizes; give --size")
    channels = settings.channels or (3 if settings.vae else source.channels or 3)
    if settings.vae and channels != 3:
        raise ConfigError("an autoencoder encodes RGB; remove --channels 1, or --vae")
    for name in ("vae_scale", "vae_shift"):
        if getattr(settings, name) is not None and settings.vae is None:
            raise ConfigError(f"--{name.replace('_', '-')} is for latents; give --vae")
    if settings.text_encoder and not source.captioned:
        raise ConfigError(
            f"{settings.source} has no captions to encode; remove --text-encoder, or give captions: --caption-column, "
            "metadata.jsonl, or a text file beside each image"
        )
    image_bytes = -(-size * size // 2) if settings.vae else channels * size * size
    shard_size = min(LARGEST_SHARD, max(1, SHARD_BYTES // image_bytes))
    shard_size = min(shard_size, WITH_CAPTIONS) if settings.text_encoder else shard_size
    records = min(len(source), settings.limit or len(source))
    if not records:
        raise ConfigError(f"{settings.source} holds no images")
    return Job(
        settings=settings,
        size=size,
        channels=channels,
        mirror=source.mirrors if settings.mirror is None else settings.mirror,
        shard_size=settings.shard_size or shard_size,
        records=records,
        sample=_sample(source, records),
    )


def _sample(source: Source, records: int) -> str:
    """A hash of the names of up to 64 records, from the first to the last one."""
    places = sorted({at * (records - 1) // 63 for at in range(64)})
    return hashlib.sha256("\n".join(source.record(at).name for at in places).encode()).hexdigest()


def read_state(folder: Path) -> State | None:
    """`prepare.json` of a folder; None if there is none. Raises `OutputError` if it is damaged."""
    path = folder / STATE
    if not path.is_file():
        return None
    try:
        return parse_config(State, json.loads(path.read_text(encoding="utf-8")), str(path))
    except (ValueError, RecursionError, ConfigError) as error:
        raise OutputError(f"{path} is damaged ({one_line(error)}); remove {folder} and run again") from error


def write_state(folder: Path, state: State) -> None:
    """Write `prepare.json`."""
    write_json(folder / STATE, state.model_dump(mode="json"))
