"""Data sets that Hugging Face `datasets` reads: one that `save_to_disk` wrote, a folder of parquet files, the hub's.

No code of a data set is run. Images are taken as they are stored, without decoding them here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dydit.data.sources.source import Choices, Record
from dydit.errors import ConfigError, one_line
from dydit.extras import DATASETS, require

CAPTION_COLUMNS = ("caption", "captions", "text", "texts", "prompt", "sentences", "sentences_raw")
LABEL_COLUMNS = ("label", "labels", "class", "fine_label")


class HuggingFaceData:
    """The rows of a data set, with their columns of images, labels and captions; a `Source`.

    Columns are found by their features, and named by the user where that is not clear. Labels may be class labels,
    whole numbers from 0, or texts, whose classes are then in alphabetic order.
    """

    size: int | None = None
    channels: int | None = None
    mirrors = True
    not_mirrored: tuple[int, ...] = ()

    def __init__(self, name: str, choices: Choices):
        require("reading data sets of Hugging Face", DATASETS)
        import datasets

        self._name = name
        rows = _one_split(name, _load(name), choices.split)
        features = rows.features
        image = self._column(rows, choices.image_column, _image_columns(features), "--image-column", required=True)
        assert image is not None
        labels = [each for each in features if isinstance(features[each], datasets.ClassLabel)]
        labels = labels or [each for each in LABEL_COLUMNS if each in features]
        self._label = self._column(rows, choices.label_column, labels, "--label-column")
        captions = [each for each in CAPTION_COLUMNS if each in features]
        self._caption = self._column(rows, choices.caption_column, captions[:1], "--caption-column")
        if isinstance(features[image], datasets.Image):
            rows = rows.cast_column(image, datasets.Image(decode=False))
        wanted = dict.fromkeys(each for each in (image, self._label, self._caption) if each is not None)
        self._image, self._rows = image, rows.select_columns(list(wanted))
        self.captioned = self._caption is not None
        self.class_names, self.classes = self._classes(features)
        self._numbers = {name: number for number, name in enumerate(self.class_names or ())}

    def __len__(self) -> int:
        return len(self._rows)

    def record(self, index: int) -> Record:
        """The record of a row."""
        row = self._rows[index]
        label = 0 if self._label is None else row[self._label]
        number = self._numbers[label] if isinstance(label, str) else int(label)
        return Record(f"{self._name} row {index}", _stored(row[self._image]), number, self._captions(row))

    def _captions(self, row: dict[str, Any]) -> tuple[str, ...]:
        value = None if self._caption is None else row[self._caption]
        values = [value] if isinstance(value, str) else (value or [])
        if not all(isinstance(each, str) for each in values):
            raise ConfigError(
                f"{self._name} has {self._caption} that is no text; name another one with --caption-column"
            )
        return tuple(each.strip() for each in values if each.strip())

    def _classes(self, features: Any) -> tuple[tuple[str, ...] | None, int]:
        """Names of the classes, if there are any, and their number."""
        import datasets

        if self._label is None:
            return None, 1
        feature = features[self._label]
        if isinstance(feature, datasets.ClassLabel):
            self._require_labels(self._rows[self._label][:], feature.num_classes)
            return tuple(feature.names), int(feature.num_classes)
        values = self._rows[self._label][:]
        if all(isinstance(each, str) for each in values):
            names = tuple(sorted(set(values)))
            return names, len(names)
        return None, self._require_labels(values, None)

    def _require_labels(self, values: Sequence[Any], most: int | None) -> int:
        if not all(isinstance(each, int) and 0 <= each < (most or each + 1) for each in values):
            raise ConfigError(
                f"{self._name} has values in {self._label} that are no labels (-1 stands for an unknown one); choose "
                "another split or --label-column"
            )
        return max(values) + 1

    def _column(
        self, rows: Any, chosen: str | None, fitting: Sequence[str], option: str, required: bool = False
    ) -> str | None:
        names = list(rows.features)
        if chosen is not None:
            if chosen not in names:
                raise ConfigError(f"{self._name} has no column {chosen!r}, only {', '.join(names)}; change {option}")
            return chosen
        if len(fitting) > 1 or (required and not fitting):
            shown = ", ".join(fitting or names)
            raise ConfigError(f"{self._name} has the columns {shown}; choose one with {option}")
        return fitting[0] if fitting else None


def is_data_folder(folder: Path) -> bool:
    """Whether `save_to_disk` wrote the folder, or it holds parquet files."""
    saved = (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()
    return saved or any(any(folder.glob(pattern)) for pattern in ("*.parquet", "*/*.parquet"))


def _load(name: str) -> Any:
    """A `Dataset`, or a `DatasetDict` of several."""
    import datasets

    folder = Path(name).expanduser()
    datasets.disable_progress_bars()
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            return datasets.load_from_disk(str(folder))
        return datasets.load_dataset(str(folder) if folder.is_dir() else name)
    except Exception as error:  # the library and the HTTP libraries under it share no base class
        raise ConfigError(
            f"{name} cannot be read by Hugging Face datasets ({one_line(error)[:200]}); give a folder of save_to_disk, "
            "a folder of parquet files, or a name on the hub"
        ) from error


def _one_split(name: str, loaded: Any, split: str | None) -> Any:
    if not hasattr(loaded, "keys"):
        if split is not None:
            raise ConfigError(f"{name} has no splits; remove --split {split}")
        rows = loaded
    else:
        splits = list(loaded.keys())
        if split not in splits and (split is not None or len(splits) > 1):
            raise ConfigError(f"{name} has the splits {', '.join(splits)}; give --split with one of them")
        rows = loaded[split or splits[0]]
    if not len(rows):
        raise ConfigError(f"{name} has no rows")
    return rows


def _image_columns(features: Any) -> list[str]:
    import datasets

    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    return images or [
        name for name, each in features.items() if getattr(each, "dtype", None) in ("binary", "large_binary")
    ]


def _stored(value: Any) -> Path | bytes | np.ndarray:
    """The image as it is stored: bytes of a file, or its path."""
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else Path(str(value.get("path")))
    if not isinstance(value, bytes | Path):
        return b""  # decoding it says that it is no image
    return value
