"""Reading and writing checkpoints: weights with the configuration of the model that they belong to.

Read: official DiT files, DyDiT training files, diffusers DiT folders, and our own. Written: our own, one safetensors
file of fp32 tensors under the published names, `pos_embed` included, whose metadata holds `format` = "dydit",
`version` = "1", `config` = the `ModelConfig` as JSON, and whatever text the writer adds. The same weights and metadata
give the same bytes. (The safetensors library puts metadata in an order that changes from run to run, so the file is
written here; the format is a length, JSON, and the data.)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dydit.errors import CheckpointError, ConfigError
from dydit.files import atomic_file, require_absent, sha256_of
from dydit.models.config import ModelConfig, parse_config
from dydit.models.dit.model import DiT, timestep_frequencies
from dydit.models.safe_load import Container, container_of, plain_tensors, read_safetensors, read_torch, shown
from dydit.models.state_fit import expected_shapes, infer_config, require_fit
from dydit.models.state_names import DiffusersConfig, from_diffusers, unpack

FORMAT, VERSION = "dydit", "1"
RESERVED = ("format", "version", "config")
DIFFUSERS_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The weights of a model under the published names, in the dtype of the file, and what is known about them.

    `source`: "dit" (official, static), "dydit" (with routers), "diffusers" or "dydit-safetensors". `sha256`: of the
    file; for a folder, of its weight file. `metadata`: what the writer of our own format added, or for a training file
    `weights`, the entry used ("ema" or "model"). The tensors of `state` may be mapped from the file: do not write to
    them.
    """

    config: ModelConfig
    state: dict[str, Tensor] = field(repr=False)
    source: str
    path: Path
    sha256: str
    metadata: dict[str, str]

    def model(self) -> DiT:
        """A new model with these weights, fp32, in eval mode; it shares no memory with `state`."""
        model = self._filled(self.state)
        assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
        return model

    def width_routers(self) -> DiT:
        """The same model with weights for its timestep embedder and width routers alone; the others take no memory.

        Enough to decide heads and groups at any timestep, at a hundredth of the model's size.
        """
        parts = ("t_embedder.", ".attn_rate.", ".mlp_rate.")
        return self._filled({name: each for name, each in self.state.items() if any(part in name for part in parts)})

    def _filled(self, state: Mapping[str, Tensor]) -> DiT:
        with torch.device("meta"):
            model = DiT(self.config)
        weights = {name: _fp32_copy(tensor) for name, tensor in state.items()}
        model.load_state_dict(weights, strict=state is self.state, assign=True)
        model.t_embedder.frequencies = timestep_frequencies()  # derived, so in no state dict
        return model.eval()


def _fp32_copy(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def load_checkpoint(path: Path | str, num_heads: int | None = None) -> Checkpoint:
    """Read a checkpoint of any of the known formats, told apart by content; every tensor is checked.

    `num_heads`: for a file that does not tell its head count. Raises `CheckpointError`, in one line that names `path`,
    for anything that is not a complete and finite DiT; nothing in the file is executed.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return _load_folder(path, num_heads)
        if not path.is_file():
            raise CheckpointError("is not a regular file" if path.exists() else "does not exist")
        return _load_file(path, num_heads)
    except (CheckpointError, ConfigError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error


def _load_file(path: Path, num_heads: int | None) -> Checkpoint:
    container = container_of(path)
    metadata: dict[str, str] = {}
    if container is Container.SAFETENSORS:
        tensors, header = read_safetensors(path)
        if header.get("format") == FORMAT:
            return _load_own(path, tensors, header, num_heads)
        unpacked = unpack(tensors)
    else:
        unpacked = unpack(read_torch(path, container))
    state = plain_tensors(unpacked.state, path.stat().st_size)
    if any(name.startswith("transformer_blocks.") for name in state):
        raise CheckpointError("holds diffusers weights without their config.json; give the folder that holds both")
    config = infer_config(state, unpacked.arguments, num_heads)
    require_fit(state, expected_shapes(config))
    if unpacked.entry:
        metadata["weights"] = unpacked.entry
    return Checkpoint(config, state, "dydit" if config.dynamic else "dit", path, sha256_of(path), metadata)


def _load_own(path: Path, tensors: dict[str, Tensor], header: dict[str, str], num_heads: int | None) -> Checkpoint:
    if header.get("version") != VERSION:
        version = shown(header.get("version", "none"))
        raise CheckpointError(f"has version {version} of the dydit format; this dydit reads {VERSION}: update it")
    config = parse_config(ModelConfig, _json_object(header.get("config", ""), "configuration"))
    _require_heads(config, num_heads)
    state = plain_tensors(tensors, path.stat().st_size)
    require_fit(state, expected_shapes(config))
    metadata = {key: value for key, value in header.items() if key not in RESERVED}
    return Checkpoint(config, state, "dydit-safetensors", path, sha256_of(path), metadata)


def _load_folder(path: Path, num_heads: int | None) -> Checkpoint:
    folder = next((at for at in (path, path / "transformer") if (at / "config.json").is_file()), None)
    weights = next((folder / name for name in DIFFUSERS_WEIGHTS if (folder / name).is_file()), None) if folder else None
    if folder is None or weights is None:
        sharded = folder and any(folder.glob("diffusion_pytorch_model*.index.json"))
        hint = "; its weights are in shards, save them as one file" if sharded else ""
        raise CheckpointError(
            f"is not a diffusers DiT folder: expected config.json and {DIFFUSERS_WEIGHTS[0]} in it or in its "
            f"transformer/ folder{hint}"
        )
    values = _json_object((folder / "config.json").read_bytes(), "config.json")
    config = parse_config(DiffusersConfig, values).model()
    _require_heads(config, num_heads)
    container = container_of(weights)
    if container is Container.SAFETENSORS:
        tensors, _ = read_safetensors(weights)
    else:
        tensors = dict(unpack(read_torch(weights, container)).state)
    state = from_diffusers(plain_tensors(tensors, weights.stat().st_size), config)
    return Checkpoint(config, state, "diffusers", path, sha256_of(weights), {})


def _json_object(text: str | bytes, what: str) -> dict[str, object]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"has a {what} that is not JSON") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"has a {what} that is not a JSON object")
    return value


def _require_heads(config: ModelConfig, num_heads: int | None) -> None:
    if num_heads is not None and num_heads != config.num_heads:
        raise CheckpointError(f"says that it has {config.num_heads} heads, not {num_heads}; leave --num-heads away")


def save_checkpoint(
    path: Path | str,
    model_or_state: DiT | Mapping[str, Tensor],
    config: ModelConfig,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write our own format (see the module), atomically, replacing `path`; tensors go out one by one.

    Raises `CheckpointError` where the weights do not fit `config` or are not finite, and where `metadata` is not text
    or uses a reserved key; `OutputError` where `path` cannot be written.
    """
    path = Path(path)
    if isinstance(model_or_state, DiT) and model_or_state.config != config:
        raise CheckpointError(f"{path}: not written: the configuration is not that of the model")
    state = model_or_state.state_dict() if isinstance(model_or_state, DiT) else model_or_state
    try:
        require_fit(state, expected_shapes(config))
        header = _header(config, metadata or {})
    except CheckpointError as error:
        raise CheckpointError(f"{path}: not written: the model {error}") from error
    with atomic_file(path) as file:
        file.write(header)
        for name in sorted(state):
            array = state[name].detach().to("cpu", torch.float32).contiguous().numpy()
            file.write(array.astype("<f4", copy=False).data)


def _header(config: ModelConfig, metadata: Mapping[str, str]) -> bytes:
    """The safetensors header: its length (8 bytes, little-endian), JSON padded with blanks to a multiple of 8."""
    for key, value in metadata.items():
        if key in RESERVED or not isinstance(key, str) or not isinstance(value, str):
            raise CheckpointError(f"has metadata {shown(str(key))} that is reserved or not text")
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


def convert(source: Path, target: Path, num_heads: int | None = None) -> Checkpoint:
    """Read `source` in any known format, write `target` in ours, and return it as read back from there.

    The origin goes into the metadata: `source` (its format) and `source_sha256`. Raises `OutputError` if `target`
    exists and `CheckpointError` as `load_checkpoint` does.
    """
    source, target = Path(source), Path(target)
    require_absent(target)
    checkpoint = load_checkpoint(source, num_heads)
    origin = {"source": checkpoint.source, "source_sha256": checkpoint.sha256}
    # A copy of our own format keeps the origin that it names.
    save_checkpoint(target, checkpoint.state, checkpoint.config, {**origin, **checkpoint.metadata})
    return load_checkpoint(target)
