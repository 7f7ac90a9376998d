"""The output of a sampling run: pictures and result files. Writes them and finds what is missing or damaged.

`samples.json` has the SHA-256 of every result file (`grid.png`, `samples.npz`, `latents.npz`, the file of
`latents_out`). Pictures are verified by the checksums inside PNG.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dydit.diffusion.steps import State
from dydit.errors import OutputError
from dydit.files import sha256_of
from dydit.runtime.images.image_files import (
    GRID_IMAGES,
    Streamed,
    is_picture,
    make_grid,
    read_npz,
    read_png,
    to_rgb,
    to_uint8,
    write_npz,
    write_png,
)
from dydit.runtime.images.pixels import PictureFormat
from dydit.runtime.images.vae_decoder import IMAGES_AT_ONCE
from dydit.runtime.loop import LatentStore, Progress
from dydit.runtime.noise_source import NoiseSource
from dydit.runtime.request import Batch

GRID, NPZ, LATENTS = "grid.png", "samples.npz", "latents.npz"


@dataclass(frozen=True)
class Run:
    """A request checked against a bundle: what will be sampled, what is written, and what identifies the run.

    `shape`: of an image's latents, [C, S, S]. `pictures`: None if the samples stay latents. `noise`: None if the
    latents are given. `npz`, `latents_out`: as in `OutputOptions`.
    """

    shape: tuple[int, int, int]
    pictures: PictureFormat | None
    batches: list[Batch]
    noise: NoiseSource | None
    settings: dict[str, Any]
    npz: bool
    latents_out: Path | None

    @property
    def images(self) -> list[int]:
        """The index of every image."""
        return [image for batch in self.batches for image in batch.images]

    @property
    def labels(self) -> np.ndarray:
        """The label of every image, int64 [N]."""
        return np.concatenate([batch.labels for batch in self.batches])

    def results(self, out: Path) -> list[Path]:
        """The result files, each of which holds all images."""
        names = [LATENTS] if self.pictures is None else [GRID, NPZ] if self.npz else [GRID]
        return [*(out / name for name in names), *([] if self.latents_out is None else [self.latents_out])]

    def holds_latents(self, file: Path) -> bool:
        """Whether a result file holds latents."""
        return file.name == LATENTS or file == self.latents_out


def picture_name(image: int) -> str:
    """The file name of an image, by its index."""
    return f"{image:06d}.png"


def has_picture(out: Path, pictures: PictureFormat, image: int) -> bool:
    """Whether an image's picture exists and is undamaged."""
    return is_picture(out / picture_name(image), pictures.side, pictures.channels)


def write_pictures(
    out: Path,
    pictures: PictureFormat,
    batches: Sequence[Batch],
    store: LatentStore,
    to_pixels: Callable[[np.ndarray], np.ndarray],
    members: Sequence[int],
    progress: Progress | None = None,
) -> None:
    """Write one PNG for each image of the batches `members`. Pictures of an interrupted call are kept.

    Which images are decoded together depends on the run alone, so a resumed run writes the same pictures.
    `progress(done, total)` counts images of all batches.
    """
    done = sum(len(batch.images) for batch in batches[: members[0]]) if members else 0
    total = sum(len(batch.images) for batch in batches)
    for index in members:
        images = batches[index].images
        for first in range(0, len(images), IMAGES_AT_ONCE):
            few = slice(first, first + IMAGES_AT_ONCE)
            missing = [not has_picture(out, pictures, image) for image in images[few]]
            if any(missing):
                decoded = to_uint8(to_pixels(store.load(index).x[few]))
                for image, picture, wanted in zip(images[few], decoded, missing, strict=True):
                    if wanted:
                        write_png(out / picture_name(image), picture)
            done += len(missing)
            if progress:
                progress(done, total)


def write_result(out: Path, run: Run, store: LatentStore, file: Path) -> None:
    """Write one of `run.results`. Raises `OutputError` if `latents_out` exists and holds something else."""
    pictures = run.pictures
    if run.holds_latents(file):
        arrays = {
            "latents": Streamed(
                "float32", (len(run.images), *run.shape), (store.load(index).x for index in range(len(run.batches)))
            ),
            "labels": _whole("int64", run.labels),
            "images": _whole("uint64", np.asarray(run.images, np.uint64)),
        }
        write_npz(file, arrays, replace=file != run.latents_out)
    elif file.name == GRID:
        assert pictures is not None
        write_png(file, make_grid(list(_read_pictures(out, pictures, run.images[:GRID_IMAGES]))))
    else:
        assert pictures is not None
        shape = (len(run.images), pictures.side, pictures.side, 3)
        rows = (to_rgb(picture[None]) for picture in _read_pictures(out, pictures, run.images))
        write_npz(file, {"arr_0": Streamed("uint8", shape, rows), "arr_1": _whole("int64", run.labels)})


def _read_pictures(out: Path, pictures: PictureFormat, images: list[int]) -> Iterator[np.ndarray]:
    """The pictures that were written, uint8 [S, S, channels]; PNG is lossless."""
    return (read_png(out / picture_name(image), pictures.side, pictures.channels) for image in images)


def _whole(dtype: str, array: np.ndarray) -> Streamed:
    return Streamed(dtype, array.shape, [array])


def facts(out: Path, run: Run, repeated_steps: int) -> dict[str, Any]:
    """The content of a finished run's `samples.json`, besides its settings."""
    files = run.results(out)
    return {
        "images": len(run.images),
        "files": [file.name for file in files if file != run.latents_out],
        "repeated_steps": repeated_steps,
        "sha256": {_key(run, file): sha256_of(file) for file in files},
    }


def _key(run: Run, file: Path) -> str:
    return "latents_out" if file == run.latents_out else file.name


@dataclass(frozen=True)
class Damage:
    """What is missing or damaged of a finished run: images whose picture is, and result files."""

    images: tuple[int, ...]
    results: tuple[Path, ...]

    def __bool__(self) -> bool:
        return bool(self.images or self.results)

    @property
    def names(self) -> str:
        """The names of everything missing or damaged, for a message."""
        names = [*map(picture_name, self.images[:3]), *(file.name for file in self.results)]
        more = len(self.images) - 3
        return ", ".join(names) + (f" and {more} more pictures" if more > 0 else "")

    def batches(self, run: Run) -> list[int]:
        """The batches whose latents are needed for the repair."""
        if any(run.holds_latents(file) for file in self.results):
            return list(range(len(run.batches)))
        lost = set(self.images)
        return [index for index, batch in enumerate(run.batches) if lost.intersection(batch.images)]


def find_damage(out: Path, run: Run, known: dict[str, Any]) -> Damage:
    """Compare a finished run's files with `known`, the content of `samples.json`.

    Raises `OutputError` if `latents_out`, a file outside the folder, has changed: it may belong to somebody else now.
    """
    hashes = known.get("sha256", {})
    images = () if run.pictures is None else tuple(i for i in run.images if not has_picture(out, run.pictures, i))
    lost = []
    for file in run.results(out):
        expected = hashes.get(_key(run, file))
        if file.is_file() and expected in (None, sha256_of(file)):
            continue
        if file == run.latents_out and file.exists():
            raise OutputError(
                f"{file} has changed since this run wrote it; move the file to another place and run the same command "
                "again, or choose another output"
            )
        lost.append(file)
    return Damage(images, tuple(lost))


def restore_latents(out: Path, run: Run, damage: Damage, store: LatentStore, segments: int) -> bool:
    """Take latents from an undamaged result file that holds them; returns False if there is none."""
    for file in run.results(out):
        if run.holds_latents(file) and file not in damage.results:
            needed = set(damage.batches(run))
            pieces = read_npz(file, "latents", [len(batch.images) for batch in run.batches])
            for index, latents in enumerate(pieces):
                if index in needed and store.done(index) < segments:
                    store.save(index, segments, State(latents), 0)
            return True
    return False
