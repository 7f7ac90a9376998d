"""Reads the folder of a diffusers DiT or PixArt: a pipeline's `transformer/`, or the pipeline with that folder.

`config.json` describes the model. The weights are `diffusion_pytorch_model.safetensors` or `.bin`; or they have a
variant in the name (`.fp16.safetensors`); or they are shards, which an index file (`.safetensors.index.json`, with a
variant also `.safetensors.index.fp16.json`) lists by tensor. The pipeline's `scheduler/scheduler_config.json` says what
the model was trained to predict, and its `model_index.json` may name the classes. Errors do not name the folder: the
caller does.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dydit.checkpoints.containers import Container, container_of
from dydit.checkpoints.conventions import Setting, by_name, require_blocks, settings_in, short
from dydit.checkpoints.diffusers_scheduler import scheduler_claims
from dydit.checkpoints.fit import Given, require_trained
from dydit.checkpoints.nnet_folder import AVERAGE, TRAINED
from dydit.checkpoints.pipeline_folder import class_names_of_folder, space_of_folder
from dydit.checkpoints.process_settings import claims_of
from dydit.checkpoints.safe_load import listed, plain_tensors, read_safetensors, read_torch, shown
from dydit.checkpoints.state_entries import EMA, MODEL, unpack
from dydit.checkpoints.stated_process import Claim, read_process
from dydit.errors import CheckpointError
from dydit.files import sha256_of
from dydit.models.config import ModelConfig
from dydit.models.registry import DEFAULT, Architecture, architecture, architectures

CONFIG, SCHEDULER, BUNDLE_MANIFEST = "config.json", "scheduler_config.json", "manifest.json"
STEM = "diffusion_pytorch_model"
_LARGEST_JSON = 64 << 20
_WEIGHTS = re.compile(
    rf"{STEM}(?:\.(?P<variant>[\w-]+))?\.(?P<kind>safetensors|bin)"
    rf"|{STEM}(?:\.(?P<before>[\w-]+))?\.(?P<indexed>safetensors|bin)(?:\.(?P<between>[\w-]+))?"
    r"\.index(?:\.(?P<after>[\w-]+))?\.json"
)
_SHARD = re.compile(r"-\d{5}-of-\d{5}")


@dataclass(frozen=True)
class Folder:
    """The model in a folder: its weights under the published names, and the SHA-256 of their files."""

    config: ModelConfig
    state: dict[str, Tensor]
    sha256: str
    notes: tuple[str, ...]
    metadata: dict[str, str]


def read_folder(path: Path, given: Given) -> Folder:
    """Read a diffusers model. Raises `CheckpointError` if it is none, is incomplete, or was trained in another way."""
    folder = _model_folder(path, given.weights)
    values = read_json(folder / CONFIG, CONFIG)
    known = _architecture(values)
    config = known.diffusers_config(values).stating(space_of_folder(path), decoded=False)
    given.require_same(config)
    claims = [*_of_scheduler(folder), *claims_of(settings_in({"config": values}), f"its {CONFIG} says")]
    variant, weights, notes = _choose(folder, given.weights)
    files = _shards(weights) if weights.suffix == ".json" else {weights: None}
    tensors: dict[str, Tensor] = {}
    for file, names in files.items():
        part, settings = _read(file, whole=names is None)
        require_blocks(by_name(settings), "metadata")
        claims += claims_of(settings, "its metadata say")
        if names is not None and (differing := sorted(names ^ {str(name) for name in part})):
            raise CheckpointError(
                f"has an index that does not match the tensors in {shown(file.name)} ({listed(differing)})"
            )
        tensors.update(part)
    size = sum(file.stat().st_size for file in files)
    reading = read_process(claims, given.process, config.usual_process)
    class_names, remarks = class_names_of_folder(path, config.classes.count)
    config = config.model_copy(update={"process": reading.process, "class_names": class_names})
    state = known.from_diffusers(plain_tensors(tensors, size), config, size)
    metadata = {"weights": variant} if variant else {}
    notes += reading.notes + remarks + require_trained(state, config, variant)
    return Folder(config, state, _hash(list(files)), notes, metadata)


def _architecture(values: dict[str, Any]) -> Architecture:
    """The architecture of a `config.json`. Raises `CheckpointError` for a class that no architecture has."""
    known = next((each for each in architectures() if each.recognises_folder(values)), None)
    if known is None and isinstance(kind := values.get("_class_name"), str):
        classes = sorted({name for each in architectures() for name in each.diffusers_classes})
        raise CheckpointError(
            f"has a {CONFIG} with _class_name {short(kind)}, which dydit does not have; expected one of: "
            f"{', '.join(classes)}"
        )
    return known or architecture(DEFAULT)


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in a file. `what` names the file in errors."""
    if path.stat().st_size > _LARGEST_JSON:
        raise CheckpointError(f"has a {what} of {path.stat().st_size} bytes, which is too large")
    return json_object(path.read_bytes(), what)


def json_object(text: str | bytes, what: str) -> dict[str, Any]:
    """The JSON object in `text`. Raises `CheckpointError` if it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"has a {what} that is not JSON") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"has a {what} that is not a JSON object")
    return value


def _model_folder(path: Path, wanted: str | None) -> Path:
    if (path / BUNDLE_MANIFEST).is_file():
        raise CheckpointError(
            "is a bundle, not a checkpoint; give the checkpoint that it was exported from, or use the bundle with "
            "`dydit sample`, `inspect` or `bench` (which compares two bundles with --versus)"
        )
    averaged = path / "transformer_ema"
    if wanted == EMA and (averaged / CONFIG).is_file():
        return averaged
    folder = next((at for at in (path, path / "transformer") if (at / CONFIG).is_file()), None)
    if folder is not None:
        return folder
    names = (".pt", ".pth", ".ckpt", ".safetensors", ".bin")
    inside = [each.name for each in sorted(path.iterdir()) if each.suffix in names]
    hint = f"; if the checkpoint is one of these, give that: {listed(inside)}" if inside else ""
    raise CheckpointError(
        f"is not a checkpoint folder: expected {CONFIG} and {STEM}.safetensors of diffusers, in it or in its "
        f"transformer/ folder, or {AVERAGE} or {TRAINED} of U-ViT's training{hint}"
    )


def _of_scheduler(folder: Path) -> list[Claim]:
    """What the scheduler of the pipeline says about the training, if the model is in a pipeline."""
    folder = folder.absolute()
    files = [folder / SCHEDULER, folder / "scheduler" / SCHEDULER]
    index = folder.parent / "model_index.json"
    if folder.name.startswith("transformer") or index.is_file():
        files.append(folder.parent / "scheduler" / SCHEDULER)
    existing = [file for file in files if file.is_file()]
    claims = [claim for file in existing for claim in scheduler_claims(read_json(file, SCHEDULER))]
    named = read_json(index, index.name).get("scheduler") if index.is_file() and not existing else None
    if isinstance(named, list) and len(named) == 2 and isinstance(named[1], str):
        claims = scheduler_claims({"_class_name": named[1]})
    return claims


def _choose(folder: Path, wanted: str | None) -> tuple[str, Path, tuple[str, ...]]:
    """(variant, weight file or index, notes). Files without a variant come first, then safetensors before pickles."""
    variants: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()):
        match = _WEIGHTS.fullmatch(file.name)
        if match and not _SHARD.search(file.name) and file.is_file():
            parts = match.groupdict()
            variant = parts["variant"] or parts["before"] or parts["between"] or parts["after"] or ""
            variants.setdefault(variant, []).append(file)
    if not variants:
        shards = [file.name for file in folder.iterdir() if file.name.startswith(STEM) and _SHARD.search(file.name)]
        hint = f"; it has shards ({listed(sorted(shards))}), but no index file that lists them" if shards else ""
        raise CheckpointError(f"is not a diffusers folder: expected {STEM}.safetensors beside its {CONFIG}{hint}")
    if folder.name == "transformer_ema" and wanted == EMA:
        wanted = None
    if wanted == MODEL and wanted not in variants:
        wanted = "non_ema" if "non_ema" in variants else None
    names = ", ".join(shown(each) for each in sorted(variants) if each) or "none"
    if wanted is not None and wanted not in variants:
        raise CheckpointError(
            f"holds no weights {shown(wanted)}; its variants are: {names}; remove --weights (weights=)"
        )
    if wanted is None and "" not in variants and len(variants) > 1:
        raise CheckpointError(f"holds its weights in several variants ({names}); choose one with --weights (weights=)")
    variant = wanted if wanted is not None else "" if "" in variants else next(iter(variants))
    best = min(variants[variant], key=lambda file: (".safetensors" not in file.name, file.suffix == ".json"))
    others = [each or "no variant" for each in sorted(variants) if each != variant]
    note = f"weights: {variant or 'no variant'}; the folder also holds {listed(others)} (see --weights)"
    return variant, best, (note,) if others else ()


def _shards(index: Path) -> dict[Path, set[str] | None]:
    """The shards that an index names, with the names of their tensors. All shards are in the folder of the index."""
    weight_map = read_json(index, index.name).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"has an index without a weight_map ({index.name}); download it again")
    shards: dict[Path, set[str] | None] = {}
    for tensor, name in sorted(weight_map.items()):
        if not isinstance(name, str) or not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
            raise CheckpointError(
                f"has an index that names {shown(str(name))}, which is not in the same folder; do not use it"
            )
        file = index.parent / name
        names = shards.setdefault(file, set())
        assert names is not None
        names.add(tensor)
    if missing := [file.name for file in shards if not file.is_file()]:
        raise CheckpointError(f"lacks {len(missing)} of its {len(shards)} shards ({listed(missing)}); download them")
    return shards


def _read(file: Path, whole: bool) -> tuple[dict[str, Any], list[Setting]]:
    """The tensors of a file, and its settings. `whole`: whether it has the whole model; otherwise it is a shard."""
    container = container_of(file)
    if container is Container.SAFETENSORS:
        tensors, metadata = read_safetensors(file)
        return tensors, settings_in(None, metadata)
    loaded = read_torch(file, container)
    if whole:
        return dict(unpack(loaded).state), settings_in(loaded)
    if not isinstance(loaded, dict):
        raise CheckpointError(f"has a shard {file.name} that holds {type(loaded).__name__}, not a state dict")
    return loaded, settings_in(loaded)


def _hash(files: list[Path]) -> str:
    """SHA-256 of a single file, or of the hashes of several files, in the order of their names."""
    if len(files) == 1:
        return sha256_of(files[0])
    lines = [f"{sha256_of(file)}  {file.name}\n" for file in sorted(files)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
