"""COCO captions: `annotations/captions_SPLIT.json`, and the images in a folder of the split's name."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

from dydit.data.sources.source import Choices, Record
from dydit.errors import ConfigError, one_line


class CocoCaptions:
    """Images in the order of their numbers, each with its captions, about five; a `Source` without classes."""

    classes = 1
    class_names: tuple[str, ...] | None = None
    size: int | None = None
    channels: int | None = None
    mirrors = True
    not_mirrored: tuple[int, ...] = ()
    captioned = True

    def __init__(self, folder: Path, choices: Choices):
        path = _annotations(folder, choices.split)
        split = path.stem.removeprefix("captions_")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            captions: dict[int, list[str]] = defaultdict(list)
            for each in sorted(values["annotations"], key=lambda each: int(each["id"])):
                captions[int(each["image_id"])].append(str(each["caption"]).strip())
            files = sorted((int(each["id"]), str(each["file_name"])) for each in values["images"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} cannot be read as COCO captions ({one_line(error)})") from error
        self._folder = next((place for place in (folder / split, folder / "images" / split) if place.is_dir()), None)
        if self._folder is None:
            raise ConfigError(f"{folder} has no folder {split} with the images of {path.name}; unpack them there")
        self._records = [(name, tuple(captions[number])) for number, name in files]
        if not self._records:
            raise ConfigError(f"{path} lists no images")

    def __len__(self) -> int:
        return len(self._records)

    def record(self, index: int) -> Record:
        """The record of a file."""
        assert self._folder is not None
        name, captions = self._records[index]
        return Record(name, self._folder / name, captions=captions)


def annotation_files(folder: Path) -> list[Path]:
    """The files of captions of a COCO folder."""
    return sorted((folder / "annotations").glob("captions_*.json"))


def _annotations(folder: Path, split: str | None) -> Path:
    paths = annotation_files(folder)
    splits = [path.stem.removeprefix("captions_") for path in paths]
    if split is not None and split in splits:
        return paths[splits.index(split)]
    if split is None and len(paths) == 1:
        return paths[0]
    if not paths:
        raise ConfigError(f"{folder} has no annotations/captions_*.json; give the folder that COCO was unpacked in")
    asked = f"no split {split}, but" if split else "the splits"
    raise ConfigError(f"{folder} has {asked} {', '.join(splits)}; give --split with one of them")
