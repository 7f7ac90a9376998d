"""Finds an autoencoder's files: in a folder, in a pipeline's folder, in one file, or on the Hugging Face hub.

A source is taken as a name on the hub only if it has the form OWNER/NAME and there is no file or folder of that name,
so a mistyped path is reported at once. Only the necessary files are downloaded. With HF_HUB_OFFLINE, or if the hub
cannot be reached, the files of an earlier download are used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from dydit.errors import BackendError, CheckpointError, one_line

CONFIG, PIPELINE, WEIGHT_SUFFIXES = "config.json", "model_index.json", (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
HUB_SECONDS = 10
_FOLDERS = ("", "vae/", "vqvae/")  # where a pipeline has its autoencoder
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_WHOLE = re.compile(r"diffusion_pytorch_model(\.(?P<variant>\w[\w-]*))?\.(?P<kind>safetensors|bin)")
_SHARD = re.compile(r".*-\d{5}-of-\d{5}\.(safetensors|bin)")
_INDEX = re.compile(r"diffusion_pytorch_model\.(?P<kind>safetensors|bin)\.index(\.(?P<variant>\w[\w-]*))?\.json")


@dataclass(frozen=True)
class VaeFiles:
    """The files of an autoencoder. `config`: None for a single file of weights. `weights`: several files for shards."""

    config: Path | None
    weights: tuple[Path, ...]


def require_packages() -> None:
    """Raise `BackendError`, which names the command to install it, if a package for the export is missing."""
    try:
        import diffusers  # noqa: F401
        import onnxscript  # noqa: F401  (PyTorch's exporter needs it)
    except ImportError as error:
        package = (error.name or "diffusers").partition(".")[0]
        raise BackendError(f"{package} cannot be imported ({one_line(error)}): pip install 'dydit[vae]'") from error


def require_source(source: str) -> None:
    """Check without a download that `source` can be what `find_vae` needs. Raises what `find_vae` raises."""
    path = Path(source).expanduser()
    if path.is_dir():
        _in_folder(path)
    elif not path.exists():
        _require_hub_name(source)


def find_vae(source: str) -> VaeFiles:
    """The files of the autoencoder that `source` names. Raises `CheckpointError`, which does not name it."""
    path = Path(source).expanduser()
    if path.is_dir():
        return _in_folder(path)
    if path.exists():
        beside = path.parent / CONFIG
        weights = _shards(path, lambda name: path.parent / name) if path.name.endswith(".json") else (path,)
        return VaeFiles(beside if beside.is_file() else None, weights)
    _require_hub_name(source)
    return _from_hub(source)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises `CheckpointError` if it is something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"has a {path.name} that is not JSON ({one_line(error)[:100]})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"has a {path.name} that is not a JSON object")
    return value


def _require_hub_name(source: str) -> None:
    is_hub_name = _HUB_NAME.fullmatch(source) and not source.endswith(WEIGHT_SUFFIXES)
    if not is_hub_name or Path(source.partition("/")[0]).is_dir():
        raise CheckpointError("no such file or folder (a model on the Hugging Face hub is named OWNER/NAME)")


def _in_folder(folder: Path) -> VaeFiles:
    inside = [folder, *(folder / name for name in _FOLDERS if name and (folder / name).is_dir())]
    names = [file.relative_to(folder).as_posix() for holder in inside for file in holder.iterdir() if file.is_file()]
    if "manifest.json" in names and CONFIG not in names:
        raise CheckpointError("is a bundle of dydit; give the autoencoder that its decoder was exported from")
    return _choose(names, lambda name: folder / name)


def _choose(names: Iterable[str], fetch: Callable[[str], Path]) -> VaeFiles:
    """The configuration and weights among `names`, which are paths with slashes. `fetch`: gets the file of a name."""
    known = set(names)
    order = [*_FOLDERS[1:], _FOLDERS[0]] if PIPELINE in known else _FOLDERS
    prefix = next((prefix for prefix in order if prefix + CONFIG in known), None)
    if prefix is None:
        raise CheckpointError(f"holds no autoencoder: expected {CONFIG} in it, or in its vae/ or vqvae/ folder")
    config = fetch(prefix + CONFIG)
    weights = main_weights([name.removeprefix(prefix) for name in known if name.startswith(prefix)])
    if weights is None:
        raise CheckpointError(f"has a {prefix}{CONFIG} without weights: expected diffusion_pytorch_model.safetensors")
    path = fetch(prefix + weights)
    return VaeFiles(config, _shards(path, lambda name: fetch(prefix + name)) if weights.endswith(".json") else (path,))


def main_weights(names: Iterable[str]) -> str | None:
    """The file of weights, or the index of their shards, among the names of one folder; None if there is none.

    Weights without a variant (such as `fp16`) come first, then safetensors before `.bin`, then one file before shards.
    Raises `CheckpointError` if there are only several variants.
    """
    candidates = []
    for name in names:
        match = _INDEX.fullmatch(name) or (None if _SHARD.fullmatch(name) else _WHOLE.fullmatch(name))
        if match:
            variant, is_bin = match["variant"] or "", match["kind"] == "bin"
            candidates.append(((variant != "", is_bin, name.endswith(".json")), variant, name))
    variants = sorted({variant for _, variant, _ in candidates})
    if len(variants) > 1 and "" not in variants:
        raise CheckpointError(f"holds weights in the variants {', '.join(variants)}; give the file of one of them")
    return min(candidates)[2] if candidates else None


def _shards(index: Path, fetch: Callable[[str], Path]) -> tuple[Path, ...]:
    weight_map = read_json(index).get("weight_map")
    names = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
    if not names or any(PurePosixPath(name).name != name or "\\" in name for name in names):
        raise CheckpointError(f"has a {index.name} that does not list files in the same folder")
    paths = tuple(fetch(name) for name in names)
    if missing := [path.name for path in paths if not path.is_file()]:
        raise CheckpointError(f"lacks {missing[0]}, one of its {len(paths)} files of weights")
    return paths


def _from_hub(source: str) -> VaeFiles:
    from huggingface_hub import HfApi, constants, hf_hub_download
    from huggingface_hub.errors import RepositoryNotFoundError

    reason = "HF_HUB_OFFLINE is set"
    if not constants.HF_HUB_OFFLINE:
        try:
            info = HfApi().model_info(source, timeout=HUB_SECONDS)
            names = [each.rfilename for each in info.siblings or ()]
            return _choose(names, lambda name: Path(hf_hub_download(source, name, revision=info.sha)))
        except CheckpointError:
            raise
        except RepositoryNotFoundError as error:
            raise CheckpointError("no such file or folder, and no such model on the hub without a login") from error
        except Exception as error:  # the HTTP libraries in use share no base class
            reason = f"the hub cannot be reached ({one_line(error)[:200]})"
    for prefix in _FOLDERS:
        try:
            config = hf_hub_download(source, prefix + CONFIG, local_files_only=True)
        except (OSError, ValueError):
            continue
        return _in_folder(Path(config).parent)
    raise CheckpointError(f"no such file or folder; {reason}, and the model was not downloaded before")
