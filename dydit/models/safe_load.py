"""Reading tensors from files that nobody vouches for: `torch.save` files and safetensors.

Nothing is unpickled but tensors, containers of them and `argparse.Namespace` (DyDiT training files carry one), and
nothing is decompressed or copied beyond the size of the file. Weights stay in the file, mapped into memory, where its
format allows; so a file must not be rewritten in place while they are in use (replacing it by a rename is fine).

This module knows files, not models. Its errors say what is wrong with the file but do not name it: the caller does.
"""

from __future__ import annotations

import argparse
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dydit.errors import CheckpointError

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

_LEGACY_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # a pickled number, by which torch.save began until 1.6
_UNSAFE = re.compile(r"GLOBAL ([\w.]+)")
_DAMAGED = "is damaged or incomplete: it cannot be read as {}; copy or download it again"


class Container(StrEnum):
    """How a file stores its tensors; found from its first bytes, never from its name."""

    TORCH_ZIP = "a torch.save file"
    TORCH_LEGACY = "a torch.save file of before PyTorch 1.6"
    SAFETENSORS = "a safetensors file"


def container_of(path: Path) -> Container:
    """The container format of an existing regular file. Raises `CheckpointError` for an empty or unknown one."""
    with open(path, "rb") as file:
        start = file.read(16)
    if not start:
        raise CheckpointError("is empty; copy or download it again")
    if start[8:9] == b"{":  # after the length of the header, which can begin with any byte
        return Container.SAFETENSORS
    if start.startswith(b"PK\x03\x04"):
        return Container.TORCH_ZIP
    if start[:1] == b"\x80" and start[2:15] == _LEGACY_MAGIC:
        return Container.TORCH_LEGACY
    raise CheckpointError(f"is neither a torch.save file nor a safetensors file: it starts with {start!r}")


def read_torch(path: Path, container: Container) -> Any:
    """What `torch.save` wrote to `path`, on the CPU, memory-mapped where the format allows.

    Raises `CheckpointError` for a damaged file, and for one that holds anything but tensors, plain containers and an
    `argparse.Namespace`: such a file could run code, so nothing of it is used.
    """
    if path.name.endswith(".safetensors"):  # torch.load goes by the name
        raise CheckpointError(f"is {container.value}, not safetensors; rename it to .pt")
    if container is Container.TORCH_ZIP:
        _require_uncompressed(path)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=container is Container.TORCH_ZIP)
    except (
        Exception
    ) as error:  # bytes of unknown origin can make the parser raise anything; all of it is the file's fault
        unsafe = _UNSAFE.search(str(error))
        if unsafe:
            raise CheckpointError(
                f"holds more than tensors ({shown(unsafe[1])}); such a file can run code when it is opened, so it was "
                "refused; ask its author for the state dict alone, or for safetensors"
            ) from error
        raise CheckpointError(_DAMAGED.format(container.value)) from error


def _require_uncompressed(path: Path) -> None:
    """`torch.save` never compresses; a file that does could grow a thousandfold in memory."""
    try:
        with zipfile.ZipFile(path) as archive:
            compressed = any(item.compress_type != zipfile.ZIP_STORED for item in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise CheckpointError(_DAMAGED.format(Container.TORCH_ZIP.value)) from error
    if compressed:
        raise CheckpointError("is a compressed zip archive; expected a file as torch.save writes it, uncompressed")


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors (CPU, memory-mapped) and the metadata of a safetensors file; `CheckpointError` if it is damaged."""
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except Exception as error:  # as in read_torch
        raise CheckpointError(_DAMAGED.format(Container.SAFETENSORS.value)) from error


def plain_tensors(state: Mapping[Any, Any], limit: int) -> dict[str, Tensor]:
    """`state` as a dictionary of dense CPU float tensors, without gradients and without copying.

    `limit`, in bytes: the size of the file. Tensors that claim more than that (strides of zero, one storage used over
    and over) would fill the memory once they are copied. Raises `CheckpointError` for them, for a key that is no text,
    and for a value that is no dense float tensor.
    """
    plain, total = {}, 0
    for name, value in state.items():
        if not isinstance(name, str):
            raise CheckpointError(f"has a state dict with a key that is no text: {shown(repr(name))}")
        if not isinstance(value, Tensor):
            raise CheckpointError(f"has a state dict whose {shown(name)} is no tensor but {type(value).__name__}")
        if type(value) not in (Tensor, torch.nn.Parameter) or value.layout is not torch.strided or value.is_meta:
            raise CheckpointError(f"has a state dict whose {shown(name)} is not a dense tensor")
        if value.dtype not in DTYPES:
            kinds = ", ".join(str(kind).removeprefix("torch.") for kind in DTYPES)
            dtype = str(value.dtype).removeprefix("torch.")
            raise CheckpointError(f"has {shown(name)} in {dtype}; expected one of {kinds}")
        plain[name] = value.detach()
        total += value.numel() * value.element_size()
    if total > limit:
        raise CheckpointError(f"claims {total} bytes of weights, but the file has only {limit}")
    return plain


def shown(name: str) -> str:
    """`name` from a file, fit for a one-line message: at most 80 printable characters."""
    short = name if len(name) <= 80 else name[:77] + "..."
    return short if short.isprintable() else ascii(short)


def listed(names: Iterable[str]) -> str:
    """At most three of `names`, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(shown(name) for name in names[:3]) + more
