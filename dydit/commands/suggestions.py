"""The commands that a command suggests when it is done: complete, and quoted for a shell."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dydit.bundle.manifest import Manifest
from dydit.bundle.stored_weights import Precision
from dydit.commands.options import DEFAULT_BACKEND
from dydit.files import user_path
from dydit.models.config import ModelConfig
from dydit.training.recipe import Recipe, Stage

if TYPE_CHECKING:
    from dydit.data.dataset_folder import DatasetInfo


def next_line(*words: object) -> str:
    """A closing line that suggests a `dydit` command, to be pasted into a shell. Paths must be of the type `Path`."""
    return f"Next: {shlex.join(['dydit', *map(_word, words)])}"


def after_prepare(info: DatasetInfo, data: Path) -> list[str]:
    """The closing lines of prepared data: training of a new model, and from a checkpoint."""
    kind = [] if info.captions is None else ["model.architecture=pixart"]
    given = ["--data", data, "--out", "RUN"]
    return [
        next_line("train", "--recipe", "scratch", *given, *kind),
        next_line("train", "--recipe", "finetune", "--init", "CHECKPOINT", *given),
    ]


def after_training(model: Path, recipe: Recipe) -> list[str]:
    """The closing lines of a training: routers for a static model; the export, with a decoder for prepared latents."""
    from dydit.data.dataset_folder import is_dataset_folder
    from dydit.data.opened import SMALL_SETS

    data = user_path(recipe.data)
    prepared = recipe.data not in SMALL_SETS and is_dataset_folder(data)
    given = ["--init", model, "--data", data if prepared else recipe.data, "--out", "RUN"]
    return [
        *([next_line("train", "--recipe", "finetune", *given)] if recipe.stage is Stage.STATIC else []),
        next_line("export", model, *(_decoder_words(data) if prepared else ()), "--out", "BUNDLE"),
    ]


def _decoder_words(folder: Path) -> list[object]:
    """The autoencoder that made latents, with its scale and shift where these were given to `dydit prepare`."""
    from dydit.data.dataset_folder import read_info
    from dydit.data.prepare_settings import read_state

    source = read_info(folder).autoencoder
    if source is None:
        return []
    state = read_state(folder)
    settings = {} if state is None else state.job.settings.model_dump(include={"vae_scale", "vae_shift"})
    path = Path(source)
    return ["--vae", path if path.exists() else source, *reading_words(settings)]


def after_export(manifest: Manifest, bundle: Path, checkpoint: Path, reading: Mapping[str, Any]) -> list[str]:
    """The closing lines of an export: commands that work with this bundle."""
    backend = ["--backend", "torch"] if manifest.precision is Precision.BF16 else []
    against, guidance = ["--against", checkpoint, *reading_words(reading)], guidance_words(manifest.model)
    encoding = ["--prompt", "PROMPT", "--text-encoder", "TEXT_ENCODER", "--out", "TEXTS.npz"]
    return [
        *([next_line("encode", bundle, *encoding)] if manifest.model.text is not None else []),
        next_line("sample", bundle, *label_words(manifest.model), *guidance, *backend, "--out", "SAMPLES"),
        next_line("parity", bundle, *against, *guidance, *backend, "--out", "PARITY"),
    ]


def label_words(model: ModelConfig) -> list[str]:
    """The labels or texts of a first run. An unconditional model needs none."""
    if model.text is not None:
        return ["--texts", "TEXTS.npz"]
    return [] if model.classes.unconditional else ["--labels", "0"]


def guidance_words(model: ModelConfig) -> list[str]:
    """The guidance of a run, where the default is impossible: of a model with classes, but without a null class."""
    if model.text is not None:
        return []
    return ["--cfg-scale", "1"] if model.null_class is None and not model.classes.unconditional else []


def backend_words(settings: Mapping[str, Any]) -> list[str]:
    """The options for the backend and the device in `settings`, except for defaults."""
    backend, device = settings["backend"], settings["device"]
    words = [] if backend == DEFAULT_BACKEND else ["--backend", backend]
    return words if device == "cpu" else [*words, "--device", device]


def reading_words(reading: Mapping[str, Any]) -> list[str]:
    """The options that say how to read a checkpoint. Another command on the same checkpoint needs them as well."""
    given = {name: value for name, value in reading.items() if value is not None}
    given = {name: ",".join(map(str, value)) if isinstance(value, tuple) else value for name, value in given.items()}
    return [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def _word(word: object) -> str:
    text = str(word)
    return f"./{text}" if isinstance(word, Path) and text.startswith(("-", "~")) else text
