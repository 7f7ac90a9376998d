"""Recognises the container format of a checkpoint from its first bytes. No PyTorch here.

Errors say what is wrong with the file but do not name it: the caller does.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

from dydit.checkpoints.nnet_folder import is_nnet_folder
from dydit.errors import CheckpointError

_LEGACY_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # a pickled number, the start of torch.save files until 1.6
_NO_CHECKPOINTS = (
    (b"version https://git", "is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"),
    (b"<", "is a web page or XML, not a checkpoint; download the file itself"),
    (b"\x1f\x8b", "is compressed with gzip; unpack it first"),
    (b"\x89HDF", "is an HDF5 file; expected a torch.save file or a safetensors file"),
    (b"GGUF", "is a GGUF file; expected a torch.save file or a safetensors file"),
)


class Container(StrEnum):
    """How a file stores its tensors. The name of the file does not matter."""

    TORCH_ZIP = "a torch.save file"
    TORCH_LEGACY = "a torch.save file from before PyTorch 1.6"
    SAFETENSORS = "a safetensors file"


def container_of(path: Path) -> Container:
    """The container format of an existing regular file. Raises `CheckpointError` for an empty or unknown one."""
    with open(path, "rb") as file:
        start = file.read(20)
    if not start:
        raise CheckpointError("is empty; copy or download it again")
    if start[8:9] == b"{":  # it follows the length of the header, whose bytes are arbitrary
        return Container.SAFETENSORS
    if start.startswith(b"PK\x03\x04"):
        return Container.TORCH_ZIP
    if start[:1] == b"\x80" and start[2:15] == _LEGACY_MAGIC:
        return Container.TORCH_LEGACY
    if start[:1] == b"\x80" and start[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        raise CheckpointError("is a plain pickle, which can run code when it is read; use torch.save instead")
    for begins, message in _NO_CHECKPOINTS:
        if start.startswith(begins):
            raise CheckpointError(message)
    raise CheckpointError(f"is neither a torch.save file nor a safetensors file: it starts with {start[:16]!r}")


def looks_like_checkpoint(path: Path) -> bool:
    """Whether `path` is a file in one of these containers, or a folder laid out as diffusers or U-ViT save a model."""
    if path.is_dir():
        names = ("config.json", "model_index.json", "transformer/config.json")
        return is_nnet_folder(path) or any((path / name).is_file() for name in names)
    try:
        return path.is_file() and bool(container_of(path))
    except (CheckpointError, OSError):
        return False
