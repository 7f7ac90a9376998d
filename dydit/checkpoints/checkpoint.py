"""Reads and writes checkpoints: weights with the configuration of their model.

It reads the formats that the architectures recognise (published files, training files, diffusers folders), and our own
format. It writes our own format: one safetensors file of fp32 tensors under the published names, with the metadata
`format` = "dydit", `version` = "1", `config` = the `ModelConfig` as JSON, and any text that the caller adds. The same
weights and metadata give the same bytes. (The safetensors library writes metadata in an order that changes from run to
run, so this module writes the file: a length, JSON, and the data.)
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dydit.checkpoints.containers import Container, container_of
from dydit.checkpoints.conventions import by_name, require_blocks, settings_in
from dydit.checkpoints.diffusers_folder import json_object, read_folder
from dydit.checkpoints.fit import Given, expected_shapes, require_fit, require_trained
from dydit.checkpoints.nnet_folder import choose_file, is_nnet_folder
from dydit.checkpoints.process_settings import claims_of
from dydit.checkpoints.safe_load import explained_memory, listed, plain_tensors, read_safetensors, read_torch, shown
from dydit.checkpoints.state_entries import EMA, MODEL, is_average, unpack
from dydit.checkpoints.stated_process import ProcessOptions, own_claims, read_process
from dydit.diffusion.process import NoiseSchedule, Prediction
from dydit.errors import CheckpointError, ConfigError, one_line
from dydit.files import atomic_file, new_file, require_absent, sha256_of, user_path
from dydit.models.config import ModelConfig, Space, parse_config, parse_model
from dydit.models.dynamic import DynamicModel
from dydit.models.meta import without_memory
from dydit.models.registry import Architecture, architecture_of, architectures

if TYPE_CHECKING:
    from dydit.bundle.texts import Texts

FORMAT, VERSION = "dydit", "1"
TRAINING = "training arguments"
RESERVED = ("format", "version", "config")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The weights of a model under the published names, in the dtype of the file, and what is known about them.

    `source`: "dit", "uvit" or "pixart" (official, static), "dydit" (with routers), "diffusers" or "dydit-safetensors".
    `sha256`: of the file, together with the name of the entry if that is not the default one; for a folder, of the
    weight files that were read. `metadata`: the added text of our own format, or for training files `weights`, the
    entry that was read ("ema", "model", ...). `notes`: assumptions and choices, for the user. The tensors of `state`
    may be mapped from the file, and may share memory: do not write to them. `texts`: of a run, see `with_texts`.
    """

    config: ModelConfig
    state: dict[str, Tensor] = field(repr=False)
    source: str
    path: Path
    sha256: str
    metadata: dict[str, str]
    notes: tuple[str, ...] = ()
    texts: Texts | None = field(default=None, repr=False)

    def with_texts(self, texts: Texts | None) -> Checkpoint:
        """The checkpoint for a run with these texts, whose labels are their numbers; as it is, if there are none."""
        if texts is None:
            return self
        return dataclasses.replace(self, config=self.config.with_texts(texts.count, texts.negative), texts=texts)

    def model(self) -> DynamicModel:
        """A new model with these weights, in fp32 and eval mode. It shares no memory with `state`."""
        model = self._filled(self.state)
        assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
        return model

    def width_router_model(self) -> DynamicModel:
        """The model with weights only for its timestep embedder and width routers. Other weights take no memory.

        This is enough to compute the width masks of timesteps, at about a hundredth of the model's size.
        """
        needed = architecture_of(self.config).is_width_router
        return self._filled({name: tensor for name, tensor in self.state.items() if needed(name)})

    def _filled(self, state: Mapping[str, Tensor]) -> DynamicModel:
        with without_memory():
            model = architecture_of(self.config).masked(self.config)
        with explained_memory(self.path):
            weights = {name: _fp32_copy(tensor) for name, tensor in state.items()}
        model.load_state_dict(weights, strict=state is self.state, assign=True)
        model.set_derived()
        return model.eval()


def _fp32_copy(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def load_checkpoint(
    path: Path | str,
    num_heads: int | None = None,
    weights: str | None = None,
    num_classes: int | None = None,
    input_size: int | None = None,
    prediction: Prediction | str | None = None,
    schedule: NoiseSchedule | str | None = None,
    betas: tuple[float, float] | None = None,
) -> Checkpoint:
    """Read a checkpoint of any known format, which is recognised by content. Every tensor is checked.

    `num_heads`, `num_classes` (without "no class") and `input_size` (the side of the latents): for a file that does not
    show them. `weights`: which of several weights to read: "ema", "model" or the name of an entry or variant; by
    default the moving average, if there is one. `prediction`, `schedule`, `betas`: how the model was trained (see
    `Process`), for a file that does not state it. Raises `CheckpointError`, in one line that names `path`, for anything
    that is not a complete and finite model, or was trained in a way that we cannot sample or that is not the given one;
    `ConfigError` if what is given contradicts itself. No code in the file is executed.
    """
    process = parse_config(ProcessOptions, {"prediction": prediction, "schedule": schedule, "betas": betas})
    path, given = user_path(path), Given(num_heads, weights, num_classes, input_size, process)
    try:
        if path.is_dir() and is_nnet_folder(path):
            return _load_nnet_folder(path, given)
        if path.is_dir():
            folder = read_folder(path, given)
            return Checkpoint(
                config=folder.config,
                state=folder.state,
                source="diffusers",
                path=path,
                sha256=folder.sha256,
                metadata=folder.metadata,
                notes=folder.notes,
            )
        if not path.is_file():
            raise CheckpointError("is not a regular file" if path.exists() else "does not exist")
        return _load_file(path, given)
    except (CheckpointError, ConfigError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    except MemoryError as error:
        raise CheckpointError(
            f"{path}: cannot be read: not enough memory ({one_line(error)}); the file is not damaged"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error


def _load_nnet_folder(folder: Path, given: Given) -> Checkpoint:
    chosen = choose_file(folder, given.weights)
    try:
        checkpoint = _load_file(chosen.path, dataclasses.replace(given, weights=None))
    except CheckpointError as error:
        raise CheckpointError(f"{chosen.path.name} {error}") from error
    notes = (*chosen.notes, *checkpoint.notes)
    return dataclasses.replace(checkpoint, path=folder, metadata={"weights": chosen.entry}, notes=notes)


def _load_file(path: Path, given: Given) -> Checkpoint:
    container, size = container_of(path), path.stat().st_size
    if container is Container.SAFETENSORS:
        loaded, header = read_safetensors(path)
        if header.get("format") == FORMAT:
            return _load_own(path, loaded, header, given)
        where = "metadata"
    else:
        loaded, header, where = read_torch(path, container), {}, TRAINING
    unpacked = unpack(loaded, given.weights)
    state = plain_tensors(unpacked.state, size)
    if any(name.startswith("transformer_blocks.") for name in state):
        raise CheckpointError("holds diffusers weights without their config.json; give the folder that holds both")
    settings = settings_in(loaded, header)
    stated = by_name(settings)
    require_blocks(stated, where)
    known = _recognised(state)
    inferred = known.infer_config(state, stated, given)
    reading = read_process(claims_of(settings, f"its {where} say"), given.process, inferred.config.usual_process)
    config = inferred.config.model_copy(update={"process": reading.process})
    known.complete(state, config, size)
    metadata = {"weights": unpacked.entry} if unpacked.entry else {}
    trained = require_trained(state, config, unpacked.entry)
    notes = (*unpacked.notes, *inferred.notes, *reading.notes, *trained)
    sha256 = sha256_of(path)
    if not unpacked.by_default:  # bundles of different entries of a file must have different hashes
        sha256 = hashlib.sha256(f"{sha256} {unpacked.entry}".encode()).hexdigest()
    return Checkpoint(config, state, "dydit" if config.dynamic else known.name, path, sha256, metadata, notes)


def _recognised(state: Mapping[str, Tensor]) -> Architecture:
    """The architecture of a state dict, by its published names."""
    for each in architectures():
        if each.recognises(state):
            return each
    readable = sorted((each for each in architectures() if each.anchors), key=lambda each: each.title)
    anchors = ", ".join(f"{each.anchors[0]} (of a {each.title})" for each in readable)
    *titles, last = (each.title for each in readable)
    raise CheckpointError(
        f"is not a checkpoint that dydit can read: it has none of {anchors}; it holds {listed(state) or 'no tensors'} "
        f"(expected an official {', '.join(titles)} or {last}, a training file or folder of one, a diffusers folder, "
        "or a dydit file)"
    )


def _load_own(path: Path, tensors: dict[str, Tensor], header: dict[str, str], given: Given) -> Checkpoint:
    if header.get("version") != VERSION:
        version = shown(header.get("version", "none"))
        raise CheckpointError(f"has version {version} of the dydit format; this dydit reads {VERSION}: update it")
    config = parse_model(json_object(header.get("config", ""), "configuration"))
    given.require_same(config)
    reading = read_process(own_claims(config.process), given.process, config.usual_process)
    config = config.model_copy(update={"process": reading.process})
    metadata = {key: value for key, value in header.items() if key not in RESERVED}
    entry = metadata.get("weights", "")
    if given.weights is not None and given.weights not in (entry, EMA if is_average(entry) else MODEL):
        raise CheckpointError(
            f"holds no weights {shown(given.weights)}, only {shown(entry) or MODEL}; remove --weights (weights=)"
        )
    state = plain_tensors(tensors, path.stat().st_size)
    require_fit(state, expected_shapes(config))
    notes = (*reading.notes, *require_trained(state, config, ""))
    return Checkpoint(config, state, "dydit-safetensors", path, sha256_of(path), metadata, notes)


def save_checkpoint(
    path: Path | str,
    model_or_state: DynamicModel | Mapping[str, Tensor],
    config: ModelConfig,
    metadata: Mapping[str, str] | None = None,
    replace: bool = True,
) -> None:
    """Write our own format, atomically, one tensor at a time. `replace`: whether `path` may exist.

    Raises `CheckpointError` if the weights do not fit `config` or are not finite, or if `metadata` is not text or uses
    a reserved key; `OutputError` if `path` cannot be written.
    """
    path = user_path(path)
    if isinstance(model_or_state, DynamicModel) and model_or_state.config != config:
        raise CheckpointError(f"{path}: not written: the configuration is not that of the model")
    state = model_or_state.state_dict() if isinstance(model_or_state, DynamicModel) else model_or_state
    try:
        require_fit(state, expected_shapes(config))
        header = _header(config, metadata or {})
    except CheckpointError as error:
        raise CheckpointError(f"{path}: not written: the model {error}") from error
    with (atomic_file if replace else new_file)(path) as file:
        file.write(header)
        for name in sorted(state):
            array = state[name].detach().to("cpu", torch.float32).contiguous().numpy()
            file.write(array.astype("<f4", copy=False).data)


def _header(config: ModelConfig, metadata: Mapping[str, str]) -> bytes:
    """The safetensors header: its length (8 bytes, little-endian), JSON padded with blanks to a multiple of 8."""
    for key, value in metadata.items():
        if key in RESERVED or not isinstance(key, str) or not isinstance(value, str):
            raise CheckpointError(f"has metadata {shown(str(key))}, which is a reserved key or not text")
    own = {"format": FORMAT, "version": VERSION, "config": config.model_dump_json()}
    entries: dict[str, object] = {"__metadata__": {**own, **dict(sorted(metadata.items()))}}
    offset = 0
    for name, shape in sorted(expected_shapes(config).items()):
        end = offset + 4 * torch.Size(shape).numel()
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    try:
        text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise CheckpointError("has metadata that is not valid text") from error
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def convert(
    source: Path,
    target: Path,
    num_heads: int | None = None,
    weights: str | None = None,
    num_classes: int | None = None,
    input_size: int | None = None,
    prediction: Prediction | str | None = None,
    schedule: NoiseSchedule | str | None = None,
    betas: tuple[float, float] | None = None,
    space: Space | None = None,
) -> Checkpoint:
    """Read `source` in any known format, write `target` in ours, and return it as read back from there.

    `space`: what the model samples, if the source does not state it or states it wrongly. The other options are those
    of `load_checkpoint`. The metadata record the origin: `source` (its format), `source_sha256`, and `assumed`, the
    notes of reading it, which the result also has. Raises `OutputError` if `target` exists, and what `load_checkpoint`
    raises.
    """
    source, target = user_path(source), user_path(target)
    require_absent(target)
    checkpoint = load_checkpoint(source, num_heads, weights, num_classes, input_size, prediction, schedule, betas)
    # A copy of a file in our own format keeps the origin in its metadata, and what was assumed before.
    metadata = {"source": checkpoint.source, "source_sha256": checkpoint.sha256, **checkpoint.metadata}
    before = metadata.get("assumed", "")
    if assumed := [*([before] if before else []), *(note for note in checkpoint.notes if note not in before)]:
        metadata["assumed"] = "; ".join(assumed)
    config = checkpoint.config.stating(space, decoded=False)
    save_checkpoint(target, checkpoint.state, config, metadata, replace=False)
    return dataclasses.replace(load_checkpoint(target), notes=checkpoint.notes)
